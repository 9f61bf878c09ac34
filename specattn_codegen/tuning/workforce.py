"""Who does a tuning run's work: worker processes by stage, or a replay of what was recorded. Knows no search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning.jobs import BuildJob, CompileJob, InterpretJob, MeasureJob, interpreted_twin
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Record, Stage
from specattn_codegen.tuning.worker import WorkerPool

TuningJob = BuildJob | CompileJob | InterpretJob | MeasureJob

# To build, prove and time one candidate; to compile one; to prove one in the interpreter. The last two take 10 seconds
# of a core, and are left to run at low priority on machines that others use.
DEADLINES_S: dict[Stage, float] = {"measure": 60.0, "compile": 300.0, "interpret": 300.0}


class Pool(Protocol):
    """Does jobs."""

    def start(self, jobs: Sequence[TuningJob]) -> None:
        """Begins as many as there are workers for and comes back at once; they are among what the next run yields."""
        ...

    def run(self, jobs: Iterable[TuningJob]) -> Iterator[tuple[TuningJob, Outcome]]:
        """Yields (job, outcome) as jobs finish. A job is taken only when there is someone free for it."""
        ...


Workforce = Callable[[Stage], AbstractContextManager[Pool]]


def processes(stage: Stage, size: int | None = None) -> WorkerPool[TuningJob]:
    """One worker to measure, since candidates that share the processor would time each other; else `size`, or one a
    core. Where it measures on the CPU, each of its threads stays on a core of its own."""
    environment = {
        "measure": {"TRITON_INTERPRET": None, "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"},
        "compile": {"TRITON_INTERPRET": None},
        "interpret": {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    }
    workers = 1 if stage == "measure" else size or cpu_info.core_count()
    return WorkerPool(size=workers, deadline_s=DEADLINES_S[stage], environment=environment[stage])


@contextlib.contextmanager
def lasting(size: int | None = None) -> Iterator[Workforce]:
    """As `processes`, but its pools stay for many runs, as a worker takes seconds to import what it needs."""
    pools: dict[Stage, Pool] = {}
    with contextlib.ExitStack() as stack:

        def pool(stage: Stage) -> AbstractContextManager[Pool]:
            if stage not in pools:
                pools[stage] = stack.enter_context(processes(stage, size))
            return contextlib.nullcontext(pools[stage])

        yield pool


_Key = tuple[Stage, KernelSpec, Workload | None, Plan]


class Replay:
    """A pool that answers from records: the whole tuner without a device, a compiler or a second's wait.

    What was never recorded is answered as INVALID. Of several records of one trial the last counts.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._outcomes: dict[_Key, Outcome] = {
            (one.stage, one.spec, one.workload, one.plan): one.outcome for one in records
        }

    def __call__(self, stage: Stage) -> AbstractContextManager[Replay]:  # noqa: ARG002 - a Workforce
        return contextlib.nullcontext(self)

    def start(self, jobs: Sequence[TuningJob]) -> None:
        """Nothing needs time here, and nobody asks for the outcome of a build."""

    def run(self, jobs: Iterable[TuningJob]) -> Iterator[tuple[TuningJob, Outcome]]:
        for job in jobs:
            yield job, self._outcome(job)

    def _outcome(self, job: TuningJob) -> Outcome:
        match job:
            case BuildJob():
                return Outcome(status=Status.OK)
            case CompileJob():
                return self._find("compile", job.spec, None, job.plan)
            case InterpretJob():
                return self._find("interpret", interpreted_twin(job.spec), job.workload, job.plan)
            case MeasureJob():
                return self._measured(job)

    def _measured(self, job: MeasureJob) -> Outcome:
        outcomes = [self._find("measure", job.spec, job.workload, plan) for plan in job.plans]
        failed = next((outcome for outcome in outcomes if outcome.status is not Status.OK), None)
        return failed or Outcome(
            status=Status.OK,
            worst_error=max(outcome.worst_error or 0.0 for outcome in outcomes),
            timings=tuple(timing for outcome in outcomes for timing in outcome.timings),
            resources=outcomes[-1].resources,
            workspace_bytes=outcomes[-1].workspace_bytes,
            conditions=outcomes[-1].conditions,
        )

    def _find(self, stage: Stage, spec: KernelSpec, workload: Workload | None, plan: Plan) -> Outcome:
        known = self._outcomes.get((stage, spec, workload, plan))
        return known or Outcome(status=Status.INVALID, detail="not among the records that are replayed")
