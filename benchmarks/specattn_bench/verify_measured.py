"""Verification on this machine's CPU: every series of a case proved, then timed in turns with torch's attention."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch

from specattn_bench import peers
from specattn_bench.plans import Chosen, NotServedError, choose, require_known
from specattn_bench.timing import Launch, in_turn, turns
from specattn_bench.verify_series import Asked, Case, Series
from specattn_codegen import build
from specattn_codegen.arch import Arch
from specattn_codegen.calls import problem_call
from specattn_codegen.kernel import Kernel
from specattn_codegen.measure import host_timer, rotated, time_interleaved
from specattn_codegen.problems import AttentionProblem, workload_problem
from specattn_codegen.prove import Extent, launch, prove
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec

PROOF = Extent(keys=600, ragged=200, rows=8)  # the binary is the one that is timed; on the CPU sizes are arguments
SEED = 0


def measure_case(asked: Asked, case: Case, arch: Arch, seconds: float) -> list[Series]:
    """Every series of one case: ours, then the peers; those that cannot be timed say why. seconds: of timing."""
    ours = [_built(asked, case, scores, arch) for scores in asked.scores]
    problem = _problem(asked, case, arch)
    count, turn = turns(problem.k_cache.nbytes + problem.v_cache.nbytes, arch)
    copies = rotated(problem, count)
    series: list[Series] = []
    launches: list[Callable[[], None]] = []
    for one, kernel in ours:
        series.append(one)
        if kernel is not None:
            launches.append(in_turn(_launches(kernel, copies), turn))
    for name, peer in peers.peer_launches(asked.heads, problem, arch).items():
        series.append(Series(case=case, name=name, kind="peer", scored=name == peers.WITH_SCORES))
        launches.append(peer)
    with torch.inference_mode():
        timings = iter(time_interleaved(launches, seconds=seconds, timer=host_timer))
    return [one if one.refused else dataclasses.replace(one, timing=next(timings)) for one in series]


def _built(asked: Asked, case: Case, scores: str, arch: Arch) -> tuple[Series, Kernel | None]:
    """A series of ours and its kernel, proved; no kernel where the backend does not serve it, or serves it wrongly."""
    spec = asked.spec(case, scores)
    series = Series(case=case, name=scores, kind="ours", scored=spec.score is not None)
    try:
        chosen = choose(spec, case.workload, arch, asked.plan_source, asked.overrides)
    except NotServedError as error:
        return dataclasses.replace(series, refused=f"not served: {error}"), None
    series = dataclasses.replace(series, chosen=chosen)
    kernel = load(spec, chosen, arch)
    verdict = prove(kernel, workload=case.workload, page_size=asked.page_size, seed=SEED, device="cpu", extent=PROOF)
    if not verdict.passed:
        return dataclasses.replace(series, refused=f"not served: wrong results, {verdict.detail}"), None
    return series, kernel


def require_plans(asked: Asked, arch: Arch) -> None:
    """Raises SpecError for overrides that no kernel of a case could have, before anything is timed."""
    require_known(asked.overrides, asked.specs(), arch)
    for case in asked.cases:
        for scores in asked.scores:
            with contextlib.suppress(NotServedError):
                choose(asked.spec(case, scores), case.workload, arch, asked.plan_source, asked.overrides)


def load(spec: KernelSpec, chosen: Chosen, arch: Arch) -> Kernel:
    return build.load(render(spec, chosen.plan, build.target_for(chosen.plan, arch)))


def _problem(asked: Asked, case: Case, arch: Arch) -> AttentionProblem:
    """Requests over shuffled pages, with the rows' own log-sum-exps as references, which is what drafting leaves."""
    spec = asked.spec(case, "none")
    problem = workload_problem(spec, case.workload, page_size=asked.page_size, seed=SEED)
    problem = dataclasses.replace(problem, max_kv=case.workload.kv_len)
    chosen = choose(spec, case.workload, arch, "default", {})
    call = problem_call(spec, problem)
    launch(load(spec, chosen, arch), call, "cpu")
    return dataclasses.replace(problem, lse_ref=call.lse)


def _launches(kernel: Kernel, copies: Sequence[AttentionProblem]) -> list[Launch]:
    """One launch a copy, over one workspace, as a decode loop has it."""
    score = kernel.spec.score
    if score is None or score.normaliser != "reference":
        copies = [dataclasses.replace(copy, lse_ref=None) for copy in copies]
    calls = [problem_call(kernel.spec, copy) for copy in copies]
    workspace = torch.empty(max(map(kernel.workspace_bytes, calls)), dtype=torch.uint8)
    return [functools.partial(kernel.launch, call, workspace) for call in calls]
