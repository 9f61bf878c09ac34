"""Tune: from heads and a processor to a pack. Chooses between timing and modelling by whether the processor is here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.storages import BaseStorage

from specattn_codegen import environment, paths, space
from specattn_codegen.digest import digest
from specattn_codegen.packs.staleness import space_digest
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import seeds
from specattn_codegen.tuning.by_backend import ByBackend
from specattn_codegen.tuning.claims import SEARCHES, Claims
from specattn_codegen.tuning.jobs import render_for
from specattn_codegen.tuning.outbox import require_saved
from specattn_codegen.tuning.search import Sampler, Search, Strategy, space_of
from specattn_codegen.tuning.shared_study import Share, errors_of, worker_name
from specattn_codegen.tuning.tune_measured import tune_measured
from specattn_codegen.tuning.tune_modelled import tune_modelled
from specattn_codegen.tuning.tune_session import Budget, Listener, Logbook, Target, Task, winners_of
from specattn_codegen.tuning.workforce import Workforce, processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How plans are searched and who works. storage: of studies that other processes search as well."""

    sampler: Sampler = "tpe"
    storage: BaseStorage | None = None
    workforce: Workforce = processes


USUAL = Method()


def plan_tasks(kernels: Sequence[tuple[KernelSpec, tuple[Workload, ...]]], target: Target) -> list[Task]:
    """One search per kernel where sizes are modelled, as a compiled plan is ranked for all of them; one per kernel and
    size where they are timed."""
    if not target.is_present:
        return [Task(spec=spec, workloads=workloads) for spec, workloads in kernels]
    return [Task(spec=spec, workloads=(workload,)) for spec, workloads in kernels for workload in workloads]


def study_name(task: Task, target: Target) -> str:
    """Equal for searches whose values compare: the same silicon, kernel, sizes, space, templates and measurement, or
    cost model."""
    spec, arch = task.spec, target.arch
    default = space.default_plan(spec, arch, target.backend)
    source = render_for(spec, default, arch).digest
    axes = space_digest(spec, target.backend)
    silicon, fit = environment.silicon(arch), "" if target.is_present else environment.fit_digest(arch)
    identity = digest(silicon, fit, spec, task.workloads, axes, source, target.page_size, target.policy)
    return f"{arch.name} {spec.heads.name} {task.name} {identity}"


@dataclass(slots=True)
class InTurn(Collection[Task]):
    """Tasks in the order in which one worker of several takes them: what nobody is at first, then what others are at,
    then what is done, of which it only hears."""

    tasks: Sequence[Task]
    name: Callable[[Task], str]
    claims: Claims
    searches: dict[Task, ByBackend]

    def __len__(self) -> int:
        return len(self.tasks)

    def __contains__(self, task: object) -> bool:
        return task in self.tasks

    def __iter__(self) -> Iterator[Task]:
        waiting = {self.name(task): task for task in self.tasks}
        while waiting:
            task = waiting.pop(self.claims.take(list(waiting)))
            yield task
            self.claims.release(done=self.searches[task].left <= 0)


def tune(
    tasks: Sequence[Task], target: Target, budget: Budget, listener: Listener, out: Path, method: Method = USUAL
) -> None:
    """Tunes one HeadConfig and merges each task's winners into its pack under `out` as soon as they stand.

    Where the disk takes no more records or winners the run goes on in memory, and raises UnsavedError with all of them
    at its end. Raises BuildError where the machine cannot build at all, PackError for a pack that must not be added to.
    Ctrl-C passes through, with what was found so far in the pack.
    """
    (heads,) = {task.spec.heads for task in tasks}
    logbook = Logbook.open(target, heads)
    winners = winners_of(out, target, heads)
    storage, worker, searches = method.storage, worker_name(), dict[Task, ByBackend]()
    claims = None if storage is None else Claims(storage, SEARCHES, worker)

    def search_in(task: Task, one: Target) -> Search:
        share = None
        if storage is not None:
            share = Share(storage=storage, name=study_name(task, one), worker=worker)
        strategy = Strategy(sampler=method.sampler, trials=budget.trials, seed=budget.seed, share=share)
        found = seeds.seeds_for(task, one, (out, *paths.pack_layers()))
        return Search(space_of(task.spec, one.arch, one.backend), seeds=found, strategy=strategy)

    def search_for(task: Task) -> ByBackend:
        searches[task] = ByBackend({one.backend: search_in(task, one) for one in target.each(task.spec)})
        return searches[task]

    strategy = tune_measured if target.is_present else tune_modelled
    turns = tasks if claims is None else InTurn(tasks, lambda task: study_name(task, target), claims, searches)
    try:
        strategy(turns, target, budget, logbook, listener, winners.send, search_for, method.workforce)
    finally:
        if claims is not None and storage is not None:
            with contextlib.suppress(*errors_of(storage)):  # a claim ends with its process at the latest
                claims.release(done=False)
        require_saved(logbook.records, winners)
