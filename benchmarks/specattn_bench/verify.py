"""How far is verification attention from what the machine can do, and from torch, in one and the same run?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from specattn_bench import ceilings, options, plans, plots, report
from specattn_bench.ceilings import Ceilings
from specattn_bench.verify_measured import Setting, measure_case, spec_of
from specattn_bench.verify_report import result, show
from specattn_bench.verify_series import SCORES, Case, Series
from specattn_bench.verify_standing import Standing, standings
from specattn_codegen import cpu_info
from specattn_codegen.cli.progress import console
from specattn_codegen.digest import to_plain
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
  matmuls, group as rows   product, softmax, product; and the same with scores, the only torch way to have them

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
@click.option(
    "--rows", "row_counts", multiple=True, type=click.IntRange(min=1), help="May be repeated.  [default: 1, 5, 8]"
)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(min=1),
    help="Requests; may be repeated.  [default: 1; 1 and 16 with --gpu]",
)
@click.option(
    "--scores", "scores", multiple=True, type=click.Choice(list(SCORES)), help="May be repeated.  [default: all]"
)
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
    row_counts: tuple[int, ...],
    batches: tuple[int, ...],
    scores: tuple[str, ...],
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    setting = Setting(
        heads=options.heads_of(heads),
        arch=cpu_info.detect(measure=False),
        page_size=page_size,
        scores=scores or tuple(SCORES),
        plan_source=plan_source,
        overrides=plans.parse_overrides(plan),
        seconds=options.require_seconds(seconds),
    )
    cases = find_cases(dtypes or ("float32", "bfloat16"), batches or (1,), row_counts or (1, 5, 8), keys)
    plans.require_known(
        setting.overrides,
        [spec_of(setting.heads, case, name) for case in cases for name in setting.scores],
        setting.arch,
    )
    places = options.report_paths("verify", setting.arch, json_path, save)
    options.require_picture(plot_path)
    series, before, after = measure(setting, cases)
    best = ceilings.best(before, after)
    found = standings(series, setting.heads, best)
    device = f"{report.processor(setting.arch)} ({setting.arch.target}), {torch.get_num_threads()} threads"
    title = f"measured: {setting.heads.name}, {keys} keys, {device}"
    show(series, found, best, title, console())
    by_series = {standing.series: standing for standing in found}
    answer = {
        **report.header("verify", setting.arch),
        "heads": setting.heads.name,
        "page_size": page_size,
        "plans": plan_source,
        "seconds_a_case": seconds,
        "ceilings": {"before": to_plain(before), "after": to_plain(after), "best": to_plain(best)},
        "results": [result(one, by_series.get(one)) for one in series],
    }
    for place in places:
        report.write_json(place, answer)
    if plot_path is not None:
        picture(plot_path, title, best, found)


def find_cases(dtypes: Sequence[Dtype], batches: Sequence[int], rows: Sequence[int], keys: int) -> list[Case]:
    if max(rows) >= keys:
        raise SpecError(f"--rows {max(rows)}: must be fewer than --keys {keys}, as rows are keys too")
    return [
        Case(dtype=dtype, workload=Workload(batch=batch, q_len=q_len, kv_len=keys))
        for dtype, batch, q_len in itertools.product(dtypes, batches, rows)
    ]


def measure(setting: Setting, cases: Sequence[Case]) -> tuple[list[Series], Ceilings, Ceilings]:
    """All series, and the ceilings before and after them."""
    dtypes: list[Dtype] = list(dict.fromkeys([case.dtype for case in cases]))
    series: list[Series] = []
    with report.progress_bar(console()) as bar:
        task = bar.add_task("ceilings", total=len(cases))
        before = ceilings.measure(setting.arch, dtypes)
        for case in cases:
            bar.update(task, description=case.name)
            series += measure_case(setting, case)
            bar.advance(task)
        bar.update(task, description="ceilings")
        after = ceilings.measure(setting.arch, dtypes)
    return series, before, after


def picture(path: Path, title: str, best: Ceilings, found: Sequence[Standing]) -> None:
    def label(standing: Standing) -> str:
        return standing.series.name if standing.series.kind == "peer" else f"ours, scores {standing.series.name}"

    ours = dict.fromkeys(label(one) for one in found if one.series.kind == "ours")
    theirs = dict.fromkeys(label(one) for one in found if one.series.kind == "peer")
    points = [
        plots.Point(
            series=label(one),
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
        values={name: {one.series.case.name: one.to_best for one in found if label(one) == name} for name in ours},
        marks={name: {one.series.case.name: one.to_plain for one in found if label(one) == name} for name in ours},
    )
    plots.draw(path, title, best, points, bars, plots.colours(list(ours), list(theirs)))
