"""What sparse attention promises for any selection, on every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch

import cases
import triton_cases
from specattn_codegen import reference
from specattn_codegen.check import check_attention
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall
from specattn_codegen.problems import AttentionProblem, attention_problem
from specattn_codegen.spec import Dtype, KernelSpec, Op, ScoreHeads

Backend = Literal["cpu", "triton"]
Run = Callable[[AttentionProblem], AttentionCall]
PAGE_SIZE = 16
HEADS = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32)

on_every_backend = pytest.mark.parametrize("backend", get_args(Backend))


def spec_of(
    backend: Backend,
    heads: HeadConfig = HEADS,
    selection: ScoreHeads = "kv_head",
    op: Op = "sparse_attention",
    dtype: Dtype = "float32",
) -> KernelSpec:
    page_size = PAGE_SIZE if backend == "triton" else 0
    return KernelSpec(op=op, heads=heads, dtype=dtype, page_size=page_size, selection=selection)


def runner(backend: Backend, spec: KernelSpec) -> Run:
    """Launches a problem on a workspace of NaN bit patterns."""
    if backend == "cpu":
        kernel = cases.kernel_for(spec)
        return lambda problem: cases.run(kernel, problem)
    attention = triton_cases.attention_kernel(spec)
    return lambda problem: triton_cases.run(attention, problem)


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


def test_a_mixed_batch_reads_slots() -> None:
    spec = spec_of("cpu", op="mixed_attention")
    run = runner("cpu", spec)
    problem = attention_problem(spec, q_lens=[3, 1, 2], kv_lens=[70, 90, 33], page_size=PAGE_SIZE, seed=3, budget=20)
    placed = with_slots(problem, torch.int64)
    placed.page_table[::2] = problem.page_table[::2]  # of the requests that verify
    translated, found = run(problem), run(placed)
    assert torch.equal(found.out, translated.out)
    assert torch.equal(found.lse, translated.lse)
