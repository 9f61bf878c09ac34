"""What sparse attention promises for any selection, on every backend.

Properties by number, and what holds each; `cpu:` is tests/test_cpu_attention.py, `triton:` test_triton_attention.py,
`select:` test_select_properties.py.

27  counts are what is read              test_nothing_past_a_rows_count_is_read
31  everything selected is verification  test_everything_selected_is_verification, test_keys_may_come_in_any_order
                                         cpu: test_sparse_attention_equals_the_oracle
32  repeats, -1, what is nowhere         test_a_repeated_key_counts_as_often, test_untidy_selections_are_harmless
                                         test_a_slot_outside_the_cache_selects_nothing
33  counts per head, merging             test_parts_merge_by_their_log_sum_exp
34  rows see the tail up to themselves   test_a_key_reaches_exactly_the_rows_and_heads_that_see_it
35  a block is its keys                  test_a_block_is_its_keys
36  splits follow the count              test_nothing_past_a_rows_count_is_read
                                         triton: test_sparse_splits_give_the_same
37  8-bit caches                         test_everything_selected_is_verification
                                         cpu: test_8_bit_caches_with_scales_on_every_instruction_set
38  a partial page anywhere in the list  test_a_partial_page_may_stand_anywhere_in_the_list

and slots, which say where selected keys are: test_slots_give_the_bits_of_the_page_table, test_a_mixed_batch_reads_slots
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch

import cases
import triton_cases
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.results import VerifyOutput
from specattn_codegen.spec import Dtype, KernelSpec, KvDtype, Op, ScoreHeads

Backend = Literal["cpu", "triton", "tilelang"]
Run = Callable[[AttentionProblem], AttentionCall]
PAGE_SIZE = 16
HEADS = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32)
BOTH = 2.0  # tolerances by which two kernels may differ, each within one of the oracle

on_every_backend = pytest.mark.parametrize("backend", get_args(Backend))


def spec_of(
    backend: Backend,
    heads: HeadConfig = HEADS,
    selection: ScoreHeads | None = "kv_head",
    op: Op = "sparse_attention",
    dtype: Dtype = "float32",
    kv_dtype: KvDtype | None = None,
) -> KernelSpec:
    page_size = 0 if backend == "cpu" else PAGE_SIZE
    if backend == "tilelang":
        dtype = "float16"  # of its products
    return KernelSpec(op=op, heads=heads, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size, selection=selection)


@functools.cache
def runner(backend: Backend, spec: KernelSpec) -> Run:
    """Launches a problem on a workspace of NaN bit patterns."""
    if backend == "cpu":
        kernel = cases.kernel_for(spec)
        return lambda problem: cases.run(kernel, problem)
    if backend == "tilelang":
        pytest.importorskip("tilelang", reason="TileLang is not installed")
        twins = importlib.import_module("tilelang_cases")
        twin = twins.twin(spec)
        return lambda problem: twins.run(twin, problem)
    attention = triton_cases.attention_kernel(spec)
    return lambda problem: triton_cases.run(attention, problem)


def selection_of(problem: AttentionProblem) -> tuple[torch.Tensor, torch.Tensor]:
    assert problem.indices is not None
    assert problem.counts is not None
    return problem.indices, problem.counts


def selecting(problem: AttentionProblem, indices: torch.Tensor, counts: torch.Tensor | None = None) -> AttentionProblem:
    return dataclasses.replace(problem, indices=indices, counts=problem.counts if counts is None else counts)


def same_bits(one: AttentionCall, other: AttentionCall) -> bool:
    return torch.equal(one.out, other.out) and torch.equal(one.lse, other.lse)


def disagreement(spec: KernelSpec, problem: AttentionProblem, call: AttentionCall, expected: AttentionCall) -> float:
    """The largest difference of two kernels' results, as a multiple of one kernel's tolerance."""
    wanted = VerifyOutput(expected.out.cpu().double(), expected.lse.cpu().double(), None)
    return check_attention(spec, problem, call.out, call.lse, expected=wanted).worst


FEATURES = dataclasses.replace(HEADS, window=60, softcap=5.0, sinks=True)
EVERYTHING: dict[str, tuple[HeadConfig, ScoreHeads, int, Dtype, KvDtype | None]] = {
    "keys": (HEADS, "kv_head", 1, "float32", None),
    "pages of a layer": (HEADS, "layer", PAGE_SIZE, "float32", None),
    "keys of a layer, window, softcap and sinks": (FEATURES, "layer", 1, "float16", None),
    "pages, window, softcap and sinks": (FEATURES, "kv_head", PAGE_SIZE, "float16", None),
    "keys of an 8-bit cache": (HEADS, "kv_head", 1, "float32", "float8_e4m3"),
    "pages of an 8-bit cache's layer": (HEADS, "layer", PAGE_SIZE, "float32", "float8_e4m3"),
}


@pytest.mark.parametrize("name", EVERYTHING)
@on_every_backend
def test_everything_selected_is_verification(backend: Backend, name: str) -> None:
    """The last page selected reaches into the tail; its keys of the tail count once."""
    heads, selection, block, dtype, kv_dtype = EVERYTHING[name]
    sparse = spec_of(backend, heads, selection, dtype=dtype, kv_dtype=kv_dtype)
    verify = spec_of(backend, heads, None, "verify_attention", dtype, kv_dtype)
    problem = attention_problem(
        sparse,
        q_lens=[3, 1, 2, 1],
        kv_lens=[105, 64, 2, 0],
        page_size=PAGE_SIZE,
        seed=4,
        budget=110,
        block=block,
        magnitude=3.0,
    )
    selected, seen = runner(backend, sparse)(problem), runner(backend, verify)(problem)
    assert disagreement(verify, problem, selected, seen) <= BOTH


@on_every_backend
def test_keys_may_come_in_any_order(backend: Backend) -> None:
    spec = spec_of(backend)
    problem = attention_problem(spec, q_lens=[2], kv_lens=[90], page_size=PAGE_SIZE, seed=5, budget=60)
    indices, _ = selection_of(problem)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    call = runner(backend, spec)(selecting(problem, indices[:, :, order]))
    result = check_attention(spec, problem, call.out, call.lse)
    assert result.passed, result.detail


@on_every_backend
def test_a_repeated_key_counts_as_often(backend: Backend) -> None:
    """Nothing else is selected and there is no tail: n times one key is that key, with a log-sum-exp larger by ln n."""
    spec = spec_of(backend)
    problem = attention_problem(spec, q_lens=[1], kv_lens=[40], page_size=PAGE_SIZE, seed=6, budget=5)
    problem = dataclasses.replace(problem, tail_start=torch.tensor([40], dtype=torch.int32))
    run, indices = runner(backend, spec), torch.full((1, 2, 5), 17, dtype=torch.int32)
    once = run(selecting(problem, indices, torch.ones(1, 2, dtype=torch.int32)))
    often = run(selecting(problem, indices, torch.full((1, 2), 5, dtype=torch.int32)))
    expected = dataclasses.replace(once, lse=once.lse + math.log(5.0))
    assert disagreement(spec, problem, often, expected) <= BOTH


@on_every_backend
def test_untidy_selections_are_harmless(backend: Backend) -> None:
    """Keys of the tail, -1 in the middle and a count past the width select nothing more."""
    spec = spec_of(backend)
    problem = attention_problem(spec, q_lens=[2], kv_lens=[80], page_size=PAGE_SIZE, seed=11, budget=40)
    indices, counts = selection_of(problem)
    indices[:, :, 10:20] = -1
    indices[:, :, 35:] = torch.tensor([78, 79, 2**31 - 1, 79, 78], dtype=torch.int32)
    tidy = indices.clone()
    tidy[:, :, 10:20] = tidy[:, :, 20:30]  # repeats of chosen keys mean nothing to the oracle
    tidy[:, :, 35:] = tidy[:, :, 30:35]
    call = runner(backend, spec)(selecting(problem, indices, torch.full_like(counts, 10**6)))
    result = check_attention(spec, selecting(problem, tidy), call.out, call.lse)
    assert result.passed, result.detail


@on_every_backend
def test_nothing_past_a_rows_count_is_read(backend: Backend) -> None:
    """Counts of their own for every head, none among them; wider rows full of other keys, and the same bits."""
    spec = spec_of(backend)
    problem = attention_problem(spec, q_lens=[2, 1, 1], kv_lens=[200, 90, 40], page_size=PAGE_SIZE, seed=7, budget=150)
    indices, counts = selection_of(problem)
    counts[:] = torch.tensor([[150, 3], [0, 89], [31, 0]])
    inside = torch.arange(150) < counts[:, :, None]
    padded = selecting(problem, torch.where(inside, indices, -1))
    wild = torch.where(torch.arange(170) < counts[:, :, None], torch.nn.functional.pad(indices, (0, 20)), 5)
    run = runner(backend, spec)
    call = run(padded)
    assert same_bits(run(selecting(problem, wild)), call)
    result = check_attention(spec, padded, call.out, call.lse)
    assert result.passed, result.detail


@on_every_backend
def test_parts_merge_by_their_log_sum_exp(backend: Backend) -> None:
    """Selected keys alone and the tail alone; where a head selects nothing, its part is 0 and -inf, sink or not."""
    spec = spec_of(backend)
    problem = attention_problem(spec, q_lens=[2, 1], kv_lens=[90, 40], page_size=PAGE_SIZE, seed=8, budget=12)
    indices, counts = selection_of(problem)
    counts[:] = torch.tensor([[12, 0], [0, 5]])
    run, nothing = runner(backend, spec), torch.zeros_like(counts)
    whole = run(problem)
    selected = run(dataclasses.replace(problem, tail_start=problem.kv_lens))
    tail = run(selecting(problem, indices, nothing))
    empty = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)  # [row, query head]
    assert (selected.lse[empty] == -math.inf).all()
    assert (selected.out[empty] == 0).all()
    lse = torch.logaddexp(selected.lse, tail.lse)
    merged = sum(part.out * torch.exp(part.lse - lse)[..., None] for part in (selected, tail))
    assert isinstance(merged, torch.Tensor)
    assert disagreement(spec, problem, whole, dataclasses.replace(whole, out=merged, lse=lse)) <= BOTH
    sinking = runner(backend, spec_of(backend, dataclasses.replace(HEADS, sinks=True)))
    alone = sinking(dataclasses.replace(problem, tail_start=problem.kv_lens, counts=nothing, sinks=torch.ones(4)))
    assert (alone.lse == -math.inf).all()
    assert (alone.out == 0).all()


@on_every_backend
def test_a_key_reaches_exactly_the_rows_and_heads_that_see_it(backend: Backend) -> None:
    """A larger value of one key changes the rows that see it: of the tail, those at it or later; of the selection, all
    rows of the heads that chose it."""
    spec = spec_of(backend)
    problem = attention_problem(spec, q_lens=[4], kv_lens=[70], page_size=PAGE_SIZE, seed=9, budget=6)
    problem = dataclasses.replace(problem, tail_start=torch.tensor([61], dtype=torch.int32))  # 5 of earlier rounds
    indices, _ = selection_of(problem)
    indices[0] = torch.tensor([[3, 8, 20, 33, 47, 60], [2, 8, 19, 34, 48, 59]])
    run = runner(backend, spec)
    before = run(problem).out
    for key in (3, 4, 8, 59, 60, 61, 65, 66, 68, 69):
        moved = problem.v_cache.clone(memory_format=torch.preserve_format)
        moved[int(problem.page_table[0, key // PAGE_SIZE]), key % PAGE_SIZE] += 1000.0
        changed = (run(dataclasses.replace(problem, v_cache=moved)).out != before).all(dim=-1)
        sees_head = torch.tensor([key >= 61 or key in row for row in indices[0].tolist()]).repeat_interleave(2)
        sees_row = torch.arange(66, 70) >= key
        assert torch.equal(changed.cpu(), sees_row[:, None] & sees_head), key


@pytest.mark.parametrize("selection", get_args(ScoreHeads))
@on_every_backend
def test_a_block_is_its_keys(backend: Backend, selection: ScoreHeads) -> None:
    spec = spec_of(backend, selection=selection)
    problem = attention_problem(spec, q_lens=[2, 1], kv_lens=[98, 65], page_size=PAGE_SIZE, seed=10, budget=9, block=4)
    indices, counts = selection_of(problem)
    keys = (indices[..., None] * 4 + torch.arange(4)).flatten(2)
    by_key = dataclasses.replace(problem, indices=torch.where(keys < 0, -1, keys).int(), counts=4 * counts, block=1)
    run = runner(backend, spec)
    assert same_bits(run(problem), run(by_key))


@on_every_backend
def test_a_partial_page_may_stand_anywhere_in_the_list(backend: Backend) -> None:
    """The tail begins inside the last page, whose unused slots hold NaN; it is selected first, then the others."""
    spec = spec_of(backend)
    problem = attention_problem(
        spec, q_lens=[1], kv_lens=[102], page_size=PAGE_SIZE, seed=12, budget=7, block=PAGE_SIZE
    )
    problem = dataclasses.replace(problem, tail_start=torch.tensor([99], dtype=torch.int32))
    indices, _ = selection_of(problem)
    call = runner(backend, spec)(selecting(problem, indices.flip(-1)))
    result = check_attention(spec, problem, call.out, call.lse)
    assert result.passed, result.detail


def with_slots(problem: AttentionProblem, dtype: torch.dtype) -> AttentionProblem:
    """Slots of the selected blocks, and a page table that says nothing of the pages before the tail."""
    assert problem.indices is not None
    slots = reference.physical_slots(problem.indices, problem.page_table, PAGE_SIZE // problem.block).to(dtype)
    table = problem.page_table.clone()
    for request, tail in enumerate(problem.tail_start.tolist()):
        table[request, : tail // PAGE_SIZE] = 2**31 - 1 - request
    return dataclasses.replace(problem, slots=slots, page_table=table)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("selection", "block"), [("kv_head", 1), ("layer", 4)])
@on_every_backend
def test_slots_give_the_bits_of_the_page_table(
    backend: Backend, selection: ScoreHeads, block: int, slot_dtype: torch.dtype
) -> None:
    """Also where a block of keys reaches into the tail, a row selects nothing, and rows look through a window."""
    spec = spec_of(backend, dataclasses.replace(HEADS, window=60), selection)
    run = runner(backend, spec)
    problem = attention_problem(
        spec, q_lens=[3, 1, 1, 2], kv_lens=[103, 49, 1, 0], page_size=PAGE_SIZE, seed=1, budget=17, block=block
    )
    translated, placed = run(problem), run(with_slots(problem, slot_dtype))
    assert torch.equal(placed.out, translated.out)
    assert torch.equal(placed.lse, translated.lse)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@on_every_backend
def test_a_slot_outside_the_cache_selects_nothing(backend: Backend, slot_dtype: torch.dtype) -> None:
    spec = spec_of(backend)
    problem = attention_problem(spec, q_lens=[2, 1], kv_lens=[90, 40], page_size=PAGE_SIZE, seed=2, budget=12, block=2)
    placed = with_slots(problem, slot_dtype)
    assert problem.indices is not None
    assert placed.slots is not None
    limits = torch.iinfo(slot_dtype)
    last = problem.k_cache.shape[0] * PAGE_SIZE // 2
    placed.slots[:, :, 2:8] = torch.tensor([-1, last, limits.min, limits.max, last + 2**20, -2], dtype=slot_dtype)
    call = runner(backend, spec)(placed)
    problem.indices[:, :, 2:8] = problem.indices[:, :, :1]  # repeats of a chosen block mean nothing to the oracle
    result = check_attention(spec, problem, call.out, call.lse)
    assert result.passed, result.detail


@on_every_backend
def test_a_mixed_batch_reads_slots(backend: Backend) -> None:
    spec = spec_of(backend, op="mixed_attention")
    run = runner(backend, spec)
    problem = attention_problem(spec, q_lens=[3, 1, 2], kv_lens=[70, 90, 33], page_size=PAGE_SIZE, seed=3, budget=20)
    placed = with_slots(problem, torch.int64)
    placed.page_table[::2] = problem.page_table[::2]  # of the requests that verify
    translated, found = run(problem), run(placed)
    assert torch.equal(found.out, translated.out)
    assert torch.equal(found.lse, translated.lse)
