"""What verification attention promises, on the CPU: identities that need no oracle, and the oracle where one is stated.
Those about rows, splits, padding, pages and columns hold TileLang as well, by its twin in C.

Properties by number, and what holds each; `cpu:` is tests/test_cpu_attention.py, `coverage:` test_verify_coverage.py.

 1  rows are right-aligned and causal   test_a_key_reaches_exactly_the_rows_that_see_it
 2  window, softcap and sinks compose   test_features_compose, test_a_sink_only_takes_mass
                                        cpu: test_softcap_window_sinks_and_odd_dims
 3  splits, for any number of rows      test_results_do_not_depend_on_the_splits
                                        cpu: test_every_plan_gives_the_same_numbers
 4  splits in which a row sees nothing  test_rows_that_see_nothing_in_a_split_or_at_all
                                        test_a_sink_of_minus_infinity_is_no_sink
 5  padding                             test_padding_gives_zeros_and_touches_nothing
 6  unused slots never leak             test_garbage_in_unused_slots_never_leaks
 7  shared and repeated pages           test_pages_may_be_shared_and_repeated
 8  wild page-table entries             test_page_table_entries_past_a_length_may_be_anything
 9  64-bit addresses                    test_addresses_are_64_bit
10  natural logarithms, layouts         test_equal_keys_have_a_closed_form, test_outputs_are_allocated_as_promised
11  the same bits again, in any batch   test_a_requests_bits_do_not_depend_on_its_batch
                                        test_a_rows_bits_do_not_depend_on_later_rows
                                        cpu: test_results_do_not_depend_on_threads_or_neighbours
12  all mass is somewhere               test_all_mass_is_accounted_for
                                        cpu: test_scores_of_the_prefix_and_the_rows_own_weights_sum_to_one
13  the oracle's ranks                  test_the_best_keys_are_the_oracles
14  modes and reductions                test_scores_are_means_over_rows, test_a_single_row_counts_once
                                        test_a_layers_scores_are_the_mean_of_its_heads
                                        cpu: test_every_score_definition
15  nothing past the prefix is written  test_only_the_prefix_is_written
                                        cpu: test_columns_past_the_prefix_are_never_written
16  scoring leaves out as it is         test_out_has_the_same_bits_whatever_is_scored
17  many packed rows                    test_large_groups_of_many_rows_are_not_truncated
                                        coverage: every group to 16 with 33 rows
18  tensor-parallel ranks               test_ranks_layer_scores_average_to_the_whole_layers
19  pages pool scores exactly           test_pages_pool_the_scores_of_their_keys
20  storage of weights                  test_weights_keep_their_tolerance_in_every_storage
                                        test_outputs_are_allocated_as_promised
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import mmap
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import HEADS, SCORES, SMALL, kernel_for, run, verdict, verify_spec
from specattn_codegen import space
from specattn_codegen.calls import AttentionInputs, attention_call, problem_call
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall, Kernel
from specattn_codegen.plan import Setting
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import check_attention, expect_attention, tolerance
from specattn_codegen.proof.problems import AttentionProblem, Layout, attention_problem
from specattn_codegen.results import VerifyOutput
from specattn_codegen.spec import DTYPES, Dtype, KernelSpec, KvDtype, ScoreRows, ScoreSpec

Backend = Literal["cpu", "tilelang"]
SPLITS: dict[str, Setting] = {"split_keys": 256}  # the shortest, so that short requests have several
WINDOWED = dataclasses.replace(SMALL, window=40)
CAPPED = dataclasses.replace(SMALL, window=50, softcap=4.0)
# TileLang takes ten seconds for a kernel, so that all its tests share two.
SINKING = dataclasses.replace(SMALL, sinks=True)
BACKENDS: list[tuple[Backend, HeadConfig]] = [("cpu", SMALL), ("tilelang", SINKING)]
BACKENDS_AND_WINDOWS: list[tuple[Backend, HeadConfig]] = [
    *BACKENDS,
    ("cpu", WINDOWED),
    ("tilelang", dataclasses.replace(SINKING, window=WINDOWED.window)),
]
TILELANG_PAGE_SIZE = 16  # which its kernels are made for
MARK = -1e30  # which is nobody's score
TOKEN_SCORES = [score for score in SCORES if not score.by_page]
# One for each way through the kernels: weights kept or final at once, per head or summed over heads, by key or page.
FEW_SCORES = [
    ScoreSpec(),
    ScoreSpec(value="logit", heads="layer"),
    ScoreSpec(normaliser="reference"),
    ScoreSpec(rows="ends", heads="layer", granularity="page_mean", histogram=True),
    ScoreSpec(normaliser="reference", heads="layer", granularity="page_max", histogram=True),
]
BOTH = 2.0  # two results, each within one tolerance of the truth, are within two of each other


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


PAGE_SIZES = st.sampled_from([1, 7, 16, 64])
SEEDS = st.integers(0, 2**16)
KEYS = st.one_of(st.integers(1, 40), st.integers(250, 262), st.integers(500, 600))  # around 1 and 2 splits of 256


@st.composite
def sizes(draw: st.DrawFn, most_requests: int = 4) -> dict[str, Any]:
    """Of attention_problem: requests of 0 to 9 rows and up to 600 keys, some with fewer keys than rows."""
    requests = draw(st.lists(st.tuples(st.integers(0, 9), KEYS), min_size=1, max_size=most_requests))
    return {
        "q_lens": [rows for rows, _ in requests],
        "kv_lens": [keys for _, keys in requests],
        "page_size": draw(PAGE_SIZES),
        "seed": draw(SEEDS),
        "layout": draw(st.sampled_from(get_args(Layout))),
    }


def slots(problem: AttentionProblem, request: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of a request's positions [N] into the caches: pages [N], slots [N]."""
    page_size = problem.k_cache.shape[1]
    return problem.page_table[request, positions // page_size].long(), positions % page_size


def live_positions(problem: AttentionProblem, request: int) -> torch.Tensor:
    return torch.arange(max(0, int(problem.kv_lens[request])))


def rows_of(problem: AttentionProblem, request: int) -> slice:
    return slice(int(problem.cu_q[request]), int(problem.cu_q[request + 1]))


def prefix_of(problem: AttentionProblem, request: int) -> int:
    rows = rows_of(problem, request)
    count = rows.stop - rows.start
    return max(0, int(problem.kv_lens[request]) - count) if count else 0


def batch_of(problem: AttentionProblem, requests: list[int], extra_rows: int = 0) -> AttentionProblem:
    """The given requests of a problem, in the given order, over the same caches; max_q larger than need be."""
    q_lens = problem.cu_q.diff()[requests]
    rows = torch.cat([torch.arange(int(problem.cu_q[r]), int(problem.cu_q[r + 1])) for r in requests])
    return dataclasses.replace(
        problem,
        q=problem.q[rows],
        page_table=problem.page_table[requests],
        kv_lens=problem.kv_lens[requests],
        cu_q=torch.cat([torch.zeros(1), q_lens.cumsum(0)]).int(),
        max_q=max(1, int(q_lens.max())) + extra_rows,
        max_kv=max(0, int(problem.kv_lens[requests].max())),
        tail_start=problem.tail_start[requests],
        lse_ref=None if problem.lse_ref is None else problem.lse_ref[rows],
    )


def rows_alone(problem: AttentionProblem) -> AttentionProblem:
    """Each row of the only request as a request of its own, of the same pages and the keys up to itself."""
    rows, keys = problem.q.shape[0], int(problem.kv_lens[0])
    return dataclasses.replace(
        problem,
        page_table=problem.page_table.expand(rows, -1),
        kv_lens=torch.arange(keys - rows + 1, keys + 1).int(),
        cu_q=torch.arange(rows + 1).int(),
        max_q=1,
        tail_start=torch.arange(keys - rows, keys).int(),
    )


def scores_of(call: AttentionCall) -> torch.Tensor:
    assert call.scores is not None
    return call.scores


def disagreement(spec: KernelSpec, problem: AttentionProblem, call: AttentionCall, expected: VerifyOutput) -> float:
    """The largest difference of a kernel's results from others', as a multiple of one kernel's tolerance."""
    return check_attention(spec, problem, call.out, call.lse, call.scores, expected, call.histogram).worst


def same_bits(one: AttentionCall, other: AttentionCall) -> bool:
    pairs = [(one.out, other.out), (one.lse, other.lse), (one.scores, other.scores), (one.histogram, other.histogram)]
    return all(torch.equal(as_bits(a), as_bits(b)) for a, b in pairs if a is not None and b is not None)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN, which marks what was not written, compares as any other value."""
    return tensor.contiguous().view(torch.uint8)


@functools.cache
def kernel_on(backend: Backend, heads: HeadConfig) -> Kernel:
    """In short splits, with PillarAttn's scores."""
    if backend == "cpu":
        return kernel_for(verify_spec(heads, score=ScoreSpec()), changes=SPLITS)
    pytest.importorskip("tilelang", reason="TileLang is not installed")
    twins = importlib.import_module("tilelang_cases")
    return twins.twin(twins.verify_spec(heads, ScoreSpec(), TILELANG_PAGE_SIZE), **SPLITS, ctas_per_sm=1)


def sized(kernel: Kernel, problem_sizes: dict[str, Any]) -> AttentionProblem:
    """A problem of some sizes, but of the page size that a kernel is made for where it is made for one."""
    return attention_problem(
        kernel.spec, **{**problem_sizes, "page_size": kernel.spec.page_size or problem_sizes["page_size"]}
    )


def _named(value: object) -> str:
    return value.name if isinstance(value, HeadConfig | ScoreSpec) else str(value)


@pytest.mark.parametrize(("backend", "heads"), BACKENDS_AND_WINDOWS, ids=_named)
@examples(30)
@given(rows=st.integers(1, 20), keys=KEYS, age=st.one_of(st.integers(0, 60), st.integers(0)), seed=SEEDS)
def test_a_key_reaches_exactly_the_rows_that_see_it(
    backend: Backend, heads: HeadConfig, rows: int, keys: int, age: int, seed: int
) -> None:
    """A larger value of one key changes every element of the rows that see it, and no bit of the others."""
    kernel = kernel_on(backend, heads)
    problem = attention_problem(kernel.spec, q_lens=[rows], kv_lens=[keys], page_size=16, seed=seed)
    key = keys - 1 - age % keys
    before = run(kernel, problem).out
    problem.v_cache[slots(problem, 0, torch.tensor([key]))] += 1000.0
    changed = (run(kernel, problem).out != before).flatten(1)
    positions = torch.arange(keys - rows, keys)
    sees = (positions >= key) & (positions - key < (heads.window or keys))
    assert torch.equal(changed.any(1), sees)
    assert torch.equal(changed.all(1), sees)


@examples(40)
@given(
    window=st.sampled_from([None, 40]), softcap=st.sampled_from([None, 5.0]), sinks=st.booleans(), problem_sizes=sizes()
)
def test_features_compose(
    window: int | None, softcap: float | None, sinks: bool, problem_sizes: dict[str, Any]
) -> None:
    heads = dataclasses.replace(SMALL, window=window, softcap=softcap, sinks=sinks)
    kernel = kernel_for(verify_spec(heads, score=ScoreSpec()))
    result = verdict(kernel, attention_problem(kernel.spec, **problem_sizes))
    assert result.passed, result.detail


@examples(20)
@given(window=st.sampled_from([None, 40]), softcap=st.sampled_from([None, 5.0]), problem_sizes=sizes())
def test_a_sink_only_takes_mass(window: int | None, softcap: float | None, problem_sizes: dict[str, Any]) -> None:
    """The sum of exponentials grows by the sink's, which is neither capped nor windowed; values only shrink with it."""
    heads = dataclasses.replace(SMALL, window=window, softcap=softcap, sinks=True)
    sinking = kernel_for(verify_spec(heads, score=ScoreSpec()))
    plain = kernel_for(verify_spec(dataclasses.replace(heads, sinks=False), score=ScoreSpec()))
    problem = attention_problem(sinking.spec, **problem_sizes)
    assert problem.sinks is not None
    without = run(plain, dataclasses.replace(problem, sinks=None))
    lse = torch.where(without.lse > -math.inf, torch.logaddexp(without.lse.double(), problem.sinks.double()), -math.inf)
    shrunk = torch.where(lse > -math.inf, torch.exp(without.lse.double() - lse), 0.0)
    call = dataclasses.replace(run(sinking, problem), scores=None)
    expected = VerifyOutput(without.out.double() * shrunk[..., None], lse, None)
    assert disagreement(sinking.spec, problem, call, expected) <= BOTH


@examples(10)
@given(rows=st.integers(1, 33), keys=st.one_of(KEYS, st.integers(1, 3000)), seed=SEEDS)
def test_results_do_not_depend_on_the_splits(rows: int, keys: int, seed: int) -> None:
    """1 to 12 splits; where every plan has a single one, the same bits."""
    spec = verify_spec(SMALL, score=ScoreSpec())
    problem = attention_problem(spec, q_lens=[rows], kv_lens=[keys], page_size=16, seed=seed)
    expected = expect_attention(spec, problem)
    calls = [run(kernel_for(spec, changes={"split_keys": split}), problem) for split in (256, 1024, 4096)]
    assert max(disagreement(spec, problem, call, expected) for call in calls) <= 1.0
    assert keys > 256 or all(same_bits(call, calls[0]) for call in calls)


EMPTY_SPLITS = {
    "the newest keys, of which the first rows see none": (SMALL, [40], [290]),
    "rows before every key of two splits": (SMALL, [300], [290]),
    "a window that has left the oldest split": (WINDOWED, [300], [600]),
    "a window, and rows before every key": (WINDOWED, [300], [290]),
}


@pytest.mark.parametrize(("backend", "sinks"), [("cpu", False), ("cpu", True), ("tilelang", True)])
@pytest.mark.parametrize("name", EMPTY_SPLITS)
def test_rows_that_see_nothing_in_a_split_or_at_all(name: str, backend: Backend, sinks: bool) -> None:
    """Merging -inf with -inf and 0 with 0 gives zeros and -inf, never NaN, with or without a sink."""
    heads, q_lens, kv_lens = EMPTY_SPLITS[name]
    kernel = kernel_on(backend, dataclasses.replace(heads, sinks=sinks))
    problem = attention_problem(kernel.spec, q_lens=q_lens, kv_lens=kv_lens, page_size=16, seed=4)
    call = run(kernel, problem)
    unseeing = max(0, q_lens[0] - kv_lens[0])
    assert (call.out[:unseeing] == 0).all()
    assert (call.lse[:unseeing] == -math.inf).all()
    assert call.out.isfinite().all()
    assert call.lse[unseeing:].isfinite().all()
    result = verdict(kernel, problem)
    assert result.passed, result.detail


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    sinking = kernel_for(verify_spec(dataclasses.replace(SMALL, sinks=True), score=ScoreSpec()), changes=SPLITS)
    plain = kernel_for(verify_spec(SMALL, score=ScoreSpec()), changes=SPLITS)
    problem = attention_problem(plain.spec, q_lens=[40, 2, 3], kv_lens=[290, 0, 2], page_size=16, seed=4)
    muted = dataclasses.replace(problem, sinks=torch.full((8,), -math.inf))
    assert same_bits(run(sinking, muted), run(plain, problem))


PADDING = st.tuples(st.integers(0, 3), st.sampled_from([0, -1, -17, -(2**31)]))


PADDED: list[tuple[Backend, ScoreSpec]] = [*(("cpu", score) for score in FEW_SCORES), ("tilelang", ScoreSpec())]


@pytest.mark.parametrize(("backend", "score"), PADDED, ids=_named)
@examples(8)
@given(problem_sizes=sizes(), padding=st.lists(PADDING, min_size=1, max_size=3))
def test_padding_gives_zeros_and_touches_nothing(
    backend: Backend, score: ScoreSpec, problem_sizes: dict[str, Any], padding: list[tuple[int, int]]
) -> None:
    kernel = kernel_for(verify_spec(SMALL, score=score)) if backend == "cpu" else kernel_on(backend, SINKING)
    live = len(problem_sizes["q_lens"])
    for rows, length in padding:
        problem_sizes["q_lens"].append(rows)
        problem_sizes["kv_lens"].append(length)
    problem = sized(kernel, problem_sizes)
    call = run(kernel, problem)
    padded = slice(int(problem.cu_q[live]), None)
    assert (call.out[padded] == 0).all()
    assert (call.lse[padded] == -math.inf).all()
    assert scores_of(call)[live:].isnan().all()
    assert call.histogram is None or (call.histogram[live:] == 0).all()
    result = verdict(kernel, problem)
    assert result.passed, result.detail


BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
CACHES: list[tuple[Backend, Dtype, KvDtype | None]] = [
    ("cpu", "float32", None),
    ("cpu", "bfloat16", None),
    ("cpu", "float32", "float8_e5m2"),
    ("tilelang", "float16", None),
]


@pytest.mark.parametrize(("backend", "dtype", "kv_dtype"), CACHES)
@examples(10)
@given(problem_sizes=sizes())
def test_garbage_in_unused_slots_never_leaks(
    backend: Backend, dtype: Dtype, kv_dtype: KvDtype | None, problem_sizes: dict[str, Any]
) -> None:
    spec = KernelSpec(op="verify_attention", heads=SMALL, dtype=dtype, kv_dtype=kv_dtype, score=ScoreSpec())
    kernel = kernel_for(spec) if backend == "cpu" else kernel_on(backend, SINKING)
    problem = sized(kernel, problem_sizes)
    unused = torch.ones(problem.k_cache.shape[:2], dtype=torch.bool)
    for request in range(len(problem.kv_lens)):
        unused[slots(problem, request, live_positions(problem, request))] = False
    calls: list[AttentionCall] = []
    for garbage in (0.0, math.nan, math.inf, -math.inf, torch.finfo(problem.k_cache.dtype).max):
        for cache in (problem.k_cache, problem.v_cache):
            bits = BITS[cache.element_size()]  # torch fills no float8
            cache.view(bits)[unused] = torch.tensor(garbage).to(cache.dtype).view(bits)
        calls.append(run(kernel, problem))
    assert all(same_bits(call, calls[0]) for call in calls)


@examples(20)
@given(
    pages=st.lists(st.integers(0), min_size=40, max_size=40),
    keys=st.tuples(st.integers(4, 160), st.integers(4, 160)),
    page_size=st.sampled_from([1, 4]),
    seed=SEEDS,
)
def test_pages_may_be_shared_and_repeated(pages: list[int], keys: tuple[int, int], page_size: int, seed: int) -> None:
    """Tables that name pages of both requests any number of times, against a copy of each page for each entry."""
    kernel = kernel_for(verify_spec(SMALL, score=ScoreSpec()))
    problem = attention_problem(kernel.spec, q_lens=[3, 2], kv_lens=list(keys), page_size=page_size, seed=seed)
    full = torch.cat([problem.page_table[request, : keys[request] // page_size] for request in (0, 1)])
    chosen = torch.tensor([full[page % len(full)] for page in pages]).int()
    table = chosen.repeat(2 * problem.page_table.shape[1] // len(pages) + 1)[: problem.page_table.numel()].view(2, -1)
    shared = dataclasses.replace(problem, page_table=table)
    copied = dataclasses.replace(
        problem,
        page_table=torch.arange(table.numel()).int().view(2, -1),
        k_cache=problem.k_cache[table.flatten().long()],
        v_cache=problem.v_cache[table.flatten().long()],
    )
    assert same_bits(run(kernel, shared), run(kernel, copied))
    result = verdict(kernel, shared)
    assert result.passed, result.detail


@pytest.mark.parametrize(("backend", "heads"), BACKENDS, ids=_named)
@examples(20)
@given(
    problem_sizes=sizes(), entry=st.one_of(st.sampled_from([-1, 2**31 - 1, -(2**31)]), st.integers(-(2**31), 2**31 - 1))
)
def test_page_table_entries_past_a_length_may_be_anything(
    backend: Backend, heads: HeadConfig, problem_sizes: dict[str, Any], entry: int
) -> None:
    kernel = kernel_on(backend, heads)
    problem = sized(kernel, problem_sizes)
    before = run(kernel, problem)
    for request, keys in enumerate(problem_sizes["kv_lens"]):
        problem.page_table[request, -(-keys // problem.k_cache.shape[1]) :] = entry
    assert same_bits(run(kernel, problem), before)


NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python's mmap names from 3.13 on: pages exist once they are written
FAR = 2**32  # elements; as a 32-bit offset, signed or not, it would be none at all
DISTANT = {  # strides of page, slot and head, and the first page, of caches that interleave K and V [2 heads, 32 dims]
    "pages": ((FAR, 128, 64), 0),
    "slots": ((128, FAR, 64), 0),
    "heads": ((256, 64, FAR), 0),
    "page numbers": ((512, 128, 64), 2**26),
}


@pytest.mark.parametrize("apart", DISTANT)
def test_addresses_are_64_bit(apart: str) -> None:
    """Caches of 2^33 to 2^35 elements, nearly all of which are never touched, against the same keys side by side."""
    (page, slot, head), first_page = DISTANT[apart]
    kernel = kernel_for(verify_spec(SMALL, score=ScoreSpec()))
    near = attention_problem(kernel.spec, q_lens=[3, 1], kv_lens=[9, 6], page_size=4, seed=9)
    pages = first_page + near.k_cache.shape[0]
    elements = (pages - 1) * page + 3 * slot + head + 64
    try:
        memory = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        pytest.skip(f"no address space of {elements >> 28} GiB here: {error}")
    pool = torch.frombuffer(memory, dtype=torch.float32)
    k_cache, v_cache = (pool.as_strided((pages, 4, 2, 32), (page, slot, head, 1), offset) for offset in (0, 32))
    k_cache[first_page:].copy_(near.k_cache)
    v_cache[first_page:].copy_(near.v_cache)
    distant = dataclasses.replace(near, k_cache=k_cache, v_cache=v_cache, page_table=near.page_table + first_page)
    assert same_bits(run(kernel, distant), run(kernel, near))


@examples(20)
@given(rows=st.integers(1, 9), keys=KEYS, seed=SEEDS)
def test_equal_keys_have_a_closed_form(rows: int, keys: int, seed: int) -> None:
    """n equal logits x: lse = x + ln n in natural logarithms, out is the mean of n values and every weight is 1 / n."""
    keys += rows
    kernel = kernel_for(verify_spec(SMALL, score=ScoreSpec()), changes=SPLITS)
    problem = attention_problem(kernel.spec, q_lens=[rows], kv_lens=[keys], page_size=16, seed=seed)
    where = slots(problem, 0, torch.arange(keys))
    key = problem.k_cache[where][0]
    problem.k_cache[where] = key
    seen = torch.arange(keys - rows + 1, keys + 1).double()
    logits = (problem.q.double() * key.double().repeat_interleave(4, dim=0)).sum(-1) * SMALL.scale
    means = problem.v_cache[where].double().cumsum(0)[-rows:] / seen[:, None, None]
    scores = torch.full((1, 2, problem.max_kv), math.nan, dtype=torch.float64)
    scores[:, :, : keys - rows] = (1.0 / seen).mean()
    expected = VerifyOutput(means.repeat_interleave(4, dim=1), logits + seen.log()[:, None], scores)
    assert disagreement(kernel.spec, problem, run(kernel, problem), expected) <= 1.0


def test_outputs_are_allocated_as_promised() -> None:
    """lse [total_q, Hq] and scores [B, S, max_kv] are contiguous float32 whatever the dtype; others are refused."""
    for dtype in DTYPES:
        kernel = kernel_for(verify_spec(SMALL, dtype, ScoreSpec()))
        problem = attention_problem(kernel.spec, q_lens=[5, 1], kv_lens=[90, 33], page_size=16, seed=10)
        inputs = AttentionInputs(*(getattr(problem, name) for name in AttentionInputs._fields))
        call = attention_call(kernel.spec, 16, inputs, max_q=5, max_kv=90)
        kernel.launch(call, torch.zeros(kernel.workspace_bytes(call), dtype=torch.uint8))
        assert (call.lse.shape, call.lse.stride(), call.lse.dtype) == ((6, 8), (8, 1), torch.float32)
        assert (scores_of(call).shape, scores_of(call).is_contiguous()) == ((2, 2, 90), True)
        result = verdict(kernel, problem)
        assert result.passed, result.detail
        for other in (
            VerifyOutput(call.out, call.lse.new_empty(8, 6).T, call.scores),
            VerifyOutput(call.out, call.lse, scores_of(call).bfloat16()),
        ):
            with pytest.raises(SpecError, match=r"out\.(lse|scores)"):
                attention_call(kernel.spec, 16, inputs, max_q=5, max_kv=90, out=other)


BATCHED: list[tuple[Backend, ScoreSpec]] = [
    *(("cpu", FEW_SCORES[at]) for at in (0, 1, 4)),
    ("tilelang", ScoreSpec()),
]


@pytest.mark.parametrize(("backend", "score"), BATCHED, ids=_named)
@examples(15)
@given(problem_sizes=sizes(), data=st.data())
def test_a_requests_bits_do_not_depend_on_its_batch(
    backend: Backend, score: ScoreSpec, problem_sizes: dict[str, Any], data: st.DataObject
) -> None:
    """Any selection of the requests, in any order, on any number of threads, under any max_q and max_kv."""
    on_cpu = backend == "cpu"
    kernel = kernel_for(verify_spec(SMALL, score=score), changes=SPLITS) if on_cpu else kernel_on(backend, SINKING)
    whole = sized(kernel, problem_sizes)
    requests = data.draw(st.lists(st.sampled_from(range(len(whole.kv_lens))), min_size=1, max_size=5))
    part = batch_of(whole, requests, extra_rows=data.draw(st.integers(0, 3)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 3)))
        one = run(kernel, whole)
        torch.set_num_threads(data.draw(st.integers(1, 3)))
        other = run(kernel, part)
    finally:
        torch.set_num_threads(threads)
    for index, request in enumerate(requests):
        here, there = rows_of(part, index), rows_of(whole, request)
        columns = score.columns(prefix_of(whole, request), whole.k_cache.shape[1])
        assert torch.equal(other.out[here], one.out[there])
        assert torch.equal(other.lse[here], one.lse[there])
        assert torch.equal(scores_of(other)[index, :, :columns], scores_of(one)[request, :, :columns])


@pytest.mark.parametrize("dtype", DTYPES)
@examples(15)
@given(rows=st.integers(1, 9), prefix=KEYS, seed=SEEDS)
def test_a_rows_bits_do_not_depend_on_later_rows(dtype: Dtype, rows: int, prefix: int, seed: int) -> None:
    """Verifying k drafts gives each row the bits that decoding one token at a time gives it, on request."""
    kernel = kernel_for(verify_spec(SMALL, dtype, ScoreSpec()), batch_invariant=True)
    problem = attention_problem(kernel.spec, q_lens=[rows], kv_lens=[prefix + rows], page_size=16, seed=seed)
    together, alone = run(kernel, problem), run(kernel, rows_alone(problem))
    assert torch.equal(together.out, alone.out)
    assert torch.equal(together.lse, alone.lse)


@pytest.mark.parametrize("score", [ScoreSpec(), ScoreSpec(rows="ends", heads="layer")], ids=lambda score: score.name)
@examples(12)
@given(window=st.sampled_from([None, 50]), sinks=st.booleans(), rows=st.integers(1, 9), prefix=KEYS, seed=SEEDS)
def test_all_mass_is_accounted_for(
    score: ScoreSpec, window: int | None, sinks: bool, rows: int, prefix: int, seed: int
) -> None:
    """A scored row's softmax is its prefix keys', the verify rows' keys' that it sees, and its sink's."""
    heads = dataclasses.replace(SMALL, window=window, softcap=4.0 if window else None, sinks=sinks)
    kernel = kernel_for(verify_spec(heads, score=score))
    problem = attention_problem(kernel.spec, q_lens=[rows], kv_lens=[prefix + rows], page_size=16, seed=seed)
    call = run(kernel, problem)
    keys = problem.k_cache[slots(problem, 0, torch.arange(prefix, prefix + rows))].double()
    rest = torch.zeros(rows, 8, dtype=torch.float64)
    for row in range(rows):
        seen = slice(max(0, row + 1 - (window or rows)), row + 1)
        logits = reference.row_logits(problem.q[row], keys[seen], heads)
        sink = torch.zeros(8) if problem.sinks is None else torch.exp(problem.sinks.double() - call.lse[row])
        rest[row] = torch.exp(logits - call.lse[row].double()[:, None]).sum(1) + sink
    others = rest[reference.scored_rows(rows, score)].mean(0).view(kernel.spec.selection_heads, -1).mean(1)
    allowed = tolerance(kernel.spec, problem, call.out.double(), call.lse.double()).scores_relative
    sums = scores_of(call)[0, :, :prefix].double().sum(-1) + others
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=allowed)


RANKED: list[tuple[Dtype, ScoreSpec]] = [*(("float32", score) for score in TOKEN_SCORES), ("bfloat16", ScoreSpec())]


@pytest.mark.parametrize(("dtype", "score"), RANKED, ids=lambda value: value if isinstance(value, str) else value.name)
def test_the_best_keys_are_the_oracles(dtype: Dtype, score: ScoreSpec) -> None:
    """Overlap of the k best: every one of the oracle's, except where the k-th and others are equal within tolerance."""
    kernel = kernel_for(verify_spec(SMALL, dtype, score))
    problem = attention_problem(kernel.spec, q_lens=[5], kv_lens=[805], page_size=16, seed=13)
    expected, call = expect_attention(kernel.spec, problem), run(kernel, problem)
    assert expected.scores is not None
    allowed = tolerance(kernel.spec, problem, expected.out, expected.lse)
    for exact, found in zip(expected.scores[0, :, :800], scores_of(call)[0, :, :800], strict=True):
        assert score.value == "logit" or (found >= 0).all()
        for count in (1, 40, 400):
            best = exact.topk(count).indices
            edge = exact[best[-1]]
            slack = 2.0 * (exact.abs().clamp_min(edge.abs()) * allowed.scores_relative + allowed.scores_floor)
            undecided = int(((exact - edge).abs() <= slack).sum()) - 1
            overlap = len(set(best.tolist()) & set(found.topk(count).indices.tolist()))
            assert overlap >= count - undecided
            assert undecided <= count // 4  # or the line above would say little


@pytest.mark.parametrize("score", TOKEN_SCORES, ids=lambda score: score.name)
@examples(5)
@given(rows=st.integers(1, 9), prefix=KEYS, seed=SEEDS)
def test_scores_are_means_over_rows(score: ScoreSpec, rows: int, prefix: int, seed: int) -> None:
    """Of the same rows verified one by one, as requests that share their pages."""
    kernel = kernel_for(verify_spec(SMALL, score=score))
    problem = attention_problem(kernel.spec, q_lens=[rows], kv_lens=[prefix + rows], page_size=16, seed=seed)
    together, alone = run(kernel, problem), run(kernel, rows_alone(problem))
    scores = torch.full(scores_of(together).shape, math.nan, dtype=torch.float64)
    each = scores_of(alone)[reference.scored_rows(rows, score), :, :prefix]
    scores[0, :, :prefix] = each.double().mean(0)
    expected = VerifyOutput(alone.out.double(), alone.lse.double(), scores)
    together = dataclasses.replace(together, histogram=None)
    assert disagreement(without_histogram(kernel.spec), problem, together, expected) <= BOTH


def without_histogram(spec: KernelSpec) -> KernelSpec:
    assert spec.score is not None
    return dataclasses.replace(spec, score=dataclasses.replace(spec.score, histogram=False))


@pytest.mark.parametrize("rows", get_args(ScoreRows))
@examples(5)
@given(problem_sizes=sizes())
def test_a_layers_scores_are_the_mean_of_its_heads(rows: ScoreRows, problem_sizes: dict[str, Any]) -> None:
    by_head, by_layer = (
        kernel_for(verify_spec(SMALL, score=ScoreSpec(rows=rows, heads=h))) for h in ("kv_head", "layer")
    )
    problem = attention_problem(by_layer.spec, **problem_sizes)
    apart, whole = run(by_head, problem), run(by_layer, problem)
    expected = VerifyOutput(apart.out.double(), apart.lse.double(), scores_of(apart).double().mean(1, keepdim=True))
    assert disagreement(by_layer.spec, problem, whole, expected) <= BOTH


@examples(8)
@given(keys=st.lists(KEYS, min_size=1, max_size=3), seed=SEEDS)
def test_a_single_row_counts_once(keys: list[int], seed: int) -> None:
    """One row is all rows, both ends and the last row: the same bits."""
    kernels = [kernel_for(verify_spec(SMALL, score=ScoreSpec(rows=rows))) for rows in get_args(ScoreRows)]
    problem = attention_problem(kernels[0].spec, q_lens=[1] * len(keys), kv_lens=keys, page_size=16, seed=seed)
    every, *others = (run(kernel, problem) for kernel in kernels)
    assert all(same_bits(other, every) for other in others)


WRITING: list[tuple[Backend, HeadConfig, ScoreSpec]] = [
    *(("cpu", heads, score) for score in SCORES for heads in (SMALL, CAPPED)),
    ("tilelang", SINKING, ScoreSpec()),
]


@pytest.mark.parametrize(("backend", "heads", "score"), WRITING, ids=_named)
@examples(4)
@given(problem_sizes=sizes())
def test_only_the_prefix_is_written(
    backend: Backend, heads: HeadConfig, score: ScoreSpec, problem_sizes: dict[str, Any]
) -> None:
    """Scores may lie inside a larger tensor, of which only each request's prefix columns change."""
    kernel = kernel_for(verify_spec(heads, score=score)) if backend == "cpu" else kernel_on(backend, heads)
    problem = sized(kernel, problem_sizes)
    call = problem_call(kernel.spec, problem)
    batch, score_rows, columns = scores_of(call).shape
    around = torch.full((batch, score_rows + 1, columns + 5), MARK)
    inside = dataclasses.replace(call, scores=around[:, :score_rows, 3:-2])
    kernel.launch(inside, torch.zeros(kernel.workspace_bytes(inside), dtype=torch.uint8))
    kernel.launch(call, torch.zeros(kernel.workspace_bytes(call), dtype=torch.uint8))
    for request in range(batch):
        prefix = score.columns(prefix_of(problem, request), problem.k_cache.shape[1])
        written = scores_of(call)[request, :, :prefix]
        assert torch.equal(around[request, :-1, 3 : 3 + prefix], written)
        assert not written.isnan().any()
        around[request, :-1, 3 : 3 + prefix] = MARK
        assert scores_of(call)[request, :, prefix:].isnan().all()
    assert (around == MARK).all()


SCORED: list[tuple[HeadConfig, Dtype, ScoreSpec]] = [
    *((SMALL, "float32", score) for score in SCORES),
    *((CAPPED, "float32", score) for score in SCORES),
    *((SMALL, "bfloat16", score) for score in FEW_SCORES[:3]),
]


@pytest.mark.parametrize(
    ("heads", "dtype", "score"), SCORED, ids=lambda value: value if isinstance(value, str) else value.name
)
@examples(4)
@given(problem_sizes=sizes())
def test_out_has_the_same_bits_whatever_is_scored(
    heads: HeadConfig, dtype: Dtype, score: ScoreSpec, problem_sizes: dict[str, Any]
) -> None:
    plain, scored = kernel_for(verify_spec(heads, dtype)), kernel_for(verify_spec(heads, dtype, score))
    problem = attention_problem(scored.spec, **problem_sizes)
    one, other = run(plain, problem), run(scored, problem)
    assert torch.equal(one.out, other.out)
    assert torch.equal(one.lse, other.lse)


@pytest.mark.parametrize(
    ("heads", "rows"),
    [(HeadConfig(num_q_heads=16, num_kv_heads=1, head_dim=64), 33), (HEADS[71, 1, 64], 9)],
    ids=["16x33", "71x9"],
)
def test_large_groups_of_many_rows_are_not_truncated(heads: HeadConfig, rows: int) -> None:
    """528 and 639 packed rows, all of them scored, beside requests of fewer."""
    kernel = kernel_for(verify_spec(heads, score=ScoreSpec()))
    problem = attention_problem(kernel.spec, q_lens=[2, rows, 1], kv_lens=[70, 300, 40], page_size=16, seed=17)
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize("tp", [2, 8])
@examples(5)
@given(problem_sizes=sizes())
def test_ranks_layer_scores_average_to_the_whole_layers(tp: int, problem_sizes: dict[str, Any]) -> None:
    """With 8 ranks of 4 KV heads, pairs of ranks hold the same KV head; every rank has as many query heads."""
    heads = HeadConfig(num_q_heads=16, num_kv_heads=4, head_dim=32)
    whole = kernel_for(verify_spec(heads, score=ScoreSpec(heads="layer")))
    shard = kernel_for(verify_spec(heads.shard(tp), score=ScoreSpec(heads="layer")))
    problem = attention_problem(whole.spec, **problem_sizes)
    queries, kept = shard.spec.heads.num_q_heads, shard.spec.heads.num_kv_heads
    ranks: list[AttentionCall] = []
    for rank in range(tp):
        first = rank * queries // heads.group
        part = dataclasses.replace(
            problem,
            q=problem.q[:, rank * queries : (rank + 1) * queries],
            k_cache=problem.k_cache[:, :, first : first + kept],
            v_cache=problem.v_cache[:, :, first : first + kept],
        )
        ranks.append(run(shard, part))
    expected = VerifyOutput(
        torch.cat([rank.out for rank in ranks], dim=1).double(),
        torch.cat([rank.lse for rank in ranks], dim=1).double(),
        torch.stack([scores_of(rank) for rank in ranks]).double().mean(0),
    )
    assert disagreement(whole.spec, problem, run(whole, problem), expected) <= BOTH


POOLED = [score for score in SCORES if score.by_page and (score.value == "weight" or score.rows == "all")]


@pytest.mark.parametrize("score", POOLED, ids=lambda score: score.name)
@examples(6)
@given(problem_sizes=sizes())
def test_pages_pool_the_scores_of_their_keys(score: ScoreSpec, problem_sizes: dict[str, Any]) -> None:
    """The very bits: keys are added from the first to the last, and the sum divided by their number."""
    page_size = problem_sizes["page_size"]
    by_page = kernel_for(verify_spec(SMALL, score=score))
    by_key = kernel_for(verify_spec(SMALL, score=dataclasses.replace(score, granularity="token", histogram=False)))
    problem = attention_problem(by_page.spec, **problem_sizes)
    pages, keys = scores_of(run(by_page, problem)), scores_of(run(by_key, problem))
    for request in range(len(problem.kv_lens)):
        prefix = prefix_of(problem, request)
        for page, begin in enumerate(range(0, prefix, page_size)):
            parts = keys[request, :, begin : min(begin + page_size, prefix)].unbind(-1)
            pooled = (
                functools.reduce(torch.add, parts) / len(parts)
                if score.granularity == "page_mean"
                else torch.stack(parts).amax(0)
            )
            assert torch.equal(pages[request, :, page], pooled)


STORED: list[tuple[Dtype, str, str]] = [
    ("float32", "fma", "float32"),
    ("float16", "fma", "float16"),
    ("float16", "fma", "float32"),
    ("bfloat16", "fma", "float16"),
    ("bfloat16", "fma", "float32"),
    ("bfloat16", "bf16", "bfloat16"),
]


@pytest.mark.parametrize(("dtype", "product", "score_dump"), STORED)
@pytest.mark.parametrize("magnitude", [1.0, 40.0])
def test_weights_keep_their_tolerance_in_every_storage(
    dtype: Dtype, product: str, score_dump: str, magnitude: float
) -> None:
    """Logits in the hundreds: nearly all mass on one key. Weights are kept relative to a running maximum."""
    spec = verify_spec(SMALL, dtype, ScoreSpec())
    changes: dict[str, Setting] = {"product": product, "score_dump": score_dump}
    here = cpu_info.detect(measure=False)
    reason = space.why_invalid(space.default_plan(spec, here, "cpu").replace(**changes), spec, here)
    if reason:
        pytest.skip(reason)
    kernel = kernel_for(spec, changes=changes)
    problem = attention_problem(spec, q_lens=[4, 1], kv_lens=[1500, 90], page_size=16, seed=6, magnitude=magnitude)
    result = verdict(kernel, problem)
    assert result.passed, result.detail
