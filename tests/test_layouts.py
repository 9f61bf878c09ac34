"""Other engines' layouts, built as they document them, through the CPU's verification against the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import SMALL, kernel_for, run, verify_spec
from specattn_codegen import HeadConfig, SpecError
from specattn_codegen.build.cpu import CpuKernel
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.spec import ScoreSpec
from specattn_runtime.cache.layouts import (
    CacheView,
    PageTable,
    flashinfer_cache,
    page_list_of,
    page_table_of,
    sglang_cache,
    sglang_page_table,
    vllm_cache,
)
from specattn_runtime.cache.paged_cache import PagedCache

PAGE = 16


@pytest.fixture(scope="module")
def kernel() -> CpuKernel:
    return kernel_for(verify_spec(SMALL, score=ScoreSpec()))


@pytest.fixture(scope="module")
def problem(kernel: CpuKernel) -> AttentionProblem:
    """Ragged, padding included, with NaN wherever nobody may read and wild entries past every length."""
    return attention_problem(kernel.spec, q_lens=[3, 1, 0, 5], kv_lens=[70, 16, 0, 33], page_size=PAGE, seed=4)


def require_same_results(
    kernel: CpuKernel, problem: AttentionProblem, view: CacheView, tables: PageTable | None = None
) -> None:
    """Verification through the views against the oracle on the plain problem."""
    table, lengths = (problem.page_table, problem.kv_lens) if tables is None else tables
    assert table.dtype == lengths.dtype == torch.int32
    foreign = dataclasses.replace(
        problem, k_cache=view.k_cache, v_cache=view.v_cache, page_table=table, kv_lens=lengths
    )
    call = run(kernel, foreign)
    result = check_attention(kernel.spec, problem, call.out, call.lse, call.scores)
    assert result.passed, result.detail


def test_vllm_packs_k_and_v_side_by_side(kernel: CpuKernel, problem: AttentionProblem) -> None:
    blocks, size, heads, dim = problem.k_cache.shape
    kv_cache = torch.empty(blocks, heads, size, 2 * dim)  # [num_blocks, Hkv, block_size, 2 * D]
    kv_cache[..., :dim] = problem.k_cache.transpose(1, 2)
    kv_cache[..., dim:] = problem.v_cache.transpose(1, 2)
    view = vllm_cache(kv_cache, "packed")
    assert view.k_cache.data_ptr() == kv_cache.data_ptr()
    require_same_results(kernel, problem, view)


def test_vllm_packs_values_of_another_size() -> None:
    kv_cache = torch.arange(5 * 2 * 4 * 7).view(5, 2, 4, 7)
    view = vllm_cache(kv_cache, "packed", head_dim=3)
    assert (view.k_cache.shape, view.v_cache.shape) == ((5, 4, 2, 3), (5, 4, 2, 4))
    assert view.v_cache[2, 1, 1].tolist() == kv_cache[2, 1, 1, 3:].tolist()


@pytest.mark.parametrize(("layout", "axis"), [("kv-first", 0), ("blocks-first", 1)])
def test_older_vllm_stacks_them(kernel: CpuKernel, problem: AttentionProblem, layout: str, axis: int) -> None:
    kv_cache = torch.stack([problem.k_cache, problem.v_cache], dim=axis)
    require_same_results(kernel, problem, vllm_cache(kv_cache, layout))  # type: ignore[arg-type]


@pytest.mark.parametrize("page_size", [1, PAGE])
def test_sglang_has_a_slot_a_token(kernel: CpuKernel, problem: AttentionProblem, page_size: int) -> None:
    k_buffer, v_buffer = problem.k_cache.flatten(0, 1), problem.v_cache.flatten(0, 1)  # [num_slots, Hkv, D]
    req_to_token = torch.full((9, 100), 2**30, dtype=torch.int32)  # [max_reqs, max_context]
    req_pool_indices = torch.tensor([4, 0, 7, 2])
    for request, place in enumerate(req_pool_indices.tolist()):
        for token in range(int(problem.kv_lens[request])):
            page = int(problem.page_table[request, token // PAGE])
            req_to_token[place, token] = page * PAGE + token % PAGE
    table = sglang_page_table(req_to_token, req_pool_indices, max_kv=problem.max_kv, page_size=page_size)
    view = sglang_cache(k_buffer, v_buffer, page_size=page_size)
    assert view.k_cache.shape[1] == page_size
    require_same_results(kernel, problem, view, PageTable(table, problem.kv_lens))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("apart", [False, True])
def test_flashinfer_has_a_list_of_pages(kernel: CpuKernel, problem: AttentionProblem, layout: str, apart: bool) -> None:
    pools = [problem.k_cache, problem.v_cache]
    if layout == "HND":
        pools = [pool.transpose(1, 2).contiguous() for pool in pools]
    kv_cache = (pools[0], pools[1]) if apart else torch.stack(pools, dim=1)  # [num_pages, 2, ...]
    view = flashinfer_cache(kv_cache, layout)  # type: ignore[arg-type]
    pages = page_list_of(problem.page_table, problem.kv_lens, page_size=PAGE)
    assert pages.indptr.tolist() == [0, 5, 6, 6, 9]
    assert pages.last_page_len.tolist() == [6, 16, 0, 1]
    assert pages.indices.tolist() == [
        page for row, count in enumerate((5, 1, 0, 3)) for page in problem.page_table[row, :count].tolist()
    ]
    for bound in (None, 7):
        tables = page_table_of(pages, page_size=PAGE, max_pages=bound)
        require_same_results(kernel, problem, view, tables)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=5), st.integers(1, 7))
def test_a_table_goes_to_a_list_and_back(lengths: list[int], page_size: int) -> None:
    kv_lens = torch.tensor(lengths, dtype=torch.int32)
    table = torch.arange(len(lengths) * 41, dtype=torch.int32).view(len(lengths), 41) + 3
    found = page_table_of(page_list_of(table, kv_lens, page_size=page_size), page_size=page_size)
    assert torch.equal(found.kv_lens, kv_lens)
    for request, length in enumerate(lengths):
        count = -(-length // page_size)
        assert torch.equal(found.page_table[request, :count], table[request, :count])
        assert not found.page_table[request, count:].any()


def test_our_cache_is_what_the_others_expect_and_its_rows_are_vllms_slot_mapping() -> None:
    heads = HeadConfig(num_q_heads=2, num_kv_heads=2, head_dim=4)
    cache = PagedCache(heads, layers=2, num_pages=20, page_size=4, batch=3, dtype=torch.float32)
    cache.extend([9, 0, 5])
    rows = cache.extend([2, 0, 4])
    slot_mapping = [
        int(rows.page_table[request, position // 4]) * 4 + position % 4
        for request, position in zip(rows.requests.tolist(), rows.positions.tolist(), strict=True)
    ]
    assert rows.slots.tolist() == slot_mapping
    pages = page_list_of(cache.page_table, rows.kv_lens, page_size=4)
    assert pages.indices.tolist() == [*cache.pages(0), *cache.pages(2)]
    view = flashinfer_cache((cache.keys[1], cache.values[1]))
    assert view.k_cache.data_ptr() == cache.keys[1].data_ptr()


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda: vllm_cache(torch.zeros(3, 2, 4, 5), "packed"), "packs 5 values a key: give head_dim"),
        (lambda: vllm_cache(torch.zeros(3, 2, 4, 6), "packed", head_dim=6), "head_dim=6: must leave some of the 6"),
        (
            lambda: vllm_cache(torch.zeros(3, 2, 4, 6), "kv-first"),
            r"shape \(3, 2, 4, 6\): this layout has 5 axes with 2",
        ),
        (lambda: vllm_cache(torch.zeros(3, 2, 4, 6, 8), "kv-first"), r"\(3, 2, 4, 6, 8\)"),
        (lambda: vllm_cache(torch.zeros(3, 2, 4, 6), "NHD"), "layout='NHD': must be one of packed"),  # type: ignore[arg-type]
        (lambda: sglang_cache(*[torch.zeros(10, 2, 4)] * 2, page_size=4), "page_size=4: must divide the 10 slots"),
        (lambda: sglang_cache(*[torch.zeros(10, 1, 2, 4)] * 2), r"k_buffer has shape \(10, 1, 2, 4\)"),
        (
            lambda: sglang_page_table(torch.zeros(4, 9), torch.tensor([1]), max_kv=10),
            "max_kv=10: must be 1 .. 9, the tokens req_to_token has room for",
        ),
        (lambda: flashinfer_cache(torch.zeros(4, 3, 2, 4, 8)), r"\(4, 3, 2, 4, 8\)"),
        (lambda: flashinfer_cache((torch.zeros(4, 3, 2), torch.zeros(4, 3, 2))), r"k_cache has shape \(4, 3, 2\)"),
    ],
)
def test_caches_that_are_not_of_the_layout(convert: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        convert()  # type: ignore[operator]
