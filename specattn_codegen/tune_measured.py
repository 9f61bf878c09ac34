"""Tuning on the processor at hand: candidates are built, proved and timed; a winner beats the default beyond noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from specattn_codegen import space
from specattn_codegen.cost_model.floor import floor_us
from specattn_codegen.measure import beats
from specattn_codegen.outcome import Outcome, Status, Timing
from specattn_codegen.pack import Entry
from specattn_codegen.plan import Plan
from specattn_codegen.staleness import space_digest
from specattn_codegen.tune_session import (
    Budget,
    Listener,
    Logbook,
    Proposer,
    Target,
    Task,
    TuningJob,
    measure_job,
    measure_trial,
    require_default,
)
from specattn_codegen.worker import WorkerPool

CANDIDATE_SECONDS = 60.0  # to build, prove and time one candidate
TIMING_SECONDS = 0.5
FINALISTS = 3  # besides the default
FINAL_SECONDS = 1.0  # of timing for each finalist


def tune_measured(
    tasks: Sequence[Task],
    target: Target,
    budget: Budget,
    logbook: Logbook,
    listener: Listener,
    publish: Callable[[Sequence[Entry]], None],
    search_for: Callable[[Task], Proposer],
) -> None:
    """Publishes each task's winner as it is found. Ctrl-C publishes the best of the task it cuts short, and passes on.

    One worker at a time, since candidates that share the processor would time each other.
    """
    environment = {"TRITON_INTERPRET": None}
    with WorkerPool[TuningJob](size=1, deadline_s=CANDIDATE_SECONDS, environment=environment) as pool:
        for index, task in enumerate(tasks):
            if budget.is_spent:
                return
            share = budget.seconds_left / (len(tasks) - index)
            own = dataclasses.replace(budget, ends_at=budget.clock() + share) if math.isfinite(share) else budget
            timed: dict[Plan, Outcome] = {}
            try:
                _explore(task, search_for(task), target, own, logbook, listener, pool, timed)
                timed = _rematch(task, target, budget.seed, timed, pool) or timed
            finally:
                winners = _winners(task, target, timed, logbook)
                publish(winners)
                listener.task_done(task, winners)


def _explore(
    task: Task,
    search: Proposer,
    target: Target,
    budget: Budget,
    logbook: Logbook,
    listener: Listener,
    pool: WorkerPool[TuningJob],
    timed: dict[Plan, Outcome],
) -> None:
    """Fills `timed` with every plan that is right, the default first."""
    (workload,) = task.workloads
    default = space.default_plan(task.spec, target.arch, target.backend)
    listener.task_started(task, search.left)
    while plans := search.ask(1):
        trials = [
            measure_trial(task.spec, plan, workload, target, seed=budget.seed, seconds=TIMING_SECONDS) for plan in plans
        ]
        for trial in logbook.run(pool, trials):
            if trial.plan == default:
                require_default(trial)
            if trial.outcome.status is Status.OK:
                timed[trial.plan] = trial.outcome
            search.tell(trial.plan, _median_us(timed[trial.plan]) if trial.plan in timed else None)
            listener.trial_done(task, trial, min(map(_median_us, timed.values()), default=None))
        if budget.is_spent:
            return


def _median_us(outcome: Outcome) -> float:
    return outcome.timings[0].median_us


def _rematch(
    task: Task, target: Target, seed: int, timed: Mapping[Plan, Outcome], pool: WorkerPool[TuningJob]
) -> dict[Plan, Outcome]:
    """The default and the fastest few, timed again in turns: what was timed minutes apart is not comparable."""
    default = space.default_plan(task.spec, target.arch, target.backend)
    fastest = sorted((plan for plan in timed if plan != default), key=lambda plan: _median_us(timed[plan]))
    finalists = (*((default,) if default in timed else ()), *fastest[:FINALISTS])
    if len(finalists) < 2:
        return {}
    seconds = FINAL_SECONDS * len(finalists)
    job = measure_job(task.spec, finalists, task.workloads[0], target, seed=seed, seconds=seconds)
    ((_, outcome),) = pool.run([job])
    if outcome.status is not Status.OK:
        return {}
    return {
        plan: dataclasses.replace(timed[plan], timings=(timing,))
        for plan, timing in zip(finalists, outcome.timings, strict=True)
    }


def winner(default: Plan, timings: Mapping[Plan, Timing]) -> Plan:
    """The fastest plan if it beats the default by more than noise, else the default."""
    fastest = min(timings, key=lambda plan: (timings[plan].median_us, str(plan)))
    if default in timings and not beats(timings[fastest], timings[default]):
        return default
    return fastest


def _winners(task: Task, target: Target, timed: Mapping[Plan, Outcome], logbook: Logbook) -> list[Entry]:
    if not timed:
        return []
    (workload,) = task.workloads
    default = space.default_plan(task.spec, target.arch, target.backend)
    plan = winner(default, {plan: outcome.timings[0] for plan, outcome in timed.items()})
    timing = timed[plan].timings[0]
    return [
        Entry(
            spec=task.spec,
            workload=workload,
            plan=plan,
            chosen_by="measured",
            proved_by="device",
            latency_us=timing.median_us,
            noise_us=(timing.p80_us - timing.p20_us) / 2,
            share_of_ceiling=floor_us(task.spec, workload, target.arch) / timing.median_us,
            resources=timed[plan].resources,
            source_digest=logbook.source_digest(task.spec, plan),
            space_digest=space_digest(task.spec, plan.backend),
            environment=logbook.environment,
        )
    ]
