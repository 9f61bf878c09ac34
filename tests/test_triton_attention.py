"""Triton's verification and sparse attention against the float64 oracle: in the interpreter, or on a GPU.

The interpreter's bfloat16 product is wrong, so without a GPU the half-precision kernels are proved in float16.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from cases import HEADS
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import Layout, attention_problem
from specattn_codegen.spec import Dtype, KernelSpec, ScoreHeads, ScoreSpec
from triton_cases import SMALL, attention_kernel, call_of, run, sparse_spec, verdict, verify_spec

# No rows, no keys, padding, rows before every key, one key, several tiles and pages, a tile that ends on a page.
Q_LENS, KV_LENS = [3, 0, 1, 2, 1, 5, 2], [100, 40, 64, 1, -3, 33, 0]

INTERPRETED_HEADS = [shape for shape in HEADS if shape != (40, 8, 128)]  # which adds nothing but minutes

VARIANTS = {
    "window": dataclasses.replace(SMALL, window=37),
    "tiny-window": dataclasses.replace(SMALL, window=1),
    "softcap": dataclasses.replace(SMALL, softcap=2.5),
    "sinks": dataclasses.replace(SMALL, sinks=True),
    "wider-values": dataclasses.replace(SMALL, v_head_dim=48),
    "padded-dims": HeadConfig(num_q_heads=3, num_kv_heads=1, head_dim=112, v_head_dim=96, scale=0.3),
    "everything": dataclasses.replace(SMALL, v_head_dim=24, window=20, softcap=8.0, sinks=True),
}


@pytest.mark.parametrize("shape", INTERPRETED_HEADS, ids=str)
def test_verification_equals_the_oracle(shape: tuple[int, int, int]) -> None:
    dtype: Dtype = "float32" if shape[2] in (32, 80) else "float16"
    score = ScoreSpec(rows="all", heads="kv_head") if dtype == "float32" else ScoreSpec(rows="ends", heads="layer")
    kernel = attention_kernel(verify_spec(HEADS[shape], score, dtype))
    problem = attention_problem(kernel.spec, q_lens=[1, 2], kv_lens=[3, 75], page_size=16, seed=shape[0])
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize("shape", INTERPRETED_HEADS, ids=str)
def test_sparse_attention_equals_the_oracle(shape: tuple[int, int, int]) -> None:
    selection: ScoreHeads = "layer" if shape[0] % 3 == 0 else "kv_head"
    kernel = attention_kernel(sparse_spec(HEADS[shape], selection))
    problem = attention_problem(kernel.spec, q_lens=[1, 2], kv_lens=[3, 75], page_size=16, seed=shape[0], budget=40)
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize("method", ["remat", "dump"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_head_feature_verifies(name: str, method: str) -> None:
    kernel = attention_kernel(verify_spec(VARIANTS[name], ScoreSpec(), "float32"), score_method=method)
    problem = attention_problem(kernel.spec, q_lens=[3, 1, 2, 1], kv_lens=[70, 64, 1, 0], page_size=16, seed=2)
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize("name", VARIANTS)
def test_every_head_feature_drafts(name: str) -> None:
    kernel = attention_kernel(sparse_spec(VARIANTS[name]))
    problem = attention_problem(
        kernel.spec, q_lens=[3, 1, 2, 1], kv_lens=[70, 64, 1, 0], page_size=16, seed=3, budget=35
    )
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_every_page_size_and_layout(page_size: int, layout: Layout) -> None:
    verify = attention_kernel(verify_spec(SMALL, ScoreSpec(), page_size=page_size))
    sparse = attention_kernel(sparse_spec(SMALL, "layer", page_size=page_size))
    for kernel in (verify, sparse):
        problem = attention_problem(
            kernel.spec, q_lens=[2, 1], kv_lens=[67, 64], page_size=page_size, seed=4, budget=33, layout=layout
        )
        result = verdict(kernel, problem)
        assert result.passed, (kernel.spec.op, result.detail)


# (group, head_dim, v_head_dim, page size, rows of each request, keys of the first), each value with others than before.
SHAPES = [
    (1, 64, 64, 1, [1, 16], 40),
    (3, 80, 64, 8, [5], 70),
    (2, 96, 96, 16, [33, 1], 60),
    (5, 112, 128, 32, [7], 90),
    (16, 128, 128, 64, [2], 70),
    (1, 160, 128, 128, [3, 1], 140),
    (7, 192, 128, 880, [4], 900),
    (6, 256, 256, 16, [16], 40),
]
FEATURES = [{}, {"softcap": 5.0}, {"window": 50}, {"sinks": True}, {"window": 30, "softcap": 8.0, "sinks": True}]


@pytest.mark.parametrize("place", range(len(SHAPES)), ids=[str(shape[:4]) for shape in SHAPES])
def test_every_head_dim_group_and_page_size(place: int) -> None:
    group, head_dim, v_head_dim, page_size, q_lens, keys = SHAPES[place]
    heads = HeadConfig(
        num_q_heads=group, num_kv_heads=1, head_dim=head_dim, v_head_dim=v_head_dim, **FEATURES[place % len(FEATURES)]
    )
    layout: Layout = "hnd" if place % 2 or head_dim != v_head_dim else "interleaved"
    for spec in (verify_spec(heads, page_size=page_size), sparse_spec(heads, page_size=page_size)):
        problem = attention_problem(
            spec,
            q_lens=q_lens,
            kv_lens=[keys, 35][: len(q_lens)],
            page_size=page_size,
            seed=place,
            layout=layout,
            budget=30,
        )
        result = verdict(attention_kernel(spec), problem)
        assert result.passed, (spec.op, result.detail)


@pytest.mark.parametrize(("group", "rows"), [(4, 6), *((group, 23 - group) for group in range(8, 16))])
def test_groups_and_rows_that_the_shapes_above_lack(group: int, rows: int) -> None:
    heads = HeadConfig(num_q_heads=group, num_kv_heads=1, head_dim=16)
    for spec in (verify_spec(heads), sparse_spec(heads)):
        problem = attention_problem(spec, q_lens=[rows], kv_lens=[30], page_size=16, seed=group, budget=11)
        result = verdict(attention_kernel(spec, block_m=64), problem)
        assert result.passed, (spec.op, result.detail)


def test_pages_may_be_shared_and_repeated() -> None:
    """Two requests over five pages, named over and over, against a copy of each page for each entry."""
    spec = verify_spec(SMALL, ScoreSpec(), page_size=4)
    kernel = attention_kernel(spec)
    problem = attention_problem(spec, q_lens=[2, 1], kv_lens=[38, 24], page_size=4, seed=9)
    full = problem.page_table[1, :6]
    table = full[torch.arange(problem.page_table.numel()) * 7 % 5].view(2, -1)
    shared = dataclasses.replace(problem, page_table=table)
    copied = dataclasses.replace(
        problem,
        page_table=torch.arange(table.numel(), dtype=torch.int32).view(2, -1),
        k_cache=problem.k_cache[table.flatten().long()],
        v_cache=problem.v_cache[table.flatten().long()],
    )
    one, other = run(kernel, shared), run(kernel, copied)
    assert torch.equal(one.out, other.out)
    assert torch.equal(one.lse, other.lse)
    result = check_attention(spec, shared, one.out, one.lse, one.scores)
    assert result.passed, result.detail


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("layout", get_args(Layout))
def test_descriptors_read_what_pointers_read(layout: Layout, page_size: int) -> None:
    """Also where a split ends inside a page, whose other slots hold NaN, and a tile would begin before its page."""
    heads = HeadConfig(num_q_heads=3, num_kv_heads=1, head_dim=64, window=None if layout == "nhd" else 45)
    spec = verify_spec(heads, ScoreSpec(), page_size=page_size)
    kernel = attention_kernel(spec, kv_load="descriptor", block_n=16, score_method="dump")
    problem = attention_problem(
        spec, q_lens=[2, 1, 3], kv_lens=[101, 64, 2], page_size=page_size, seed=15, layout=layout
    )
    for num_sms in (1, 100):
        result = verdict(kernel, problem, num_sms)
        assert result.passed, result.detail


def test_a_cache_that_descriptors_cannot_take_is_refused() -> None:
    spec = verify_spec(HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=12))
    kernel = attention_kernel(spec, kv_load="descriptor", block_n=16)
    call = call_of(spec, attention_problem(spec, q_lens=[1], kv_lens=[5], page_size=16, seed=0))
    with pytest.raises(SpecError, match=r"k_cache .* multiples of 16 bytes; .* kv_load=pointer"):
        kernel.launch(call, torch.zeros(kernel.workspace_bytes(call), dtype=torch.uint8, device=call.q.device))


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_rows_beyond_one_tile_are_not_truncated(rows: int, block_m: int) -> None:
    heads = HeadConfig(num_q_heads=7, num_kv_heads=1, head_dim=16)
    kernel = attention_kernel(verify_spec(heads, ScoreSpec()), block_m=block_m)
    problem = attention_problem(kernel.spec, q_lens=[rows], kv_lens=[50], page_size=16, seed=rows)
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize("method", ["remat", "dump"])
def test_any_number_of_splits_gives_the_same(method: str) -> None:
    kernel = attention_kernel(verify_spec(SMALL, ScoreSpec(), "float32"), block_n=16, score_method=method)
    problem = attention_problem(kernel.spec, q_lens=[2, 1], kv_lens=[300, 17], page_size=16, seed=5)
    for num_sms in (1, 3, 10**6):
        assert verdict(kernel, problem, num_sms).passed, num_sms
    assert kernel.module.num_splits(2, 2, 304, 1) == 2
    assert kernel.module.num_splits(2, 2, 304, 10**6) == 19  # no more splits than tiles


def test_sparse_splits_give_the_same() -> None:
    kernel = attention_kernel(sparse_spec(SMALL, dtype="float32"), block_n=16)
    problem = attention_problem(kernel.spec, q_lens=[2, 1], kv_lens=[300, 17], page_size=16, seed=6, budget=150)
    for num_sms in (1, 3, 10**6):
        assert verdict(kernel, problem, num_sms).passed, num_sms


def test_two_runs_are_bitwise_equal() -> None:
    for spec in (verify_spec(SMALL, ScoreSpec(heads="layer")), sparse_spec(SMALL)):
        kernel = attention_kernel(spec)
        problem = attention_problem(spec, q_lens=[2, 1], kv_lens=[90, 33], page_size=16, seed=8, budget=30)
        first, second = run(kernel, problem), run(kernel, problem)
        assert torch.equal(first.out, second.out)
        assert torch.equal(first.lse, second.lse)
        if first.scores is not None and second.scores is not None:
            assert torch.equal(first.scores.nan_to_num(-1), second.scores.nan_to_num(-1))


@pytest.mark.parametrize("block", [3, 16])
@pytest.mark.parametrize("selection", get_args(ScoreHeads))
def test_an_index_may_name_a_block_of_keys(selection: ScoreHeads, block: int) -> None:
    """The last block before the tail reaches into it, and those keys count once; wild numbers stand for none."""
    spec = sparse_spec(dataclasses.replace(SMALL, window=60), selection)
    kernel = attention_kernel(spec)
    problem = attention_problem(spec, q_lens=[2, 1], kv_lens=[80, 50], page_size=16, seed=16, budget=5, block=block)
    assert problem.indices is not None
    assert problem.counts is not None
    problem.counts[:] = 5
    problem.indices[:] = torch.tensor([-1, 0, 2, 2**31 - 1, 0])
    problem.indices[:, :, 4] = torch.tensor([[77 // block], [48 // block]])
    call = run(kernel, problem)
    problem.indices[:, :, [0, 3]] = 0  # repeats mean nothing to the oracle
    result = check_attention(spec, problem, call.out, call.lse)
    assert result.passed, result.detail


def test_a_launch_into_strided_outputs() -> None:
    """`out` may be a view: here every other row of a larger tensor, whose other rows stay as they were."""
    kernel = attention_kernel(verify_spec(SMALL))
    problem = attention_problem(kernel.spec, q_lens=[2, 1], kv_lens=[40, 20], page_size=16, seed=12)
    call = call_of(kernel.spec, problem)
    wide = call.out.new_full((2 * call.out.shape[0], *call.out.shape[1:]), 7.0)
    call = dataclasses.replace(call, out=wide[::2])
    kernel.launch(call, torch.zeros(kernel.workspace_bytes(call), dtype=torch.uint8, device=wide.device))
    assert check_attention(kernel.spec, problem, call.out, call.lse).passed
    assert (wide[1::2] == 7.0).all()


def test_an_empty_batch_runs() -> None:
    for spec in (verify_spec(SMALL, ScoreSpec()), sparse_spec(SMALL)):
        kernel = attention_kernel(spec)
        call = run(kernel, attention_problem(spec, q_lens=[0], kv_lens=[0], page_size=16, seed=13, budget=4))
        assert call.out.numel() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_bfloat16_on_a_gpu(shape: tuple[int, int, int]) -> None:
    specs: list[KernelSpec] = [
        verify_spec(HEADS[shape], ScoreSpec(), "bfloat16"),
        sparse_spec(HEADS[shape], dtype="bfloat16"),
    ]
    for spec in specs:
        problem = attention_problem(
            spec, q_lens=[5, 1, 9], kv_lens=[3000, 700, 9], page_size=16, seed=shape[0], budget=300
        )
        result = verdict(attention_kernel(spec, block_n=64), problem)
        assert result.passed, (spec.op, result.detail)


def test_the_oracle_sees_what_a_wrong_kernel_would_do() -> None:
    """The comparison itself can fail: one weight off by 1 percent is far outside the tolerance."""
    kernel = attention_kernel(verify_spec(SMALL, ScoreSpec(), "float32"))
    problem = attention_problem(kernel.spec, q_lens=[2], kv_lens=[40], page_size=16, seed=14)
    call = run(kernel, problem)
    assert call.scores is not None
    call.scores[0, 0, 5] *= 1.01
    assert not check_attention(kernel.spec, problem, call.out, call.lse, call.scores).passed
