"""How good are the keys that approximate scores choose: reference-normalised, of fewer rows, rounded to 8 bits?"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from specattn_bench import options, reference_report, report
from specattn_bench.known_text import Passages
from specattn_bench.reference_methods import METHODS
from specattn_bench.reference_study import Recorded, Study
from specattn_codegen.digest import to_plain
from specattn_codegen.errors import SpecError
from specattn_codegen.processors import cpu_info
from specattn_runtime import load_kernels
from specattn_runtime.model.checkpoint import load_llama
from specattn_runtime.model.llama import Llama
from specattn_runtime.model.tokens import TokenCodec, codec_of

TRAINED = report.BENCHMARKS.parent / "tests" / "assets" / "tiny-bytes-llama"
HELD_OUT = "heldout.txt"
HELP = f"""Measures how well approximate scores choose keys, and what that costs in accepted drafts.

The decode loop itself runs along held-out text: the text decides every token, so that every method verifies the very
same rows, after drafts that read what the method chose. Each selection is compared with the exact top k of all rows'
weights per KV head (preset pillar) at the same place.

Text is what a checkpoint's {HELD_OUT} names, files of Python's standard library, or any files with --text.

\b
Examples:
  specattn-bench reference
  specattn-bench reference --method exact --method reference --budget 0.05 --draft-len 4
  specattn-bench reference --model DIR --text a.txt --text b.txt --context 8000 --json out.json --plot out.png
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """The start of a file; the first `context` tokens are the prompt."""

    path: str
    digest: str
    context: int
    tokens: list[int]


@click.command("reference", help=HELP, short_help="Approximate scores: what they select and what it costs.")
@click.option("--model", default=TRAINED, type=click.Path(path_type=Path), help="Checkpoint.  [default: the tests']")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="A file; may be repeated.")
@click.option("--passages", default=8, show_default=True, type=click.IntRange(min=2), help="Most files to use.")
@click.option(
    "--context",
    "contexts",
    multiple=True,
    type=click.IntRange(min=64),
    help="Prompt tokens, of the files in turn; may be repeated.  [default: 1024, 2048, 3072]",
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the prefix; may be repeated.  [default: 0.02, 0.03, 0.05, 0.07, 0.1]",
)
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="[default: all]")
@click.option("--draft-len", default=6, show_default=True, type=click.IntRange(min=1), help="Drafts a round.")
@click.option("--rounds", default=12, show_default=True, type=click.IntRange(min=2), help="Rounds a passage.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="CPU threads.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="PATH", help="Write the results here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="PATH", help="Draw them: .png or .svg.")
def command(
    model: Path,
    texts: tuple[Path, ...],
    passages: int,
    contexts: tuple[int, ...],
    budgets: tuple[float, ...],
    methods: tuple[str, ...],
    draft_len: int,
    rounds: int,
    threads: int,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    if json_path is not None:
        report.require_writable(json_path, "--json")
    options.require_picture(plot_path)
    torch.set_num_threads(threads)
    arch, load = cpu_info.detect(measure=False), report.load_average()
    llama = load_llama(model, dtype=torch.float32)
    files = texts or held_out(model)
    read = read_passages(
        files, codec_of(model, llama.config), contexts or (1024, 2048, 3072), rounds * (draft_len + 1) + 1, passages
    )
    require_room(llama, read)
    asked = tuple(dict.fromkeys(("exact", *(methods or METHODS))))
    summaries = measure(llama, read, asked, budgets or (0.02, 0.03, 0.05, 0.07, 0.1), draft_len, rounds)
    title = f"{model.name}: {len(read)} passages, {draft_len} drafts, {rounds} rounds each"
    reference_report.show(summaries, title, report.screen())
    if json_path is not None:
        answer = {
            **report.header("reference", arch, load),
            "model": model.name,
            "heads": llama.config.heads.name,
            "layers": llama.config.num_layers,
            "draft_len": draft_len,
            "rounds": rounds,
            "passages": [{"path": one.path, "sha256": one.digest, "context": one.context} for one in read],
            "results": rounded(to_plain(summaries)),
        }
        report.write_json(json_path, answer)
    if plot_path is not None:
        reference_report.draw(plot_path, title, summaries)


def rounded(value: object) -> object:
    """The same with every float to five decimals, more than a mean over passages is good for."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


def held_out(model: Path) -> list[Path]:
    """Files the checkpoint never saw, as far as this Python's standard library has them."""
    listed = model / HELD_OUT
    if not listed.is_file():
        raise SpecError(f"{listed}: no such file, so no text is known to be held out; name some with --text")
    library = Path(sysconfig.get_paths()["stdlib"])
    return [library / name for name in listed.read_text().split() if (library / name).is_file()]


def read_passages(
    files: Sequence[Path], codec: TokenCodec, contexts: Sequence[int], decoded: int, count: int
) -> list[Passage]:
    """At most `count` files, evenly out of those long enough for any context and `decoded` tokens after it."""
    needed = max(contexts) + decoded
    long_enough = [(path, tokens) for path in files if len(tokens := codec.encode(_content(path))) >= needed]
    if len(long_enough) < 2:
        raise SpecError(
            f"{len(long_enough)} of {len(files)} files have {needed} tokens: at least 2 must; use a smaller --context"
        )
    count = min(count, len(long_enough))
    chosen = [long_enough[place * len(long_enough) // count] for place in range(count)]
    return [
        Passage(
            path=str(Path(*path.parts[-2:])),
            digest=hashlib.sha256(_content(path)).hexdigest(),
            context=contexts[place % len(contexts)],
            tokens=tokens[: contexts[place % len(contexts)] + decoded],
        )
        for place, (path, tokens) in enumerate(chosen)
    ]


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise SpecError(f"{path}: no such file; give a file of text")
    return path.read_bytes()


def require_room(llama: Llama, passages: Sequence[Passage]) -> None:
    longest = max(len(one.tokens) for one in passages)
    if longest > llama.config.max_positions:
        raise SpecError(
            f"--context: with the tokens decoded after it {longest} exceed the model's {llama.config.max_positions} "
            "positions; use a smaller one or fewer --rounds"
        )


def measure(
    llama: Llama,
    read: Sequence[Passage],
    methods: Sequence[str],
    budgets: Sequence[float],
    draft_len: int,
    rounds: int,
) -> list[reference_report.Summary]:
    """Every method at every budget, the exact one first."""
    width = max(len(one.tokens) for one in read)
    passages = Passages(
        texts=torch.tensor([one.tokens + [0] * (width - len(one.tokens)) for one in read]),
        contexts=tuple(one.context for one in read),
    )
    summaries: list[reference_report.Summary] = []
    with report.Bar(len(budgets) * len(methods)) as bar:
        bar.say("prefill")
        study = Study(llama, load_kernels(llama.config.heads), passages, draft_len=draft_len, rounds=rounds)
        for budget in budgets:
            exact: Recorded | None = None
            for name in methods:
                bar.say(f"{name} at {budget:.0%}")
                recorded = study.run(METHODS[name], budget)
                exact = exact or recorded
                summaries.append(reference_report.summarise(name, budget, recorded, exact))
                bar.advance()
    return summaries
