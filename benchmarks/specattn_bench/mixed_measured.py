"""Mixed attention on this machine's CPU: proved, then timed in turns with its two parts apart and with verification of
the whole batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from specattn_bench.measured import SEED, built, launches, timed
from specattn_bench.mixed_series import Asked, Case, batches_of
from specattn_bench.series import Contender, Series
from specattn_bench.timing import Launch, after_weights, in_turn
from specattn_codegen.calls import problem_call
from specattn_codegen.cost_model.floor import least_work
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof.problems import AttentionProblem
from specattn_codegen.spec import Op, Workload

APART, ALL_VERIFYING = "two launches, verify and sparse", "verifying every request"


def measure_case(asked: Asked, case: Case, arch: Arch, seconds: float) -> list[Series[Case]]:
    """The mixed batch in one launch, its parts in two, and all of it verifying. seconds: of timing."""
    turns = batches_of(asked, case, SEED)
    turn = itertools.cycle(range(len(turns)))
    everyone = Workload(batch=case.requests, q_len=case.rows, kv_len=case.keys)
    one = Series(case=case, name="one launch", kind="ours", work=asked.work(case))
    two = Series(case=case, name=APART, kind="beside", work=asked.work(case))
    every_work = least_work(asked.spec(case, "verify_attention"), everyone)
    every = Series(case=case, name=ALL_VERIFYING, kind="beside", work=every_work)

    def part(
        series: Series[Case], op: Op, size: Workload, problems: Sequence[AttentionProblem]
    ) -> tuple[Series[Case], list[Launch]]:
        spec = asked.spec(case, op)
        series, kernel = built(series, spec, size, arch, asked.plans, asked.page_size)
        return series, launches(kernel, [problem_call(spec, problem) for problem in problems]) if kernel else []

    one, mixed = part(one, "mixed_attention", case.workload, [batch.mixed for batch in turns])
    two, drafting = part(two, "sparse_attention", case.draft_workload, [batch.drafting for batch in turns])
    two, verifying = part(two, "verify_attention", case.verify_workload, [batch.verifying for batch in turns])
    every, verifying_all = part(every, "verify_attention", everyone, [batch.all_verifying for batch in turns])
    apart = [_both(*pair) for pair in zip(verifying, drafting, strict=True)] if verifying and drafting else []
    return timed(
        [_contender(one, mixed, turn), _contender(two, apart, turn), _contender(every, verifying_all, turn)],
        seconds,
        after_weights(arch),
    )


def _both(first: Launch, second: Launch) -> Launch:
    def launch() -> None:
        first()
        second()

    return launch


def _contender(series: Series[Case], runs: Sequence[Launch], turn: Iterator[int]) -> Contender[Series[Case]]:
    return series, in_turn(runs, turn) if runs else None
