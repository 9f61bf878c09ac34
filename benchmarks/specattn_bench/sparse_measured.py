"""Sparse attention on this machine's CPU: proved, then timed in turns with verification over every key and with torch's
gathers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from specattn_bench.measured import SEED, built, launches, timed
from specattn_bench.series import Contender, Series
from specattn_bench.sparse_peers import PEERS, caches_of, gathering_of
from specattn_bench.sparse_series import Asked, Case, disjoint_selections
from specattn_bench.timing import Launch, after_weights, in_turn
from specattn_codegen.calls import problem_call
from specattn_codegen.cost_model.floor import least_work
from specattn_codegen.kernel import Kernel
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof.check import Verdict, check_attention
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.proof.prove import launch
from specattn_codegen.spec import KernelSpec
from specattn_codegen.tuning.measure import copies, rotated

Turn = Iterator[int]
SELECTIONS = 8  # of each copy of a cache, which take turns
PROVED_KEYS = 640
ALL_KEYS = "verifying all keys"


def measure_case(asked: Asked, case: Case, arch: Arch, seconds: float) -> list[Series[Case]]:
    """Every series of one case: ours, verification of every key, and the peers. seconds: of timing.

    Turns go over the copies of the cache first, so that what verification has read last is not what is read next."""
    spec = asked.sparse_spec(case)
    base = attention_problem(
        spec, q_lens=[case.rows], kv_lens=[case.keys], page_size=asked.page_size, seed=SEED, budget=1
    )
    work = least_work(spec, case.workload)
    selections = disjoint_selections(spec.selection_heads, case.tail_start, case.budget, case.block, SELECTIONS, SEED)
    caches = rotated(base, max(2, copies(len(selections) * work.memory_bytes, arch)))
    problems = [
        dataclasses.replace(
            cache,
            indices=indices,
            counts=indices.new_full(indices.shape[:2], indices.shape[2]),
            block=case.block,
        )
        for indices in selections
        for cache in caches
    ]
    turn = itertools.cycle(range(len(problems)))
    sparse = Series(case=case, name="sparse", kind="ours", work=work, scattered=asked.row_bytes(case))
    every = asked.verify_spec(case)
    verifying = Series(case=case, name=ALL_KEYS, kind="beside", work=least_work(every, case.workload))
    contenders = [
        _contender(asked, sparse, spec, problems, turn, arch),
        _contender(asked, verifying, every, problems, turn, arch),
    ]
    layouts = [caches_of(cache) for cache in caches]
    gatherings = [gathering_of(case, asked.heads, base.q, indices) for indices in selections]
    for name, peer in PEERS.items():
        runs: list[Launch] = [peer(layout, gathering) for gathering in gatherings for layout in layouts]
        contenders.append((Series(case=case, name=name, kind="peer", work=work), in_turn(runs, turn)))
    return timed(contenders, seconds, after_weights(arch))


def _contender(
    asked: Asked, series: Series[Case], spec: KernelSpec, problems: Sequence[AttentionProblem], turn: Turn, arch: Arch
) -> Contender[Series[Case]]:
    """A series of one of our kernels over the problems, proved on small ones and on this case's kind of selection."""
    case = series.case
    series, kernel = built(series, spec, case.workload, arch, asked.plans, asked.page_size)
    if kernel is None:
        return series, None
    verdict = _verdict_of_blocks(asked, case, kernel)
    if not verdict.passed:
        return dataclasses.replace(series, refused=f"not served: wrong results, {verdict.detail}"), None
    return series, in_turn(launches(kernel, [problem_call(spec, problem) for problem in problems]), turn)


def _verdict_of_blocks(asked: Asked, case: Case, kernel: Kernel) -> Verdict:
    """Of a request like the case's, but shorter, as the oracle takes seconds for 32 thousand keys."""
    problem = attention_problem(
        kernel.spec,
        q_lens=[case.rows],
        kv_lens=[PROVED_KEYS],
        page_size=asked.page_size,
        seed=SEED,
        budget=PROVED_KEYS // case.block // 4,
        block=case.block,
    )
    call = problem_call(kernel.spec, problem)
    launch(kernel, call, "cpu")
    return check_attention(kernel.spec, problem, call.out, call.lse)
