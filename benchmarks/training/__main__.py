"""`python -m benchmarks.training`: trains one of the acceptance study's Llamas."""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch

from benchmarks.training import model
from benchmarks.training.run import STATE, Asked, train
from specattn_bench import corpus
from specattn_bench.reference import HELD_OUT
from specattn_codegen.cli import console
from specattn_runtime.model.llama_config import parse_config

HELP = f"""Trains a byte-level Llama on the sources of this Python's standard library, mixed with episodes whose answers
lie far back, and writes a checkpoint folder.

The files that heldout.txt lists there are never read: a twelfth of them, or those of the checkpoint it starts from. A
run that was killed goes on when it is started again with the same arguments; {STATE} is only for that.

\b
Examples:
  python -m benchmarks.training --heads gqa --out tiny --minutes 600
  python -m benchmarks.training --heads mha --start tests/assets/tiny-bytes-llama --rate 1e-3 --out tiny-mha
"""
WIDTH, LAYERS = 192, 4


@click.command(help=HELP)
@click.option(
    "--heads", required=True, type=click.Choice(list(model.KV_HEADS)), help="8 query heads on 2 or 8 KV heads."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the checkpoint.")
@click.option("--start", type=click.Path(path_type=Path, exists=True), help="Go on from this checkpoint.")
@click.option("--rate", default=4e-3, show_default=True, help="Highest learning rate.")
@click.option("--minutes", default=90.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--positions", default=9216, show_default=True, type=click.IntRange(min=8192), help="The longest text.")
@click.option("--keep-minutes", default=4.0, show_default=True, help="Between two states on disk.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="CPU threads.")
def command(
    heads: str,
    out: Path,
    start: Path | None,
    rate: float,
    minutes: float,
    positions: int,
    keep_minutes: float,
    seed: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    fields, weights = first(model.KV_HEADS[heads], start, positions, seed)
    folder = corpus.library()
    names = corpus.names_in(folder)
    kept_apart = [name for name in names if name in listed(start)] if start else list(filter(corpus.is_held_out, names))
    out.mkdir(parents=True, exist_ok=True)
    (out / HELD_OUT).write_text("".join(f"{name}\n" for name in kept_apart))
    asked = Asked(
        folder=out,
        fields=fields,
        weights=weights,
        rate=rate,
        seconds=60 * minutes,
        keep_seconds=60 * keep_minutes,
        seed=seed,
        clock=time.monotonic,
    )
    learnt = corpus.read(folder, sorted(set(names) - set(kept_apart)))
    for line in train(asked, learnt, corpus.read(folder, kept_apart)).log:
        click.echo(line)


def first(kv_heads: int, start: Path | None, positions: int, seed: int) -> tuple[dict[str, object], model.Weights]:
    """config.json and the weights to start with."""
    if start is not None:
        return model.started(start, kv_heads, positions)
    fields = model.config_fields(kv_heads, hidden_size=WIDTH, layers=LAYERS, max_positions=positions)
    return fields, model.first_weights(parse_config(fields), seed)


def listed(start: Path) -> set[str]:
    return set((start / HELD_OUT).read_text().split())


if __name__ == "__main__":
    console.run(command)
