"""How many drafts hold, with which keys chosen? Any checkpoint, any text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from specattn_bench import acceptance_plots, acceptance_report, options, report
from specattn_bench.acceptance_study import (
    EVERYTHING,
    FORCED,
    GENERATED,
    MODES,
    SERIES,
    Case,
    Kept,
    Observed,
    Run,
    Study,
    grouped,
)
from specattn_bench.acceptance_texts import SETS, Passage, Texts, require_room
from specattn_bench.corpus import Corpus, library, read
from specattn_bench.reference import HELD_OUT, held_out
from specattn_codegen import json_lines
from specattn_codegen.errors import SpecError
from specattn_codegen.processors import cpu_info
from specattn_runtime import load_kernels
from specattn_runtime.model.checkpoint import load_llama
from specattn_runtime.model.llama import Llama
from specattn_runtime.model.tokens import codec_of

TRAINED = report.BENCHMARKS.parent / "tests" / "assets" / "tiny-bytes-8k"
CONTEXTS, BUDGETS, DRAFT_LENS = (1024, 2048, 4096, 8192), (0.03, 0.05, 0.07, 0.1), (4, 6, 8)
HELP = f"""Tokens a round of every preset, each with the same number of prefix keys, on ordinary text and on text whose
continuation lies far back.

Along held-out text, where the text decides every token and what is counted is the chance that drafts hold; and in what
the model generates from the same prompts, greedy and at temperature 0.6, at the usual budget and draft length.
`{EVERYTHING}` selects every key and must lose nothing.

Text is what a checkpoint's {HELD_OUT} names, files of Python's standard library, or any files with --text.

\b
Examples:
  specattn-bench acceptance
  specattn-bench acceptance --full all --save
  specattn-bench acceptance --model DIR --text a.txt --text b.txt --context 8000 --json out.json --plot out.png
