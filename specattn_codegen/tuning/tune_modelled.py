"""Tuning for a GPU that is absent: cross-compile, rank by the cost model, prove the winners in the interpreter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence, Set

from specattn_codegen import cost_model, space
from specattn_codegen.build.resources import Resources, footprint
from specattn_codegen.digest import canonical_json
from specattn_codegen.packs.pack import Entry
from specattn_codegen.packs.staleness import space_digest
from specattn_codegen.plan import Plan
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import record
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.shortlist import guessed_us
from specattn_codegen.tuning.tune_session import (
    Budget,
    Listener,
    Logbook,
    Proposer,
    Target,
    Task,
    Trial,
    compile_trial,
    interpret_trial,
    require_default,
)
from specattn_codegen.tuning.workforce import Pool, Workforce

BATCH = 2  # plans proposed at a time, whatever the cores, so that a seed gives the same search everywhere
SEARCH_SHARE = 0.6  # of a task's time; the rest is for proofs
# Without a GPU only Triton's kernels are proved; others are compiled, ranked and recorded, and no pack takes them.
INTERPRETED = ("triton",)
# Predictions this close count as equal: the plan that takes less of the processor wins, and the default stays.
MODEL_ERROR = 0.02


def tune_modelled(
    tasks: Collection[Task],
    target: Target,
    budget: Budget,
    logbook: Logbook,
    listener: Listener,
    publish: Callable[[Sequence[Entry]], None],
    search_for: Callable[[Task], Proposer],
    workforce: Workforce,
) -> None:
    """Publishes each task's winners as soon as they are proved; a task cut short publishes what is proved by then."""
    with workforce("compile") as compilers, workforce("interpret") as interpreters:
        for index, task in enumerate(tasks):
            if budget.is_spent:
                return
            share = budget.seconds_left / (len(tasks) - index)
            search_budget = budget
            if math.isfinite(share):
                search_budget = dataclasses.replace(budget, ends_at=budget.clock() + SEARCH_SHARE * share)
            compiled: dict[Plan, tuple[Resources, ...]] = {}
            proved: dict[Plan, Record] = {}
            winners: list[Entry] = []
            try:
                compiled = _compile(task, search_for(task), target, search_budget, logbook, listener, compilers)
                prove_winners(task, compiled, proved, target, budget, logbook, listener, interpreters)
            finally:  # Ctrl-C and the end of the time keep what is proved by then
                winners = proved_entries(task, compiled, proved, target, logbook)
                publish(winners)
            listener.task_done(task, winners)


def _compile(
    task: Task,
    search: Proposer,
    target: Target,
    budget: Budget,
    logbook: Logbook,
    listener: Listener,
    pool: Pool,
) -> dict[Plan, tuple[Resources, ...]]:
    """Resources of every plan that compiles and fits, the default first."""
    spec, arch = task.spec, target.arch

    def predict(trial: Trial, outcome: Outcome) -> Mapping[str, float]:
        if outcome.status is not Status.OK:
            return {}
        return {
            workload.name: cost_model.latency_us(spec, workload, trial.plan, arch, outcome.resources)
            for workload in task.workloads
        }

    listener.task_started(task, search.left)
    compiled: dict[Plan, tuple[Resources, ...]] = {}
    tried: set[Plan] = set()
    best: float | None = None
    _listen(search, compiled)
    while not _is_settled(task, tried | compiled.keys(), compiled, target) and (plans := search.ask(BATCH)):
        tried.update(plans)
        for trial in logbook.run(pool, [compile_trial(spec, plan, target) for plan in plans], predict):
            if trial.plan == space.default_plan(spec, arch, trial.plan.backend):
                require_default(trial)
            value: float | None = None
            if trial.outcome.status is Status.OK:
                compiled[trial.plan] = trial.outcome.resources
                value = _typical_us(task, trial.plan, target, trial.outcome.resources)
                best = value if best is None else min(best, value)
            search.tell(trial.plan, value, canonical_json(trial))
            listener.trial_done(task, trial, best)
        _listen(search, compiled)
        if budget.is_spent:
            break
    search.close()
    return compiled


def _listen(search: Proposer, compiled: dict[Plan, tuple[Resources, ...]]) -> None:
    """What others have compiled who share the search."""
    for trial in record.decode(search.heard()):
        if trial.stage == "compile" and trial.outcome.status is Status.OK:
            compiled[trial.plan] = trial.outcome.resources


def _is_settled(task: Task, tried: Set[Plan], compiled: Mapping[Plan, tuple[Resources, ...]], target: Target) -> bool:
    """Whether at no size a plan that was not tried is guessed to be faster than the best that was compiled, for each
    backend on its own, as what one has may not be what a pack can take."""
    by_backend = {
        one: {plan: taken for plan, taken in compiled.items() if plan.backend == one.backend}
        for one in target.each(task.spec)
    }
    return all(_backend_is_settled(task, tried, theirs, one) for one, theirs in by_backend.items())


