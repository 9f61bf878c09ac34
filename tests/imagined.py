"""A tuning run without a compiler, and a fit without measurements: for tests of what is done with the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from specattn_codegen.cost_model import guess_resources
from specattn_codegen.cost_model.calibration import Agreement
from specattn_codegen.environment import silicon
from specattn_codegen.processors.arch import Arch
from specattn_codegen.tuning.jobs import CompileJob
from specattn_codegen.tuning.model_fit import ModelFit, model_digest
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Stage
from specattn_codegen.tuning.workforce import TuningJob


def imagined_fit(arch: Arch, factors: dict[str, float]) -> ModelFit:
    agreement = Agreement(cases=2, plans=8, rank_correlation=0.9, regret=0.1, error=0.2)
    return ModelFit(arch=silicon(arch), model=model_digest(), factors=factors, as_it_is=agreement, fitted=agreement)


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
