"""Selection on this machine's CPU: every series of a case proved, then timed in turns with torch's operations."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from specattn_bench.measured import SEED, built, launches, timed
from specattn_bench.selection_peers import peers_of
from specattn_bench.selection_series import BISECTED, RULES, VERIFY_ROWS, Asked, Case
from specattn_bench.series import Contender, Series
from specattn_bench.timing import in_turn, turns
from specattn_codegen.calls import problem_call, select_call
from specattn_codegen.cost_model.floor import COUNT_BYTES, INDEX_BYTES, SCORE_BYTES, Work, least_work
from specattn_codegen.kernel import Kernel, SelectCall
from specattn_codegen.policy import TopK, TopP
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof.check import Verdict, check_selection
from specattn_codegen.proof.problems import random_scores, workload_problem
from specattn_codegen.proof.prove import launch
from specattn_codegen.proof.reference import count_scores
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload
from specattn_codegen.tuning.measure import rotated

WARM_START = "from verification's histogram"


def measure_case(asked: Asked, case: Case, arch: Arch, seconds: float) -> list[Series[Case]]:
    """Every series of one case: ours, then what stands beside it. seconds: of timing."""
    with threads(case.threads):
        scores = random_scores(case.layers * case.batch, case.heads, [], case.columns, SEED)
        scores = scores.view(case.layers, case.batch, case.heads, case.columns)
        count, turn = turns(scores.nbytes, arch)
        copies = [scores.clone() for _ in range(count)]
        contenders: list[Contender[Series[Case]]] = []
        work = Work(memory_bytes=0, operations=0)
        for name, change in ours(case).items():
            series = Series(case=case, name=name, kind="ours", work=work)
            series, kernel = built(series, asked.spec, case.workload, arch, asked.plans, asked.page_size)
            run = None
            if kernel is not None:
                calls = calls_of(case, copies, change)
                verdict = first_verdict(kernel, calls[0])
                series = dataclasses.replace(series, work=work_of(calls[0]))
                if verdict.passed:
                    run = in_turn(launches(kernel, calls), turn)
                else:
                    series = dataclasses.replace(series, refused=f"not served: wrong results, {verdict.detail}")
            contenders.append((series, run))
        work = contenders[0][0].work
        if case.verified:
            return timed([*contenders, verification(asked, case, arch)], seconds)
        for name, peer in peers_of(RULES[case.rule]).items():
            run = in_turn([functools.partial(peer, copy) for copy in copies], turn)
            contenders.append((Series(case=case, name=name, kind="peer", work=work), run))
        return timed(contenders, seconds)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ours(case: Case) -> dict[str, Callable[[SelectCall], SelectCall]]:
    """Our series by name, and what is different about their calls."""
    rule = RULES[case.rule]
    if isinstance(rule.policy, TopP):
        bisected = dataclasses.replace(rule.policy, bisection_steps=BISECTED)
        return {
            "the smallest set": lambda call: call,
            f"bisection, {BISECTED} steps": lambda call: dataclasses.replace(call, policy=bisected),
        }
    if isinstance(rule.policy, TopK) and rule.block == 1:
        return {"from the scores": lambda call: call, WARM_START: warm_start}
    return {"from the scores": lambda call: call}


def warm_start(call: SelectCall) -> SelectCall:
    return dataclasses.replace(call, histogram=count_scores(call.scores))


def calls_of(case: Case, copies: list[torch.Tensor], change: Callable[[SelectCall], SelectCall]) -> list[SelectCall]:
    """A call a copy of the scores, all writing to the same outputs, as a decode loop has them."""
    rule = RULES[case.rule]
    prefix_lens = torch.full((case.batch,), case.keys, dtype=torch.int32)
    first = change(select_call(copies[0], prefix_lens, rule.policy, block=rule.block))
    return [dataclasses.replace(first, scores=copy) for copy in copies]


def first_verdict(kernel: Kernel, call: SelectCall) -> Verdict:
    """Of the first request's rows in the first layer; the others are alike, and the oracle sorts each of them."""
    launch(kernel, call, "cpu")
    return check_selection(
        dataclasses.replace(
            call,
            scores=call.scores[:1, :1],
            prefix_lens=call.prefix_lens[:1],
            indices=call.indices[:1, :1],
            counts=call.counts[:1, :1],
            histogram=None,
        )
    )


def work_of(call: SelectCall) -> Work:
    """What a launched call cannot avoid: every score read once, every selected index and every count written once."""
    scores, selected, rows = call.scores.numel(), int(call.counts.sum()), call.counts.numel()
    return Work(memory_bytes=scores * SCORE_BYTES + selected * INDEX_BYTES + rows * COUNT_BYTES, operations=scores)


def verification(asked: Asked, case: Case, arch: Arch) -> Contender[Series[Case]]:
    """Verifying as many layers, one after the other, with the scores that the selection is made of."""
    assert case.verified is not None
    spec = KernelSpec(op="verify_attention", heads=asked.heads, dtype=case.verified, score=ScoreSpec())
    workload = Workload(batch=case.batch, q_len=VERIFY_ROWS, kv_len=case.keys + VERIFY_ROWS)
    layer = least_work(spec, workload)
    work = Work(memory_bytes=case.layers * layer.memory_bytes, operations=case.layers * layer.operations)
    name = f"verifying {case.layers} layers, {VERIFY_ROWS} rows"
    series, kernel = built(
        Series(case=case, name=name, kind="beside", work=work), spec, workload, arch, asked.plans, asked.page_size
    )
    if kernel is None:
        return series, None
    problem = workload_problem(spec, workload, page_size=asked.page_size, seed=SEED)
    count, turn = turns(problem.k_cache.nbytes + problem.v_cache.nbytes, arch)
    layer_launch = in_turn(launches(kernel, [problem_call(spec, copy) for copy in rotated(problem, count)]), turn)

    def run() -> None:
        for _ in range(case.layers):
            layer_launch()

    return series, run
