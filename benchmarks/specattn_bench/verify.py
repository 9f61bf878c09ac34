"""How far is verification attention from what the machine can do, and from torch, in one and the same run?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from specattn_bench import ceilings, options, plans, plots, report, verify_modelled, verify_report
from specattn_bench.ceilings import Ceilings
from specattn_bench.verify_measured import measure_case, require_plans
from specattn_bench.verify_modelled import Modelled
from specattn_bench.verify_series import SCORES, Asked, Case, Series
from specattn_bench.verify_standing import Standing, standings
from specattn_codegen import cpu_info
from specattn_codegen.arch import Arch
from specattn_codegen.digest import to_plain
from specattn_codegen.errors import SpecError
from specattn_codegen.jobs import CompileJob
from specattn_codegen.outcome import Outcome
from specattn_codegen.spec import Dtype, Workload

HELP = """Times verification attention on this CPU beside torch's attention, or models it on a GPU.

Measured, without --gpu: requests over a paged cache of shuffled pages. Each series is proved against the float64
oracle, then all series of a case take turns on data no cache holds. The read and multiply ceilings are measured
before and after, and the better of each counts. Peers read contiguous caches whose layout is made outside the timing:

\b
  SDPA, group as rows      query heads of a group packed as rows of their KV head
  SDPA, enable_gqa         torch's own grouped queries
  SDPA, K/V repeated       every KV head copied for its group, as repeat_kv leaves it
  matmuls, group as rows   product, softmax, product
  matmuls, with scores     the same with the scores all-kv_head, which torch has no other way to give

Scores: none; reference (one pass, normalised by the log-sum-exps drafting left) with and without a histogram;
ends-layer and all-kv_head (exact weights).

Modelled, with --gpu: nothing runs. Kernels are compiled for the GPU, and the cost model says what its memory, its
latency and its units would make of them. Every line is labelled so.

\b
Examples:
  specattn-bench verify
  specattn-bench verify --dtype bfloat16 --rows 7 --scores none --scores ends-layer --seconds 30
  specattn-bench verify --plan key_tile=64 --plan split_keys=2048 --json trial.json --plot trial.png
  specattn-bench verify --gpu h100 --gpu a100
