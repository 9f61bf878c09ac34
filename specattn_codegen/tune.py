"""Tune: from heads and a processor to a pack. Chooses between timing and modelling by whether the processor is here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specattn_codegen import pack
from specattn_codegen.pack import Entry
from specattn_codegen.search import Search
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tune_measured import tune_measured
from specattn_codegen.tune_modelled import tune_modelled
from specattn_codegen.tune_session import Budget, Listener, Logbook, Target, Task


def plan_tasks(kernels: Sequence[tuple[KernelSpec, tuple[Workload, ...]]], target: Target) -> list[Task]:
    """One search per kernel where sizes are modelled, as a compiled plan is ranked for all of them; one per kernel and
    size where they are timed."""
    if not target.is_present:
        return [Task(spec=spec, workloads=workloads) for spec, workloads in kernels]
    return [Task(spec=spec, workloads=(workload,)) for spec, workloads in kernels for workload in workloads]


def tune(tasks: Sequence[Task], target: Target, budget: Budget, listener: Listener, out: Path) -> None:
    """Tunes one HeadConfig and merges each task's winners into its pack under `out` as soon as they stand.

    Raises BuildError where the machine cannot build at all, PackError for a pack that must not be added to, OSError
    for a disk that takes no more. Ctrl-C passes through, with what was found so far in the pack.
    """
    (heads,) = {task.spec.heads for task in tasks}
    logbook = Logbook.open(target, heads)

    def publish(winners: Sequence[Entry]) -> None:
        if winners:
            pack.publish(out, target.arch, heads, winners)

    def search_for(task: Task) -> Search:
        return Search(task.spec, target.arch, target.backend, seeds=(), trials=budget.trials, seed=budget.seed)

    if target.is_present:
        tune_measured(tasks, target, budget, logbook, listener, publish, search_for)
    else:
        tune_modelled(tasks, target, budget, logbook, listener, publish)