def _backend_is_settled(
    task: Task, tried: Set[Plan], compiled: Mapping[Plan, tuple[Resources, ...]], target: Target
) -> bool:
    if not compiled or not cost_model.covers(task.spec, target.backend):
        return False
    for workload in task.workloads:
        best = min(_predicted_us(task.spec, workload, plan, target, taken) for plan, taken in compiled.items())
        guesses = guessed_us(task.spec, workload, target.arch, target.backend)
        hope = next((time for plan, time in guesses.items() if plan not in tried), math.inf)
        if hope * (1 + MODEL_ERROR) < best:
            return False
    return True


def _predicted_us(
    spec: KernelSpec, workload: Workload, plan: Plan, target: Target, resources: tuple[Resources, ...]
) -> float:
    return cost_model.latency_us(spec, workload, plan, target.arch, resources)


def _typical_us(task: Task, plan: Plan, target: Target, resources: tuple[Resources, ...]) -> float:
    """Geometric mean over the workloads, so that each counts by ratio."""
    times = [_predicted_us(task.spec, workload, plan, target, resources) for workload in task.workloads]
    return math.exp(sum(map(math.log, times)) / len(times))


def choose(
    task: Task, workload: Workload, compiled: Mapping[Plan, tuple[Resources, ...]], target: Target
) -> Plan | None:
    """The best predicted plan. Among equals within MODEL_ERROR the default; else the one that is best over all of the
    task's workloads, so that few binaries serve many sizes; else the one that takes least."""
    if not compiled:
        return None
    times = {plan: _predicted_us(task.spec, workload, plan, target, taken) for plan, taken in compiled.items()}
    equals = [plan for plan, time in times.items() if time <= min(times.values()) * (1 + MODEL_ERROR)]
    default = space.default_plan(task.spec, target.arch, target.backend)
    if default in equals:
        return default

    def preference(plan: Plan) -> tuple[float, tuple[int, int], str]:
        return _typical_us(task, plan, target, compiled[plan]), footprint(compiled[plan]), str(plan)

    return min(equals, key=preference)


def prove_winners(
    task: Task,
    compiled: Mapping[Plan, tuple[Resources, ...]],
    proved: dict[Plan, Record],
    target: Target,
    budget: Budget,
    logbook: Logbook,
    listener: Listener,
    pool: Pool,
) -> None:
    """A winner that fails its proof is dropped and the next best takes its place, until all stand or time ends."""
    standing = {plan: taken for plan, taken in compiled.items() if plan.backend in INTERPRETED}
    while not budget.is_spent:
        winners = {workload: choose(task, workload, standing, target) for workload in task.workloads}
        unproved = {plan: workload for workload, plan in winners.items() if plan and plan not in proved}
        if not unproved:
            return
        listener.proving(task, len(unproved))
        proofs = [
            interpret_trial(task.spec, plan, workload, target, budget.seed) for plan, workload in unproved.items()
        ]
        for proof in logbook.run(pool, proofs):
            if proof.outcome.status is Status.OK:
                proved[proof.plan] = proof
            else:
                del standing[proof.plan]


def proved_entries(
    task: Task,
    compiled: Mapping[Plan, tuple[Resources, ...]],
    proved: Mapping[Plan, Record],
    target: Target,
    logbook: Logbook,
) -> list[Entry]:
    """The best proved plan of each workload."""
    believed = {plan: compiled[plan] for plan in proved}
    winners = {workload: choose(task, workload, believed, target) for workload in task.workloads}
    return [
        _entry(task.spec, workload, plan, compiled[plan], proved[plan], target, logbook)
        for workload, plan in winners.items()
        if plan is not None
    ]


def _entry(
    spec: KernelSpec,
    workload: Workload,
    plan: Plan,
    resources: tuple[Resources, ...],
    proof: Record,
    target: Target,
    logbook: Logbook,
) -> Entry:
    prediction = cost_model.predict(spec, workload, plan, target.arch, resources)
    return Entry(
        spec=spec,
        workload=workload,
        plan=plan,
        chosen_by="modelled",
        proved_by="interpreter" if proof.spec == spec else "interpreter-float16-twin",
        latency_us=prediction.latency_us,
        noise_us=0.0,
        share_of_ceiling=prediction.share_of_ceiling,
        resources=resources,
        source_digest=logbook.source_digest(spec, plan),
        space_digest=space_digest(spec, plan.backend),
        environment=logbook.environment_of(plan),
    )
