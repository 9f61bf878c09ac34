"""Tuning on the processor at hand: candidates are built, proved and timed; a winner beats the default beyond noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from specattn_codegen import space
from specattn_codegen.build.resources import footprint
from specattn_codegen.cost_model.floor import floor_us
from specattn_codegen.digest import canonical_json
from specattn_codegen.packs.pack import Entry
from specattn_codegen.packs.staleness import space_digest
from specattn_codegen.plan import Plan
from specattn_codegen.tuning import record
from specattn_codegen.tuning.jobs import BuildJob
from specattn_codegen.tuning.measure import beats
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.tune_session import (
    Budget,
    Listener,
    Logbook,
    Proposer,
    Target,
    Task,
    measure_job,
    measure_trial,
    require_default,
)
from specattn_codegen.tuning.workforce import Pool, TuningJob, Workforce

BATCH = 4  # plans proposed at a time, whatever the cores, so that a seed gives the same search everywhere
TIMING_SECONDS = 0.2  # of a candidate, which only has to show whether it may be among the fastest
FINALISTS = 3  # besides the default
FINAL_SECONDS = 0.5  # for each finalist; what so short a time leaves open, the default keeps


def tune_measured(
    tasks: Collection[Task],
    target: Target,
    budget: Budget,
    logbook: Logbook,
    listener: Listener,
    publish: Callable[[Sequence[Entry]], None],
    search_for: Callable[[Task], Proposer],
    workforce: Workforce,
) -> None:
    """Publishes each task's winner as it is found. Ctrl-C publishes the best of the task it cuts short, and passes on.

    Several workers build, one measures, since candidates that share the processor would time each other.
    """
    with workforce("compile") as builders, workforce("measure") as measurer:
        for index, task in enumerate(tasks):
            if budget.is_spent:
                return
            share = budget.seconds_left / (len(tasks) - index)
            own = dataclasses.replace(budget, ends_at=budget.clock() + share) if math.isfinite(share) else budget
            timed: dict[Plan, Outcome] = {}
            try:
                _explore(task, search_for(task), target, own, logbook, listener, builders, measurer, timed)
                timed = _rematch(task, target, budget.seed, timed, measurer) or timed
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
    builders: Pool,
    measurer: Pool,
    timed: dict[Plan, Outcome],
) -> None:
    """Fills `timed` with every plan that is right, the default first.

    On a GPU the next plans are built while the last ones are timed. On the CPU, where building would be timed too, they
    take turns.
    """
    defaults = [space.default_plan(task.spec, one.arch, one.backend) for one in target.each(task.spec)]
    listener.task_started(task, search.left)
    _listen(search, task, timed)
    plans = search.ask(BATCH)
    builders.start(_build_jobs(task, plans, target))
    while plans:
        for _ in builders.run(()):  # waits for their binaries
            pass
        following = search.ask(BATCH) if target.arch.is_gpu else []
        builders.start(_build_jobs(task, following, target))
        for plan in plans:
            trial = _time(task, plan, target, budget, logbook, measurer)
            if plan in defaults:
                require_default(trial)
            if trial.outcome.status is Status.OK:
                timed[plan] = trial.outcome
            value = _median_us(timed[plan]) if plan in timed else None
            search.tell(plan, value, canonical_json(trial))
            listener.trial_done(task, trial, min(map(_median_us, timed.values()), default=None))
            if budget.is_spent:
                break
        _listen(search, task, timed)
        if budget.is_spent:
            break
        if not following:
            following = search.ask(BATCH)
            builders.start(_build_jobs(task, following, target))
        plans = following
    search.close()


def _time(task: Task, plan: Plan, target: Target, budget: Budget, logbook: Logbook, measurer: Pool) -> Record:
    (workload,) = task.workloads
    trial = measure_trial(task.spec, plan, workload, target, seed=budget.seed, seconds=TIMING_SECONDS)
    (done,) = logbook.run(measurer, [trial])
    return done


def _listen(search: Proposer, task: Task, timed: dict[Plan, Outcome]) -> None:
    """What others have timed who share the search."""
    for trial in record.decode(search.heard()):
        if trial.stage == "measure" and trial.outcome.status is Status.OK and trial.spec == task.spec:
            timed.setdefault(trial.plan, trial.outcome)


def _build_jobs(task: Task, plans: Sequence[Plan], target: Target) -> list[TuningJob]:
    """Leave the plans' binaries in the cache. One that does not build is left to fail in its trial."""
    return [BuildJob(spec=task.spec, plan=plan, arch=target.arch) for plan in plans]


def _median_us(outcome: Outcome) -> float:
    return outcome.timings[0].median_us


def _rematch(task: Task, target: Target, seed: int, timed: Mapping[Plan, Outcome], pool: Pool) -> dict[Plan, Outcome]:
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


def noise_floor(timed: Mapping[Plan, Outcome]) -> float:
    """Of a run: the most by which a kernel differed from itself."""
    return max(outcome.timings[0].noise_floor for outcome in timed.values())


def winner(default: Plan, timed: Mapping[Plan, Outcome]) -> Plan:
    """The default, unless the fastest plan beats it beyond noise. Then, of the plans that beat it as well and are not
    beaten by the fastest, the one that takes least of the processor and of memory, or comes first by its name."""
    floor = noise_floor(timed)

    def is_beaten(plan: Plan, by: Plan) -> bool:
        return beats(timed[by].timings[0], timed[plan].timings[0], noise_floor=floor)

    def preference(plan: Plan) -> tuple[tuple[int, int], int, str]:
        return footprint(timed[plan].resources), timed[plan].workspace_bytes, str(plan)

    fastest = min(timed, key=lambda plan: (_median_us(timed[plan]), str(plan)))
    if default in timed and not is_beaten(default, by=fastest):
        return default
    equals = [plan for plan in timed if not is_beaten(plan, by=fastest)]
    return min((plan for plan in equals if default not in timed or is_beaten(default, by=plan)), key=preference)


def _winners(task: Task, target: Target, timed: Mapping[Plan, Outcome], logbook: Logbook) -> list[Entry]:
    if not timed:
        return []
    (workload,) = task.workloads
    default = space.default_plan(task.spec, target.arch, target.backend)
    plan = winner(default, timed)
    timing = timed[plan].timings[0]
    return [
        Entry(
            spec=task.spec,
            workload=workload,
            plan=plan,
            chosen_by="measured",
            proved_by="device",
            latency_us=timing.median_us,
            noise_us=max((timing.p80_us - timing.p20_us) / 2, noise_floor(timed) * timing.median_us),
            share_of_ceiling=floor_us(task.spec, workload, target.arch) / timing.median_us,
            resources=timed[plan].resources,
            source_digest=logbook.source_digest(task.spec, plan),
            space_digest=space_digest(task.spec, plan.backend),
            policy=target.policy,
            environment=logbook.environment_of(plan),
        )
    ]
