"""Options that several commands take, each said once."""

from __future__ import annotations

from pathlib import Path

import click

from specattn_codegen.spec import FLOAT8

DEFAULT_PAGE_SIZE = 16
TRIALS = click.IntRange(min=1)
SECONDS = click.FloatRange(min=0, min_open=True)
SEED = click.IntRange(0, 2**32 - 1)

MODEL = click.option(
    "--model", metavar="NAME|PATH", help="A registered model, a Hugging Face config.json, or its folder."
)
HEADS = click.option("--heads", metavar="HQ,HKV,D", help="Query heads, KV heads and head dim instead of a model.")
TP = click.option("--tp", type=int, default=1, show_default=True, help="Tensor-parallel ranks that share the heads.")
KV_DTYPE = click.option("--kv-dtype", type=click.Choice(FLOAT8), help="Of an 8-bit KV cache, which comes with scales.")
PAGE_SIZE = click.option(
    "--page-size",
    type=click.IntRange(min=1),
    default=DEFAULT_PAGE_SIZE,
    show_default=True,
    help="Keys per page of the cache.",
)
PACKS = click.option(
    "--packs",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="A folder of packs, or one, looked up before all others; may be repeated.",
)
