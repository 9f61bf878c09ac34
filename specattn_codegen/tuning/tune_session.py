"""What a tuning run shares: tasks, target, budget, listener, and a logbook in which no trial is run twice."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from specattn_codegen import environment, space
from specattn_codegen.digest import digest
from specattn_codegen.environment import Environment
from specattn_codegen.errors import BuildError, SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.plan import Backend, Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import record
from specattn_codegen.tuning.jobs import CompileJob, InterpretJob, MeasureJob, interpreted_twin, render_for
from specattn_codegen.tuning.measure import Mode, policy
from specattn_codegen.tuning.outbox import Outbox
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Identity, Record, Stage
from specattn_codegen.tuning.workforce import Pool, TuningJob

OFFENCES = 2  # after which a binary is not run again: a machine under load may kill or stall a worker once


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One search: a kernel and the sizes its winners are for."""

    spec: KernelSpec
    workloads: tuple[Workload, ...]

    @property
    def name(self) -> str:
        only = f" {self.workloads[0].name}" if len(self.workloads) == 1 else ""
        return f"{self.spec.name}{only}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is tuned for.

    backend     whose default plan comes first
    is_present  the processor is here, so that its kernels are timed rather than modelled
    mode        how they are launched then
    further     backends that are searched beside it, where they serve a kernel
    """

    arch: Arch
    backend: Backend
    is_present: bool
    page_size: int
    mode: Mode = "eager"
    further: tuple[Backend, ...] = ()

    def __post_init__(self) -> None:
        if self.mode == "graph" and not self.arch.is_gpu:
            raise SpecError(f"--timing graph: {self.arch.name} has no CUDA graphs; use eager")

    @property
    def policy(self) -> str:
        return policy(self.mode)

    @property
    def backends(self) -> tuple[Backend, ...]:
        return self.backend, *self.further

    def each(self, spec: KernelSpec) -> tuple[Target, ...]:
        """The same with one backend alone, for every one that serves a kernel; the first is not asked whether."""
        served = (self.backend, *(one for one in self.further if space.why_unserved(spec, self.arch, one) is None))
        return tuple(dataclasses.replace(self, backend=backend, further=()) for backend in served)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """trials per task; ends_at on `clock`, for everything."""

    trials: int
    seed: int
    ends_at: float | None = None
    clock: Callable[[], float] = time.monotonic

    @property
    def seconds_left(self) -> float:
        return float("inf") if self.ends_at is None else max(0.0, self.ends_at - self.clock())

    @property
    def is_spent(self) -> bool:
        return self.seconds_left <= 0


class Proposer(Protocol):
    """What to try next; proposes each plan at most once."""

    @property
    def left(self) -> int:
        """Plans that may still be proposed."""
        ...

    def ask(self, count: int) -> list[Plan]:
        """Up to `count` plans to try next; none when there is nothing left to try."""
        ...

    def tell(self, plan: Plan, value: float | None, note: str = "") -> None:
        """What trying a plan gave, smaller being better; None for one that failed. note: for those who share it."""
        ...

    def heard(self) -> list[str]:
        """What others who share the search have noted since the last time this was asked."""
        ...

    def close(self) -> None:
        """Gives back what was asked for and not tried."""
        ...


class Listener(Protocol):
    """Told what happens, for people to watch; decides nothing."""

    def task_started(self, task: Task, trials: int) -> None: ...

    def trial_done(self, task: Task, trial: Record, best_us: float | None) -> None: ...

    def proving(self, task: Task, count: int) -> None: ...

    def task_done(self, task: Task, winners: Sequence[Entry]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A job and what its record will say of it."""

    stage: Stage
    spec: KernelSpec
    workload: Workload | None
    plan: Plan
    job: TuningJob


def compile_trial(spec: KernelSpec, plan: Plan, target: Target) -> Trial:
    job = CompileJob(spec=spec, plan=plan, arch=target.arch)
    return Trial(stage="compile", spec=spec, workload=None, plan=plan, job=job)


def interpret_trial(spec: KernelSpec, plan: Plan, workload: Workload, target: Target, seed: int) -> Trial:
    job = InterpretJob(spec=spec, plan=plan, arch=target.arch, workload=workload, seed=seed)
    return Trial(stage="interpret", spec=interpreted_twin(spec), workload=workload, plan=plan, job=job)


def measure_trial(
    spec: KernelSpec, plan: Plan, workload: Workload, target: Target, *, seed: int, seconds: float
) -> Trial:
    job = measure_job(spec, (plan,), workload, target, seed=seed, seconds=seconds)
    return Trial(stage="measure", spec=spec, workload=workload, plan=plan, job=job)


