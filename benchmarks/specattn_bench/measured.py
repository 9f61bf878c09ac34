"""Series on this machine's CPU: kernels built and proved, then timed in turns with whatever stands beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import torch

from specattn_bench.plans import Chosen, NotServedError, Plans, choose
from specattn_bench.series import AnySeries, Contender
from specattn_bench.timing import Launch
from specattn_codegen import build
from specattn_codegen.kernel import Call, Kernel
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof.problems import AttentionProblem
from specattn_codegen.proof.prove import Extent, prove
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning.measure import Timer, host_timer, time_interleaved

PROOF = Extent(keys=600, ragged=200, rows=8)  # the binary is the one that is timed; on the CPU sizes are arguments
SEED = 0


def load(spec: KernelSpec, chosen: Chosen, arch: Arch) -> Kernel:
    return build.load(render(spec, chosen.plan, build.target_for(chosen.plan, arch)))


def built(
    series: AnySeries, spec: KernelSpec, workload: Workload, arch: Arch, plans: Plans, page_size: int
) -> tuple[AnySeries, Kernel | None]:
    """A series of ours and its kernel, proved; no kernel where the backend does not serve it, or serves it wrongly."""
    try:
        chosen = choose(spec, workload, arch, plans)
    except NotServedError as error:
        return dataclasses.replace(series, refused=f"not served: {error}"), None
    series = dataclasses.replace(series, chosen=chosen)
    kernel = load(spec, chosen, arch)
    verdict = prove(kernel, workload=workload, page_size=page_size, seed=SEED, device="cpu", extent=PROOF)
    if not verdict.passed:
        return dataclasses.replace(series, refused=f"not served: wrong results, {verdict.detail}"), None
    return series, kernel


def require_plans(wanted: Sequence[tuple[KernelSpec, Workload]], arch: Arch, plans: Plans) -> None:
    """Raises SpecError for overrides that no kernel of a case could have, before anything is timed."""
    plans.require_known([spec for spec, _ in wanted], arch)
    for spec, workload in wanted:
        with contextlib.suppress(NotServedError):
            choose(spec, workload, arch, plans)


def inputs_of(spec: KernelSpec, problem: AttentionProblem) -> AttentionProblem:
    """What a kernel takes of the problem: references only where its scores are normalised by them."""
    if spec.score is not None and spec.score.normaliser == "reference":
        return problem
    return dataclasses.replace(problem, lse_ref=None)


def launches(kernel: Kernel, calls: Sequence[Call]) -> list[Launch]:
    """One launch a call, over one workspace, as a decode loop has it."""
    device = calls[0].device
    workspace = torch.empty(max(map(kernel.workspace_bytes, calls)), dtype=torch.uint8, device=device)
    return [functools.partial(kernel.launch, call, workspace) for call in calls]


def timed(contenders: Sequence[Contender[AnySeries]], seconds: float, timer: Timer = host_timer) -> list[AnySeries]:
    """Every series with its timing, for `seconds` in all; those without a launch as they are."""
    with torch.inference_mode():
        runs = [run for _, run in contenders if run]
        found = iter(time_interleaved(runs, seconds=seconds, timer=timer))
    return [dataclasses.replace(one, timing=next(found)) if run else one for one, run in contenders]
