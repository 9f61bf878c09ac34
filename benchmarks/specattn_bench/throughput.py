"""How many tokens a second does speculative decoding make, beside dense decoding and transformers, and why?"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click
import torch

from specattn_bench import options, report, throughput_report
from specattn_bench.acceptance import corpus_of
from specattn_bench.acceptance_texts import SETS, Texts
from specattn_bench.throughput_measured import (
    ROUNDS,
    Case,
    Contender,
    Law,
    decodings,
    law_of,
    play_in_turns,
)
from specattn_bench.throughput_models import PAGE_SIZE, SEED, Prompts, Subject, drawn_prompts, prefilled
from specattn_bench.throughput_report import DENSE, Line
from specattn_codegen.errors import SpecError
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof.problems import TORCH_DTYPES
from specattn_codegen.spec import Dtype
from specattn_runtime import load_kernels
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.presets import PRESETS, preset_named
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.model.llama import Llama
from specattn_runtime.model.llama_config import LlamaConfig, read_config
from specattn_runtime.model.tokens import codec_of

ASSETS = report.BENCHMARKS.parent / "tests" / "assets"
CONTEXTS = (2000, 8000)
PASSAGES = 2  # of ordinary text, and as many whose continuation lies far back
HELP = f"""Times rounds of every preset on this CPU beside dense steps by the same kernels and transformers' generate.

Prompts are cached beforehand and every contender continues the same ones, in turns of some rounds each, greedily.
Medians of rounds; tokens a round as the texts gave them, or as --accepted says. With a round's phases come the speed
that they predict (tokens * dense step / (drafts * draft step + verify + select)) and the one with every draft held.

\b
--model DIR   a checkpoint, along ordinary and long-range passages of its held-out text, or of any --text
--drawn DIR   the config.json of a folder with weights from a seed: shapes whose weights are not here; with --accepted,
              since drawn weights say nothing of how many drafts hold

\b
Examples:
  specattn-bench throughput
  specattn-bench throughput --model DIR --preset vegas --preset hybrid --batch 16 --context 8000 --dtype float32
  specattn-bench throughput --drawn DIR --accepted 4.9 --batch 16 --json out.json --plot out.png

Contexts are {" and ".join(map(str, CONTEXTS))} tokens where none is named, as far as the model's positions reach.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is measured of every model."""

    dtypes: tuple[Dtype, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    specs: tuple[DecodeSpec, ...]
    law: Law | None
    texts: tuple[Path, ...]
    seconds: float

    @property
    def room(self) -> int:
        """Tokens that follow a prompt."""
        return self.specs[0].max_new_tokens

    def contexts_of(self, subject: Subject, config: LlamaConfig) -> tuple[int, ...]:
        """The contexts asked for, or those of CONTEXTS that the model has positions for. Raises SpecError."""
        most = config.max_positions - self.room
        fitting = self.contexts or tuple(context for context in CONTEXTS if context <= most)
        if not fitting or max(fitting) > most:
            raise SpecError(
                f"--context {max(fitting or CONTEXTS)}: with {self.room} tokens decoded after it exceeds the "
                f"{config.max_positions} positions of {subject.name}; use at most {most}"
            )
        return fitting


@click.command("throughput", help=HELP, short_help="Tokens a second, by phase, beside dense and transformers.")
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Checkpoint; may be repeated.  [default: those of tests/assets with 8K positions]",
)
@click.option("--drawn", multiple=True, type=click.Path(path_type=Path), help="A folder's shape, weights from a seed.")
@click.option("--accepted", type=float, help="Drafts that hold, a round: let so many, whatever they say.")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="A file; may be repeated.")
@click.option("--preset", "presets", multiple=True, help="May be repeated; dense is always among them.  [default: all]")
@click.option("--draft-len", default=6, show_default=True, help="Drafts a round.")
@click.option("--budget", default=0.07, show_default=True, help="Keys drafts read, as a share of the prefix.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(("float32", "bfloat16", "float16")),
    help="May be repeated.  [default: float32, bfloat16]",
)
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(min=1), help="May be repeated.  [default: 1, 4, 16]"
)
@click.option("--context", "contexts", multiple=True, type=click.IntRange(min=64), help="Prompt tokens; repeatable.")
@click.option("--seconds", default=3.0, show_default=True, help="Timing of one case, all its series together.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="PATH", help="Write the results here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="PATH", help="Draw them: .png or .svg.")
@click.option("--save", is_flag=True, help="Write both to benchmarks/results/<processor>/ of this checkout.")
def command(
    models: tuple[Path, ...],
    drawn: tuple[Path, ...],
    accepted: float | None,
    texts: tuple[Path, ...],
    presets: tuple[str, ...],
    draft_len: int,
    budget: float,
    dtypes: tuple[Dtype, ...],
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    seconds: float,
    threads: int | None,
    json_path: Path | None,
    plot_path: Path | None,
    save: bool,
) -> None:
    if drawn and accepted is None:
        raise SpecError("--drawn: drawn weights say nothing of how many drafts hold; name a number with --accepted")
    if not 0 < seconds < float("inf"):
        raise SpecError(f"--seconds {seconds:g}: must be above 0")
    named = dict.fromkeys((DENSE, *(presets or PRESETS)))
    room = ROUNDS * (draft_len + 1) + 1
    asked = Asked(
        dtypes=dtypes or ("float32", "bfloat16"),
        batches=batches or (1, 4, 16),
        contexts=tuple(sorted(contexts)),
        specs=tuple(
            DecodeSpec(
                preset=preset_named(name),
                draft_len=draft_len,
                budget=budget,
                max_new_tokens=room,
                page_size=PAGE_SIZE,
            )
            for name in named
        ),
        law=None if accepted is None else law_of(accepted, draft_len),
        texts=texts,
        seconds=seconds,
    )
    trained = models or (() if drawn else tuple(sorted(ASSETS.glob("tiny-bytes-8k*"))))
    subjects = [Subject(folder=folder, drawn=False) for folder in trained]
    subjects += [Subject(folder=folder, drawn=True) for folder in drawn]
    if not subjects:
        raise SpecError(f"--model: {ASSETS} has no checkpoints; name the folder of one")
    for subject in subjects:
        asked.contexts_of(subject, read_config(subject.folder))
    if threads is not None:
        torch.set_num_threads(threads)
    peer = transformers_peer()
    arch, load = cpu_info.detect(measure=False), report.load_average()
    places = options.report_paths("throughput", arch, json_path, save=save)
    pictures = [plot_path] if plot_path else []
    pictures += [report.saved_path(arch, "throughput").with_suffix(".png")] if save else []
    for path in pictures:
        options.require_picture(path)
    found = throughput_report.standings(measure(subjects, asked, peer))
    title = f"measured: {draft_len} drafts, {budget:.0%} of the keys, {report.device(arch)}"
    if accepted is not None:
        title += f"; {accepted:g} drafts a round let hold, whatever they say"
    throughput_report.show(found, title, report.screen())
    written = {
        **report.header("throughput", arch, load),
        "draft_len": draft_len,
        "budget": budget,
        "accepted": "as the texts gave it" if accepted is None else accepted,
        "seconds_a_case": seconds,
        "results": [throughput_report.result(one) for one in found],
    }
    for place in places:
        report.write_json(place, written)
    for path in pictures:
        throughput_report.draw(path, title, found)