def measure_job(
    spec: KernelSpec, plans: tuple[Plan, ...], workload: Workload, target: Target, *, seed: int, seconds: float
) -> MeasureJob:
    return MeasureJob(
        spec=spec,
        plans=plans,
        arch=target.arch,
        workload=workload,
        page_size=target.page_size,
        seed=seed,
        seconds=seconds,
        mode=target.mode,
    )


@dataclass(slots=True)
class Logbook:
    """Trials of one HeadConfig on one processor: what is recorded already is not run again.

    records  on their way to `path`
    """

    target: Target
    path: Path | None  # None where nothing is written
    environment: Environment
    known: dict[Identity, Record] = field(default_factory=dict)
    offences: Counter[tuple[str, str, str] | None] = field(default_factory=Counter)
    records: Outbox[Record] = field(init=False)

    def __post_init__(self) -> None:
        self.records = Outbox(self.path, self._append, Record.summary)

    def _append(self, trial: Record) -> None:
        if self.path is not None:
            record.append(self.path, trial)

    @classmethod
    def open(cls, target: Target, heads: HeadConfig, path: Path | None = None) -> Logbook:
        """Of the trials in `path`, or in the cache's file for these heads."""
        path = path or record.records_path(target.arch, heads)
        device = environment.device_name(target.arch) if target.is_present else None
        fit = "" if target.is_present else environment.fit_digest(target.arch)
        book = cls(target, path, environment.current(target.backend, device, fit))
        for trial in record.read(path):
            book._keep(trial)
        return book

    def _keep(self, trial: Record) -> None:
        if trial.is_settled:
            self.known[trial.identity] = trial
        self.offences[trial.offence] += 1

    def _why_quarantined(self, blank: Record) -> str | None:
        """Why a binary is not run again: it has ended its worker before, whatever size and split it was at."""
        times = self.offences[blank.source_digest, digest(blank.silicon), blank.environment.compiler]
        if times < OFFENCES:
            return None
        return f"quarantined: its binary {blank.source_digest} has killed, hung or poisoned {times} workers"

    def run(
        self,
        pool: Pool,
        trials: Sequence[Trial],
        predict: Callable[[Trial, Outcome], Mapping[str, float]] | None = None,
    ) -> list[Record]:
        """The records of `trials`, in their order. Those that have to run are appended to the file as they finish, or
        wait for a disk that takes them."""
        blanks = [self.blank(trial) for trial in trials]
        fresh: dict[Identity, Record] = {}
        waiting: dict[TuningJob, tuple[Trial, Record]] = {}
        for trial, blank in zip(trials, blanks, strict=True):
            reason = self._why_quarantined(blank)
            if blank.identity in self.known:
                continue
            if reason is None:
                waiting[trial.job] = (trial, blank)
            else:
                outcome = Outcome(status=Status.RUNTIME, detail=reason)
                fresh[blank.identity] = dataclasses.replace(blank, outcome=outcome)
        for job, outcome in pool.run(list(waiting)):
            trial, blank = waiting[job]
            predicted_us = predict(trial, outcome) if predict else {}
            finished = dataclasses.replace(blank, outcome=outcome, predicted_us=predicted_us)
            self.records.send([finished])
            fresh[finished.identity] = finished
            self._keep(finished)
        return [fresh.get(blank.identity) or self.known[blank.identity] for blank in blanks]

    def source_digest(self, spec: KernelSpec, plan: Plan) -> str:
        return render_for(spec, plan, self.target.arch).digest

    def environment_of(self, plan: Plan) -> Environment:
        """Raises BuildError where the plan's backend is not installed."""
        if plan.backend == self.target.backend:
            return self.environment
        return dataclasses.replace(self.environment, compiler=environment.compiler_version(plan.backend))

    def blank(self, trial: Trial) -> Record:
        """What a trial's record will say of it, before its outcome is known."""
        return Record(
            stage=trial.stage,
            spec=trial.spec,
            workload=trial.workload,
            plan=trial.plan,
            source_digest=self.source_digest(trial.spec, trial.plan),
            silicon=environment.silicon(self.target.arch),
            environment=self.environment_of(trial.plan),
            page_size=self.target.page_size if trial.stage == "measure" else 0,
            policy=self.target.policy if trial.stage == "measure" else "",
            outcome=Outcome(status=Status.INVALID, detail="not tried"),
        )


def winners_of(root: Path, target: Target, heads: HeadConfig) -> Outbox[Entry]:
    """Winners on their way to the pack of these heads under `root`."""
    path = pack.pack_path(root, target.arch, heads)
    return Outbox(path, lambda winner: pack.publish(root, target.arch, heads, [winner]), Entry.summary)


def require_default(trial: Record) -> None:
    """The default plan is made to build everywhere, so when it does not, the machine is at fault, not the plan."""
    if trial.outcome.status is Status.COMPILE:
        raise BuildError(trial.outcome.detail)
