"""A tuning run without a compiler: for tests of what is done with the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from specattn_codegen.cost_model import guess_resources
from specattn_codegen.jobs import CompileJob
from specattn_codegen.outcome import Outcome, Status
from specattn_codegen.record import Stage
from specattn_codegen.workforce import TuningJob


@dataclass(frozen=True, slots=True)
class Imagined:
    """A pool whose binaries take what was guessed of them, but that they spill, and whose proofs all succeed."""

    spill_bytes: int = 0

    def __call__(self, stage: Stage) -> AbstractContextManager[Imagined]:  # noqa: ARG002
        return nullcontext(self)

    def start(self, jobs: Sequence[TuningJob]) -> None:
        """Nothing is begun early."""

    def run(self, jobs: Iterable[TuningJob]) -> Iterator[tuple[TuningJob, Outcome]]:
        for job in jobs:
            resources = guess_resources(job.spec, job.plan, job.arch) if isinstance(job, CompileJob) else ()
            spilling = tuple(dataclasses.replace(one, spill_bytes=self.spill_bytes) for one in resources)
            yield job, Outcome(status=Status.OK, worst_error=0.1, resources=spilling)