def transformers_peer() -> ModuleType:
    """The module that needs transformers, which the project itself does without. Raises SpecError."""
    try:
        return importlib.import_module("specattn_bench.throughput_peer")
    except ModuleNotFoundError as error:
        raise SpecError(
            f"{error.name}: not installed, and half of what is compared; pip install transformers"
        ) from error


def measure(subjects: Sequence[Subject], asked: Asked, peer: ModuleType) -> list[Line]:
    """Every case of every model and dtype."""
    lines: list[Line] = []
    cases = sum(len(asked.contexts_of(subject, read_config(subject.folder))) for subject in subjects)
    with report.Bar(cases * len(asked.dtypes) * len(asked.batches)) as bar:
        for subject, dtype in itertools.product(subjects, asked.dtypes):
            lines += _measure_model(subject, dtype, asked, peer, bar)
    return lines


def _measure_model(subject: Subject, dtype: Dtype, asked: Asked, peer: ModuleType, bar: report.Bar) -> list[Line]:
    llama = subject.llama(dtype)
    kernels = load_kernels(llama.heads, dtype=TORCH_DTYPES[dtype], page_size=PAGE_SIZE)
    model = peer.in_transformers(subject, dtype)
    contexts = asked.contexts_of(subject, llama.config)
    lines: list[Line] = []
    for context in contexts:
        bar.say(f"{subject.name}, {dtype}: prompts of {context} tokens")
        prompts = _prompts(subject, llama, kernels, asked.texts, context)
        for batch in asked.batches:
            case = Case(model=subject.name, heads=llama.heads.name, dtype=dtype, batch=batch, context=context)
            bar.say(case.name)
            ours = decodings(llama, kernels, prompts, asked.specs, batch, asked.law)
            lines += _measure_case(case, [*ours, peer.PlainGenerate(model=model, prompts=prompts)], asked, prompts)
            bar.advance()
    return lines


def _prompts(subject: Subject, llama: Llama, kernels: AttentionKernels, texts: Sequence[Path], context: int) -> Prompts:
    if subject.drawn:
        return drawn_prompts(llama, context)
    codec = codec_of(subject.folder, llama.config)
    source = Texts(corpus=corpus_of(subject.folder, texts), codec=codec, seed=SEED)
    found = [one for text_set in SETS for one in source.passages(text_set, context, 0, PASSAGES)]
    shortest = min(len(one.prompt) for one in found)
    if shortest < context:
        raise SpecError(f"--context {context}: a passage has {shortest} tokens; use at most so many")
    return prefilled(llama, kernels, [one.prompt for one in found], [one.text_set for one in found])


def _measure_case(case: Case, contenders: Sequence[Contender], asked: Asked, prompts: Prompts) -> list[Line]:
    played = play_in_turns(contenders, len(prompts.tokens), case.batch, asked.seconds)
    drafts = {spec.preset.name: spec.draft_len * spec.preset.drafts for spec in asked.specs}
    compared = None if asked.law else played[DENSE]
    return [
        throughput_report.line_of(case, name, drafts.get(name, 0), turns, compared) for name, turns in played.items()
    ]
