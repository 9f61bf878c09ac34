"""What workers do: compile for an absent GPU, prove in the interpreter, or build, prove and time on the device."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from dataclasses import dataclass

import torch

from specattn_codegen import build, cost_model, environment, paths
from specattn_codegen.build.cubin import CudaError
from specattn_codegen.build.program import whole_program
from specattn_codegen.build.resources import Resources
from specattn_codegen.build.store import remembered
from specattn_codegen.digest import digest
from specattn_codegen.kernel import Call, Kernel
from specattn_codegen.plan import Backend, Plan
from specattn_codegen.processors import conditions
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof.prove import ON_DEVICE, Extent, premises, prove
from specattn_codegen.render import Source, render
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning.measure import Mode, device_of, rotating, time_interleaved, timed_calls, timer_for
from specattn_codegen.tuning.outcome import POISONED, Outcome, Status

CROSS_COMPILERS = {
    "triton": "specattn_codegen.build.cross_compile",
    "tilelang": "specattn_codegen.build.tilelang_compile",
}
# The interpreter takes milliseconds a block, so a proof in it is in parts, each small where the others are large.
INTERPRETED_SELECTION = Extent(keys=300, ragged=130, rows=1)
ALL_HEADS = Extent(keys=0, ragged=40, rows=2, requests=2)  # further requests are as those of one head
SEVERAL_ROW_TILES = 64  # packed rows: query rows times the heads of a group
SEVERAL_SPLITS = Extent(keys=600, ragged=0, rows=4)
ONE_TILE_HEADS = 4  # with SEVERAL_SPLITS' rows no more than the smallest tile, so that blocks are left to split keys


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """Compiles one plan for a GPU that need not be here and reads what its binary takes."""

    spec: KernelSpec
    plan: Plan
    arch: Arch

    def run(self) -> Outcome:
        # A GPU's compiler is imported here, so that a CPU user never pays for it.
        compiler = importlib.import_module(CROSS_COMPILERS[self.plan.backend])
        resources = compiler.cross_compile(render_for(self.spec, self.plan, self.arch), self.arch)
        reason = cost_model.why_unfit(resources, self.arch)
        status = Status.OK if reason is None else Status.INVALID
        return Outcome(status=status, detail=reason or "", resources=resources)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildJob:
    """Builds one plan for the processor at hand, which leaves its binary in the cache for whoever times it."""

    spec: KernelSpec
    plan: Plan
    arch: Arch

    def run(self) -> Outcome:
        build.load(render_for(self.spec, self.plan, self.arch))
        return Outcome(status=Status.OK)


@dataclass(frozen=True, slots=True, kw_only=True)
class InterpretJob:
    """Proves one plan in Triton's interpreter. Its worker must be born with TRITON_INTERPRET=1.

    The interpreter's bfloat16 product is wrong, so a bfloat16 kernel is proved by its twin: the same plan rendered for
    float16. Verdicts are kept by the kernel's text and all they depend on, which no GPU is among: what is proved for
    one need not be for the next.
    """

    spec: KernelSpec
    plan: Plan
    arch: Arch
    workload: Workload
    seed: int

    def run(self) -> Outcome:
        spec = interpreted_twin(self.spec)
        worst = 0.0
        for proved, extent in self.proofs(spec, self.plan):
            try:
                outcome = self._remembered(proved, extent)
            except launch_errors("triton") as error:
                return failed_launch(error)
            if outcome.status is not Status.OK:
                return outcome
            worst = max(worst, outcome.worst_error or 0.0)
        return Outcome(status=Status.OK, worst_error=worst)

    def _remembered(self, spec: KernelSpec, extent: Extent) -> Outcome:
        source = render_for(spec, self.plan, self.arch)
        premise = premises(spec, self.workload, spec.page_size, self.seed, extent)
        versions = environment.current(self.plan.backend, device=None)
        kept = paths.cache_dir() / "proofs" / digest(whole_program(source.text), premise, versions)

        def outcome() -> Outcome:
            return _proved(build.load(source), self.workload, spec.page_size, self.seed, "cpu", extent)

        return remembered(kept, Outcome, outcome)

    @staticmethod
    def proofs(spec: KernelSpec, plan: Plan) -> tuple[tuple[KernelSpec, Extent], ...]:
        """All heads on a short and an empty request; one KV head on a ragged batch with several tiles of rows; and one
        tile of rows over several splits, since a grid with many tiles fills the interpreter's few multiprocessors and
        splits no keys. A plan that fixes the length of a split needs more keys than one."""
        if spec.op == "select_kv":
            return ((spec, INTERPRETED_SELECTION),)
        group = spec.heads.group
        one_head = dataclasses.replace(spec.heads, num_q_heads=group, num_kv_heads=1)
        fixed = plan.integer("split_keys") if "split_keys" in plan.as_dict() else 0
        several_splits = dataclasses.replace(SEVERAL_SPLITS, keys=SEVERAL_SPLITS.keys + fixed)
        one_tile = dataclasses.replace(one_head, num_q_heads=min(group, ONE_TILE_HEADS))
        return (
            (spec, ALL_HEADS),
            (
                dataclasses.replace(spec, heads=one_head),
                Extent(keys=0, ragged=70, rows=max(2, SEVERAL_ROW_TILES // group)),
            ),
            (dataclasses.replace(spec, heads=one_tile), several_splits),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProveJob:
    """Builds one plan for the device at hand and proves it there, which leaves its binary in the compiler's cache."""

    spec: KernelSpec
    plan: Plan
    arch: Arch
    workload: Workload
    page_size: int
    seed: int

    def run(self) -> Outcome:
        kernel = build.load(render_for(self.spec, self.plan, self.arch))
        try:
            return _proved(kernel, self.workload, self.page_size, self.seed, device_of(self.arch), ON_DEVICE)
        except launch_errors(self.plan.backend) as error:
            return failed_launch(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureJob:
    """Builds, proves and times plans on the device at hand; several take turns within one measurement. The outcome has
    the workspace, and on a GPU the resources, of the last plan.

    seconds  of timing, for all plans together
    """

    spec: KernelSpec
    plans: tuple[Plan, ...]
    arch: Arch
    workload: Workload
    page_size: int
    seed: int
    seconds: float
    mode: Mode = "eager"

    def run(self) -> Outcome:
        resources: tuple[Resources, ...] = ()
        if self.arch.is_gpu:
            for plan in self.plans:
                compiled = CompileJob(spec=self.spec, plan=plan, arch=self.arch).run()
                if compiled.status is not Status.OK:
                    return compiled
                resources = compiled.resources
        device = device_of(self.arch)
        kernels = [build.load(render_for(self.spec, plan, self.arch)) for plan in self.plans]
        worst = 0.0
        try:
            for kernel in kernels:
                proof = _proved(kernel, self.workload, self.page_size, self.seed, device, ON_DEVICE)
                if proof.status is not Status.OK:
                    return proof
                worst = max(worst, proof.worst_error or 0.0)
            calls = _calls(self.spec, self.workload, self.arch, self.page_size, self.seed)
            watch = conditions.watch(self.arch)
            timings = time_interleaved(
                rotating(kernels, calls, device, self.mode),
                seconds=self.seconds,
                timer=timer_for(self.arch),
                between=watch.look,
            )
        except launch_errors(self.plans[0].backend) as error:
            return failed_launch(error)
        return Outcome(
            status=Status.OK,
            worst_error=worst,
            timings=timings,
            resources=resources,
            workspace_bytes=max(map(kernels[-1].workspace_bytes, calls)),
            conditions=watch.seen(),
        )


def render_for(spec: KernelSpec, plan: Plan, arch: Arch) -> Source:
    return render(spec, plan, build.target_for(plan, arch))


def interpreted_twin(spec: KernelSpec) -> KernelSpec:
    return dataclasses.replace(spec, dtype="float16") if spec.dtype == "bfloat16" else spec


def launch_errors(backend: Backend) -> tuple[type[Exception], ...]:
    """What a launch may raise because of its plan. A CPU kernel that fails takes its process along."""
    if backend == "cpu":
        return ()
    triton_error = importlib.import_module("triton.errors").TritonError
    return (triton_error, CudaError, torch.AcceleratorError, torch.OutOfMemoryError)


def failed_launch(error: Exception) -> Outcome:
    """An error of the device, as an access to an illegal address, stays with its process, where nothing runs again."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    detail = f"{POISONED}{line}" if isinstance(error, torch.AcceleratorError) else line
    return Outcome(status=Status.RUNTIME, detail=detail)


def _proved(kernel: Kernel, workload: Workload, page_size: int, seed: int, device: str, extent: Extent) -> Outcome:
    verdict = prove(kernel, workload=workload, page_size=page_size, seed=seed, device=device, extent=extent)
    status = Status.OK if verdict.passed else Status.WRONG
    worst_error = verdict.worst if math.isfinite(verdict.worst) else None
    return Outcome(status=status, detail=verdict.detail, worst_error=worst_error)


# A worker times one workload many times over, and making its inputs takes longer than timing it.
@functools.lru_cache(maxsize=1)
def _calls(spec: KernelSpec, workload: Workload, arch: Arch, page_size: int, seed: int) -> tuple[Call, ...]:
    return timed_calls(spec, workload, arch, page_size=page_size, seed=seed)
