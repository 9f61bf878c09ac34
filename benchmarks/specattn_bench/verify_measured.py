"""Verification on this machine's CPU: every series of a case proved, then timed in turns with torch's attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from specattn_bench import peers
from specattn_bench.ceilings import readers
from specattn_bench.measured import SEED, built, inputs_of, launches, load, timed
from specattn_bench.plans import DEFAULT, choose
from specattn_bench.series import Contender
from specattn_bench.timing import Launch, after_weights, in_turn, turns
from specattn_bench.verify_series import READING, SCORES, Asked, Case, Series
from specattn_codegen.calls import problem_call
from specattn_codegen.cost_model.floor import Work, least_work
from specattn_codegen.kernel import Kernel
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof.problems import AttentionProblem, workload_problem
from specattn_codegen.proof.prove import launch
from specattn_codegen.tuning.measure import rotated


def measure_case(asked: Asked, case: Case, arch: Arch, seconds: float) -> list[Series]:
    """Every series of one case: ours, then the peers; those that cannot be timed say why. seconds: of timing."""
    ours = [_built(asked, case, scores, arch) for scores in asked.scores]
    problem = _problem(asked, case, arch)
    count, turn = turns(problem.k_cache.nbytes + problem.v_cache.nbytes, arch)
    copies = rotated(problem, count)
    contenders: list[Contender[Series]] = []
    for one, kernel in ours:
        run = None
        if kernel is not None:
            calls = [problem_call(kernel.spec, inputs_of(kernel.spec, copy)) for copy in copies]
            run = in_turn(launches(kernel, calls), turn)
        contenders.append((one, run))
    contenders += _readings(case, copies, turn, arch)
    work = least_work(asked.spec(case, "none"), case.workload)
    for name, run in peers.peer_launches(asked.heads, problem, arch).items():
        scored = name == peers.WITH_SCORES
        contenders.append((Series(case=case, name=name, kind="peer", work=work, scored=scored), run))
    found = timed(contenders, seconds, after_weights(arch))
    reading = min((one for one in found if one.kind == "beside"), key=_median)
    return [one for one in found if one.kind != "beside" or one is reading]


def _readings(
    case: Case, copies: Sequence[AttentionProblem], turn: Iterator[int], arch: Arch
) -> list[Contender[Series]]:
    """Only reading as many bytes of K and V, as they lie, in several patterns: what memory allows in the same turns."""
    used = case.workload.batch * -(-case.workload.kv_len // copies[0].k_cache.shape[1])  # pages; the pool holds more
    caches = [(copy.k_cache[:used], copy.v_cache[:used]) for copy in copies]

    def over(read: Callable[[torch.Tensor], None], cache: tuple[torch.Tensor, torch.Tensor]) -> Launch:
        return lambda: [read(tensor) for tensor in cache]

    work = Work(memory_bytes=sum(tensor.nbytes for tensor in caches[0]), operations=0)
    series = Series(case=case, name=READING, kind="beside", work=work, scored=False)
    return [(series, in_turn([over(read, cache) for cache in caches], turn)) for read in readers(arch)]


def _median(series: Series) -> float:
    return series.timing.median_us if series.timing else math.inf


def _built(asked: Asked, case: Case, scores: str, arch: Arch) -> tuple[Series, Kernel | None]:
    spec = asked.spec(case, scores)
    work, scored = least_work(spec, case.workload), SCORES[scores] is not None
    series = Series(case=case, name=scores, kind="ours", work=work, scored=scored)
    return built(series, spec, case.workload, arch, asked.plans, asked.page_size)


def _problem(asked: Asked, case: Case, arch: Arch) -> AttentionProblem:
    """Requests over shuffled pages, with the rows' own log-sum-exps as references, which is what drafting leaves."""
    spec = asked.spec(case, "none")
    problem = workload_problem(spec, case.workload, page_size=asked.page_size, seed=SEED)
    problem = dataclasses.replace(problem, max_kv=case.workload.kv_len)
    chosen = choose(spec, case.workload, arch, DEFAULT)
    call = problem_call(spec, problem)
    launch(load(spec, chosen, arch), call, "cpu")
    return dataclasses.replace(problem, lse_ref=call.lse)
