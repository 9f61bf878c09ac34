"""specattn-tune --replay: the whole tuner on recorded trials. No device, no compiler, and no pack is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from specattn_codegen import space
from specattn_codegen.cli.progress import TuningProgress, closing_table
from specattn_codegen.environment import Silicon
from specattn_codegen.errors import SpecError
from specattn_codegen.packs.pack import Entry
from specattn_codegen.processors import cpu_info, gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.tuning import record
from specattn_codegen.tuning.outcome import Status
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.search import Sampler, Search, Searched, Strategy
from specattn_codegen.tuning.tune_measured import tune_measured
from specattn_codegen.tuning.tune_session import Budget, Logbook, Target, Task
from specattn_codegen.tuning.workforce import Replay


def read_measured(path: Path) -> list[Record]:
    """Raises SpecError where there is nothing to replay."""
    trials = [trial for trial in record.read(path) if trial.stage == "measure" and trial.workload is not None]
    if not trials:
        raise SpecError(f"{path}: holds no measured trial; records lie in the cache folder, under records/")
    return trials


def arch_of(silicon: Silicon) -> Arch:
    """The processor of a record: a GPU's row, or a CPU with the record's facts and this one's rates."""
    if silicon.vendor != "cpu":
        return gpus.find(silicon.name)
    return cpu_info.like(silicon.target, silicon.num_sms, silicon.l2_bytes, silicon.cpu_model)


def replay(path: Path, budget: Budget, sampler: Sampler, screen: Console) -> None:
    """Searches what was recorded as if it were being measured now, and prints what would have won."""
    trials = read_measured(path)
    silicon = trials[-1].silicon
    own = [trial for trial in trials if trial.silicon == silicon]
    arch = arch_of(silicon)
    target = Target(
        arch=arch, backend=own[0].plan.backend, is_present=True, page_size=max(trial.page_size for trial in own)
    )
    tasks = list(dict.fromkeys(Task(spec=one.spec, workloads=(one.workload,)) for one in own if one.workload))
    progress = TuningProgress(screen, len(tasks))
    logbook = Logbook(target, None, own[-1].environment)

    def search_for(task: Task) -> Search:
        strategy = Strategy(sampler=sampler, trials=budget.trials, seed=budget.seed)
        return Search(recorded_space(task, own, target), seeds=(), strategy=strategy)

    def publish(winners: Sequence[Entry]) -> None:
        """A replay decides nothing."""

    with progress:
        tune_measured(tasks, target, budget, logbook, progress, publish, search_for, Replay(own))
    screen.print(closing_table(progress.winners))
    for task, winner in zip(tasks, progress.winners, strict=False):
        best = min((_median_us(one) for one in own if _is_of(one, task)), default=math.inf)
        regret = winner.latency_us / best - 1
        screen.print(f"{task.name}: {regret:.1%} above the best recorded plan", markup=False, soft_wrap=True)


def recorded_space(task: Task, trials: Sequence[Record], target: Target) -> Searched:
    """Today's axes, and of their plans those that were recorded; the default first, recorded or not."""
    plans = {trial.plan for trial in trials if _is_of(trial, task)}
    feasible = tuple(plan for plan in space.feasible(task.spec, target.arch, target.backend) if plan in plans)
    default = space.default_plan(task.spec, target.arch, target.backend)
    return Searched(axes=space.axes(task.spec, target.backend), default=default, feasible=feasible)


def _is_of(trial: Record, task: Task) -> bool:
    return trial.spec == task.spec and trial.workload in task.workloads


def _median_us(trial: Record) -> float:
    return trial.outcome.timings[0].median_us if trial.outcome.status is Status.OK else math.inf
