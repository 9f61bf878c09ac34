"""Kernels on GPUs that are not here: compiled for them, and what the cost model makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from specattn_bench import report
from specattn_bench.plans import Chosen, NotServedError, Plans, choose
from specattn_codegen import cost_model
from specattn_codegen.build.resources import Resources
from specattn_codegen.cost_model import Prediction
from specattn_codegen.processors import cpu_info
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning.jobs import CompileJob
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.worker import WorkerPool

COMPILE_SECONDS = 120.0
COMPILER = {"TRITON_INTERPRET": None}  # what the workers' environment must not have


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A kernel at a size. case and series say what it is called in the answer."""

    case: str
    series: str
    spec: KernelSpec
    workload: Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelled:
    """One kernel on one GPU at one size. refused says why there is no prediction, which is None exactly then."""

    arch: Arch
    wanted: Wanted
    chosen: Chosen | None = None
    resources: tuple[Resources, ...] = ()
    prediction: Prediction | None = None
    refused: str = ""


def model(wanted: Sequence[Wanted], archs: Sequence[Arch], plans: Plans) -> list[Modelled]:
    """Every kernel on every GPU. Raises SpecError for bad overrides."""
    for arch in archs:
        plans.require_known([one.spec for one in wanted], arch)
    chosen = [_chosen(one, arch, plans) for arch in archs for one in wanted]
    jobs = compile_jobs(chosen)
    outcomes: dict[CompileJob, Outcome] = {}
    with report.Bar(len(jobs)) as bar:
        bar.say("compiling")
        for job, outcome in compiled(jobs):
            outcomes[job] = outcome
            bar.advance()
    return [_predicted(one, outcomes) for one in chosen]


def _chosen(wanted: Wanted, arch: Arch, plans: Plans) -> Modelled:
    modelled = Modelled(arch=arch, wanted=wanted)
    try:
        chosen = choose(wanted.spec, wanted.workload, arch, plans)
    except NotServedError as error:
        return dataclasses.replace(modelled, refused=f"not served: {error}")
    return dataclasses.replace(modelled, chosen=chosen, resources=chosen.resources)


def compile_jobs(modelled: Sequence[Modelled]) -> list[CompileJob]:
    """What has to be compiled because no pack knows the resources of its binary; equal kernels once."""
    jobs = (_job(one) for one in modelled)
    return list(dict.fromkeys(job for job in jobs if job is not None))


def _job(modelled: Modelled) -> CompileJob | None:
    if modelled.chosen is None or modelled.resources:
        return None
    return CompileJob(spec=modelled.wanted.spec, plan=modelled.chosen.plan, arch=modelled.arch)


def compiled(jobs: Sequence[CompileJob]) -> Iterator[tuple[CompileJob, Outcome]]:
    """Each job and what became of it, as they finish, in processes of their own."""
    if not jobs:
        return
    size = min(cpu_info.core_count(), len(jobs))
    with WorkerPool[CompileJob](size=size, deadline_s=COMPILE_SECONDS, environment=COMPILER) as pool:
        yield from pool.run(jobs)


def _predicted(modelled: Modelled, outcomes: Mapping[CompileJob, Outcome]) -> Modelled:
    if modelled.chosen is None:
        return modelled
    resources, job = modelled.resources, _job(modelled)
    if job is not None:
        outcome = outcomes[job]
        if outcome.status is not Status.OK:
            return dataclasses.replace(modelled, refused=f"not served: {outcome.status.value}, {outcome.detail}")
        resources = outcome.resources
    prediction = cost_model.predict(
        modelled.wanted.spec, modelled.wanted.workload, modelled.chosen.plan, modelled.arch, resources
    )
    return dataclasses.replace(modelled, resources=resources, prediction=prediction)