"""


@click.command("acceptance", help=HELP, short_help="Drafts that hold: every preset, budget and draft length.")
@click.option("--model", default=TRAINED, type=click.Path(path_type=Path), help="Checkpoint.  [default: the tests']")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), help="A file; may be repeated.")
@click.option("--series", "asked", multiple=True, type=click.Choice(SERIES), help="May be repeated.  [default: all]")
@click.option(
    "--context",
    "contexts",
    multiple=True,
    type=click.IntRange(min=64),
    help="Prompt tokens; may be repeated.  [default: 1024, 2048, 4096, 8192]",
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the prefix; may be repeated.  [default: 0.03, 0.05, 0.07, 0.1]",
)
@click.option(
    "--draft-len", "draft_lens", multiple=True, type=click.IntRange(min=1), help="May be repeated.  [default: 4, 6, 8]"
)
@click.option("--usual-budget", default=0.07, show_default=True, help="Where draft lengths and contexts are compared.")
@click.option("--usual-drafts", default=6, show_default=True, help="Where budgets and contexts are compared.")
@click.option("--passages", default=3, show_default=True, type=click.IntRange(min=1), help="Of a set and context.")
@click.option("--rounds", default=16, show_default=True, type=click.IntRange(min=1), help="Along each passage.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="May be repeated.  [default: all]")
@click.option(
    "--full",
    type=click.Choice((FORCED, "all")),
    help="Every budget with every draft length, along text or in what is generated too.",
)
@click.option(
    "--resume",
    "journal",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Keep what was observed here as it comes; what the file already has, of the same weights, is not run again.",
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="CPU threads.")
@click.option("--seed", default=0, show_default=True, help="Of the passages.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="PATH", help="Write the results here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="PATH", help="Draw them: .png or .svg.")
@click.option("--save", is_flag=True, help="Write both, and every cell as a table, to benchmarks/results/acceptance/.")
def command(
    model: Path,
    texts: tuple[Path, ...],
    asked: tuple[str, ...],
    contexts: tuple[int, ...],
    budgets: tuple[float, ...],
    draft_lens: tuple[int, ...],
    usual_budget: float,
    usual_drafts: int,
    passages: int,
    rounds: int,
    modes: tuple[str, ...],
    full: str | None,
    journal: Path | None,
    threads: int,
    seed: int,
    json_path: Path | None,
    plot_path: Path | None,
    save: bool,
) -> None:
    json_paths, plot_paths = places(model, json_path, plot_path, save=save)
    torch.set_num_threads(threads)
    arch, load = cpu_info.detect(measure=False), report.load_average()
    llama = load_llama(model, dtype=torch.float32)
    source = Texts(corpus=corpus_of(model, texts), codec=codec_of(model, llama.config), seed=seed)
    contexts = contexts or CONTEXTS
    cases = list(
        dict.fromkeys(
            Case(series=series, budget=usual_budget if series == EVERYTHING else budget, draft_len=draft_len)
            for series in dict.fromkeys((*asked, EVERYTHING) if asked else SERIES)
            for budget, draft_len in itertools.product(budgets or BUDGETS, draft_lens or DRAFT_LENS)
            if full or budget == usual_budget or draft_len == usual_drafts
        )
    )
    if not cases:
        raise SpecError("no case left: --usual-budget and --usual-drafts must be among the budgets and draft lengths")
    decoded = rounds * (max(case.draft_len for case in cases) + 1) + 1
    found = [
        one
        for text_set, context in itertools.product(SETS, contexts)
        for one in source.passages(text_set, context, decoded, passages)
    ]
    require_room(found, llama.config.max_positions)
    usual = [case for case in cases if case.budget == usual_budget and case.draft_len == usual_drafts]
    runs = [
        Run(context=context, modes=together, cases=group)
        for context in contexts
        for together in ((FORCED,), tuple(mode for mode in GENERATED if mode in (modes or MODES)))
        for _, group in grouped(cases if full == "all" or FORCED in together else usual)
        if set(together) & set(modes or MODES)
    ]
    summaries = measure(llama, found, runs, rounds, journal)
    answers = acceptance_report.findings(summaries, budget=usual_budget, draft_len=usual_drafts)
    title = f"{model.name}: {passages} passages a set and context, {rounds} rounds each"
    screen = report.screen()
    screen.print(title, markup=False)
    acceptance_report.show(summaries, answers, budget=usual_budget, draft_len=usual_drafts, screen=screen)
    for path in json_paths:
        answer = {
            **report.header("acceptance", arch, load),
            "model": model.name,
            "heads": llama.config.heads.name,
            "layers": llama.config.num_layers,
            "rounds": rounds,
            "passages": [
                {"text": one.text_set, "kind": one.kind, "context": one.context, "sha256": one.digest} for one in found
            ],
            "findings": [
                {"question": one.question, "found": round(one.found, 4), "wanted": one.wanted, "met": one.met}
                for one in answers
            ],
            "results": [one.facts() for one in summaries],
        }
        report.write_json(path, answer)
    for path in plot_paths:
        acceptance_plots.draw(path, title, summaries, budget=usual_budget, draft_len=usual_drafts)
    if save:
        acceptance_report.write_grid(json_paths[-1].with_suffix(".md"), title, summaries)


def places(model: Path, json_path: Path | None, plot_path: Path | None, *, save: bool) -> tuple[list[Path], list[Path]]:
    """Files for the numbers and for the picture; every one is tried before anything runs."""
    kept = report.kept_path("acceptance", model.name) if save else None
    json_paths = [path for path in (json_path, kept) if path]
    plot_paths = [path for path in (plot_path, kept.with_suffix(".png") if kept else None) if path]
    for path in json_paths:
        report.require_writable(path, "--json")
    for path in plot_paths:
        options.require_picture(path)
    return json_paths, plot_paths


def corpus_of(model: Path, texts: Sequence[Path]) -> Corpus:
    absent = next((path for path in texts if not path.is_file()), None)
    if absent is not None:
        raise SpecError(f"{absent}: no such file; give a file of text")
    if texts:
        return Corpus(names=tuple(path.name for path in texts), texts=tuple(path.read_bytes() for path in texts))
    return read(library(), [path.relative_to(library()).as_posix() for path in held_out(model)])


def measure(
    llama: Llama, passages: Sequence[Passage], runs: Sequence[Run], rounds: int, journal: Path | None
) -> list[acceptance_report.Summary]:
    """Mode by mode; runs that the journal has are read there, the others added to it."""
    kernels, kept = load_kernels(llama.config.heads), {} if journal is None else read_journal(journal)
    summaries: list[acceptance_report.Summary] = []
    with report.Bar(len(runs)) as bar:
        for context in dict.fromkeys(run.context for run in runs):
            mine = [run for run in runs if run.context == context]
            there = [passage for passage in passages if passage.context == context]
            study = Study(llama, kernels, there, [case for run in mine for case in run.cases], rounds=rounds)
            observed: list[Observed] = []
            for run in mine:
                bar.say(f"{context} {run.modes[0]} {run.cases[0].series}, {run.cases[0].draft_len} drafts")
                key = study.key(run)
                if key not in kept:
                    kept[key] = study.run(run)
                    if journal is not None:
                        json_lines.append(journal, Kept(key=key, observed=kept[key]))
                observed += kept[key]
                bar.advance()
            summaries += acceptance_report.summarise(observed, there)
    return sorted(summaries, key=lambda one: MODES.index(one.mode))


def read_journal(path: Path) -> dict[str, Sequence[Observed]]:
    return {kept.key: kept.observed for kept in json_lines.read(path, Kept)}
