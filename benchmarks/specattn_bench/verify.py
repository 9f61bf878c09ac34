"""How far is verification attention from what the machine can do, and from torch, in one and the same run?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import click

from specattn_bench import ceilings, modelled_report, options, plots, report, runs, verify_report
from specattn_bench.ceilings import Ceilings
from specattn_bench.measured import require_plans
from specattn_bench.options import Common, Places
from specattn_bench.verify_measured import measure_case
from specattn_bench.verify_series import SCORES, Asked, Case
from specattn_bench.verify_standing import Standing, standings
from specattn_codegen.errors import SpecError
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
def command(common: Common, keys: int, rows: tuple[int, ...], batch: tuple[int, ...], scores: tuple[str, ...]) -> None:
    cases = find_cases(
        common.dtypes or (("bfloat16",) if common.gpus else ("float32", "bfloat16")),
        batch or ((1, 16) if common.gpus else (1,)),
        rows or (1, 5, 8),
        keys,
    )
    asked = Asked(
        heads=common.heads,
        cases=cases,
        scores=scores or tuple(SCORES),
        page_size=common.page_size,
        plans=common.plans,
    )
    if common.gpus:
        modelled_report.answer("verify", common, asked.for_gpus(), f"{keys} keys", verify_report.settings(asked))
    else:
        measure(asked, common.here("verify"), common.seconds)


def find_cases(dtypes: Sequence[Dtype], batches: Sequence[int], rows: Sequence[int], keys: int) -> tuple[Case, ...]:
    if max(rows) >= keys:
        raise SpecError(f"--rows {max(rows)}: must be fewer than --keys {keys}, as rows are keys too")
    return tuple(
        Case(dtype=dtype, workload=Workload(batch=batch, q_len=q_len, kv_len=keys))
        for dtype, batch, q_len in itertools.product(dtypes, batches, rows)
    )


def measure(asked: Asked, places: Places, seconds: float) -> None:
    """Times every case, prints the answer, writes it and draws it."""
    arch = places.arch
    require_plans(asked.kernels(), arch, asked.plans)
    dtypes: list[Dtype] = list(dict.fromkeys([case.dtype for case in asked.cases]))
    run = runs.time_cases(
        asked.cases,
        lambda case: measure_case(asked, case, arch, seconds),
        lambda: ceilings.measure(arch, dtypes),
    )
    found = standings(run.series, asked, run.best)
    title = f"measured: {asked.heads.name}, {asked.cases[0].workload.kv_len} keys, {report.device(arch)}"
    verify_report.show(run, found, title, report.screen())
    by_series = {standing.series: standing for standing in found}
    answer = {
        **report.header("verify", arch, run.load),
        **verify_report.settings(asked),
        "seconds_a_case": seconds,
        "ceilings": run.ceilings,
        "results": [verify_report.result(one, by_series.get(one)) for one in run.series],
    }
    for place in places.json:
        report.write_json(place, answer)
    if places.picture is not None:
        picture(places.picture, title, run.best, found)


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
        if one.series.kind != "beside"
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
