"""specattn-tune --report: a page that says what a run has tried, and that loads nothing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from rich.console import Console

from specattn_codegen import environment, space
from specattn_codegen.cli.progress import TuningProgress, short_plan
from specattn_codegen.cli.tune_report import write_report
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import cpu_info
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning.measure import summary
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.search import Search, Strategy, space_of
from specattn_codegen.tuning.tune_measured import tune_measured
from specattn_codegen.tuning.tune_session import Budget, Logbook, Target, Task, measure_trial
from specattn_codegen.tuning.workforce import Replay

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
TASKS = (
    Task(spec=KernelSpec(op="verify_attention", heads=HEADS), workloads=(Workload(batch=1, q_len=7, kv_len=4096),)),
    Task(
        spec=KernelSpec(op="select_kv", heads=HEADS, selection="layer"),
        workloads=(Workload(batch=1, q_len=7, kv_len=4096, budget=287),),
    ),
)
TRIALS = 9
WRONG = "row 3 is <b>4</b> tolerances off"


def replayed() -> tuple[Target, TuningProgress]:
    arch = dataclasses.replace(cpu_info.detect(measure=False), bandwidth_gbs=10.0, fp32_tflops=0.1, bf16_tflops=0.2)
    target = Target(arch=arch, backend="cpu", is_present=True, page_size=16)
    book = Logbook(target, None, environment.current("cpu", "a test"))
    records = []
    for task in TASKS:
        default = space.default_plan(task.spec, arch, "cpu")
        for index, plan in enumerate(space.feasible(task.spec, arch, "cpu")):
            blank = book.blank(measure_trial(task.spec, plan, task.workloads[0], target, seed=0, seconds=1.0))
            outcome = Outcome(status=Status.OK, timings=(summary([500.0 + index] * 6),))
            if index % 3 == 0 and plan != default:
                outcome = Outcome(status=Status.WRONG, detail=WRONG)
            records.append(dataclasses.replace(blank, outcome=outcome))

    def search_for(task: Task) -> Search:
        strategy = Strategy(sampler="random", trials=TRIALS, seed=0)
        return Search(space_of(task.spec, arch, "cpu"), seeds=(), strategy=strategy)

    progress = TuningProgress(Console(quiet=True), len(TASKS))
    budget = Budget(trials=TRIALS, seed=0)
    tune_measured(TASKS, target, budget, book, progress, lambda _: None, search_for, Replay(records))
    return target, progress


def test_the_page_shows_every_search_and_loads_nothing(tmp_path: Path) -> None:
    target, progress = replayed()
    path = tmp_path / "report.html"
    write_report(path, target, progress)
    page = path.read_text()
    for title in ("Winners", "Search history", "Settings tried", "Roofline", "Coverage", "Trials by outcome"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<svg") == page.count("</svg>") == 4
    assert len(progress.winners) == len(TASKS)
    for winner in progress.winners:
        assert f"<td>{winner.spec.name}</td><td>{winner.workload.name}</td><td>{short_plan(winner)}</td>" in page
    history = page[page.index("<h2>Search history") : page.index("<h2>Settings")]
    for task in TASKS:
        assert task.name in history
    failed = sum(trial.outcome.status is not Status.OK for _, trial in progress.trials)
    assert f'<td>wrong</td><td class="number">{failed}</td><td>row 3 is &lt;b&gt;4' in page
    assert WRONG not in page
    assert not re.findall(r"<(?:script|link|img|iframe|object)", page)
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', page))


def test_a_run_that_tried_nothing_has_a_page_too(tmp_path: Path) -> None:
    target, _ = replayed()
    path = tmp_path / "report.html"
    write_report(path, target, TuningProgress(Console(quiet=True), 1))
    assert '<tr><td colspan="6">none</td></tr>' in path.read_text()