"""
BUSY = 0.7  # load average before a run above which its times are not to be believed


@click.command("verify", help=HELP, short_help="Verification attention, with and without scores.")
@options.shared
@click.option("--keys", default=32768, show_default=True, type=click.IntRange(min=2), help="Keys of each request.")
@click.option("--rows", multiple=True, type=click.IntRange(min=1), help="May be repeated.  [default: 1, 5, 8]")
@click.option(
    "--batch",
    multiple=True,
    type=click.IntRange(min=1),
    help="Requests; may be repeated.  [default: 1; with --gpu 1, 16]",
)
@click.option("--scores", multiple=True, type=click.Choice(list(SCORES)), help="May be repeated.  [default: all]")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME|all", help="Model this GPU instead; may be repeated.")
def command(
    heads: str,
    dtypes: tuple[Dtype, ...],
    page_size: int,
    seconds: float,
    threads: int | None,
    plan: tuple[str, ...],
    plan_source: plans.PlanSource,
    json_path: Path | None,
    plot_path: Path | None,
    save: bool,
    keys: int,
    rows: tuple[int, ...],
    batch: tuple[int, ...],
    scores: tuple[str, ...],
    gpus: tuple[str, ...],
) -> None:
    archs = options.gpus_named(gpus)
    cases = find_cases(
        dtypes or (("bfloat16",) if archs else ("float32", "bfloat16")),
        batch or ((1, 16) if archs else (1,)),
        rows or (1, 5, 8),
        keys,
    )
    asked = Asked(
        heads=options.heads_of(heads),
        cases=cases,
        scores=scores or tuple(SCORES),
        page_size=page_size,
        plan_source=plan_source,
        overrides=plans.parse_overrides(plan),
    )
    if archs:
        if plot_path or save:
            raise SpecError("--plot and --save are for what was measured; with --gpu use --json")
        model(asked, archs, json_path)
        return
    if threads is not None:
        torch.set_num_threads(threads)
    arch = cpu_info.detect(measure=False)
    places = options.report_paths("verify", arch, json_path, save=save)
    options.require_picture(plot_path)
    measure(asked, arch, options.require_seconds(seconds), places, plot_path)


def find_cases(dtypes: Sequence[Dtype], batches: Sequence[int], rows: Sequence[int], keys: int) -> tuple[Case, ...]:
    if max(rows) >= keys:
        raise SpecError(f"--rows {max(rows)}: must be fewer than --keys {keys}, as rows are keys too")
    return tuple(
        Case(dtype=dtype, workload=Workload(batch=batch, q_len=q_len, kv_len=keys))
        for dtype, batch, q_len in itertools.product(dtypes, batches, rows)
    )


def measure(asked: Asked, arch: Arch, seconds: float, places: Sequence[Path], plot_path: Path | None) -> None:
    """Times every case, prints the answer, writes it to `places` and draws it."""
    require_plans(asked, arch)
    load = report.load_average()
    series, before, after = time_cases(asked, arch, seconds)
    best = ceilings.best(before, after)
    found = standings(series, asked, best)
    device = f"{report.processor(arch)} ({arch.target}), {torch.get_num_threads()} threads"
    title = f"measured: {asked.heads.name}, {asked.cases[0].workload.kv_len} keys, {device}"
    verify_report.show(series, found, (before, after), title, report.screen())
    if load > BUSY:
        report.screen().print(f"the machine was busy before the run (load average {load}): repeat it when it is idle")
    by_series = {standing.series: standing for standing in found}
    answer = {
        **report.header("verify", arch, load),
        **verify_report.settings(asked),
        "seconds_a_case": seconds,
        "ceilings": {"before": to_plain(before), "after": to_plain(after), "best": to_plain(best)},
        "results": [verify_report.result(one, by_series.get(one)) for one in series],
    }
    for place in places:
        report.write_json(place, answer)
    if plot_path is not None:
        picture(plot_path, title, best, found)


def time_cases(asked: Asked, arch: Arch, seconds: float) -> tuple[list[Series], Ceilings, Ceilings]:
    """All series, and the ceilings before and after them."""
    dtypes: list[Dtype] = list(dict.fromkeys([case.dtype for case in asked.cases]))
    series: list[Series] = []
    with report.Bar(len(asked.cases)) as bar:
        bar.say("ceilings")
        before = ceilings.measure(arch, dtypes)
        for case in asked.cases:
            bar.say(case.name)
            series += measure_case(asked, case, arch, seconds)
            bar.advance()
        bar.say("ceilings")
        after = ceilings.measure(arch, dtypes)
    return series, before, after


def picture(path: Path, title: str, best: Ceilings, found: Sequence[Standing]) -> None:
    ours = dict.fromkeys(one.series.label for one in found if one.series.kind == "ours")
    theirs = dict.fromkeys(one.series.label for one in found if one.series.kind == "peer")
    points = [
        plots.Point(
            series=one.series.label,
            dtype=one.series.case.dtype,
            case=one.series.case.name,
            intensity=one.intensity,
            gflops=one.gflops,
        )
        for one in found
    ]
    bars = plots.Bars(
        label="the fastest torch layout",
        marks_label="SDPA over repeated K/V",
        values={
            name: {one.series.case.name: one.to_best for one in found if one.series.label == name} for name in ours
        },
        marks={
            name: {one.series.case.name: one.to_plain for one in found if one.series.label == name} for name in ours
        },
    )
    plots.draw(path, title, best, points, bars, plots.colours(list(ours), list(theirs)))


def model(asked: Asked, archs: Sequence[Arch], json_path: Path | None) -> None:
    """Predicts every case on every GPU, prints the answer and writes it."""
    for arch in archs:
        plans.require_known(asked.overrides, asked.specs(), arch)
    if json_path is not None:
        report.require_writable(json_path, "--json")
    found = predict_cases(asked, archs)
    title = f"modelled: {asked.heads.name}, {asked.cases[0].workload.kv_len} keys; no GPU was timed"
    verify_report.show_modelled(found, title, report.screen())
    if json_path is not None:
        answer = {
            "question": "verify",
            "label": "modelled",
            **verify_report.settings(asked),
            "results": [verify_report.modelled_result(one) for one in found],
        }
        report.write_json(json_path, answer)


def predict_cases(asked: Asked, archs: Sequence[Arch]) -> list[Modelled]:
    chosen = verify_modelled.choices(asked, archs)
    jobs = verify_modelled.compile_jobs(chosen)
    outcomes: dict[CompileJob, Outcome] = {}
    with report.Bar(len(jobs)) as bar:
        bar.say("compiling")
        for job, outcome in verify_modelled.compiled(jobs):
            outcomes[job] = outcome
            bar.advance()
    return verify_modelled.predicted(chosen, outcomes)
