"""Triton's select_kv: exact on every input, compared with the sorting oracle index by index."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_codegen.build import triton
from specattn_codegen.check import check_selection
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import SelectCall
from specattn_codegen.plan import Plan
from specattn_codegen.policy import TopK, selection_width
from specattn_codegen.problems import random_scores
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreHeads
from triton_cases import DEVICE

HEADS = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32)
INFINITY, DENORMAL = math.inf, 1e-45


def select_kernel(selection: ScoreHeads = "kv_head", radix_bits: int = 8) -> triton.SelectKernel:
    spec = KernelSpec(op="select_kv", heads=HEADS, selection=selection)
    kernel = triton.load(render(spec, Plan.of("triton", block_n=1024, num_warps=4, radix_bits=radix_bits), "triton"))
    assert isinstance(kernel, triton.SelectKernel)
    return kernel


def select(
    kernel: triton.SelectKernel,
    scores: torch.Tensor,
    prefixes: list[int],
    policy: TopK,
    sink: int = 0,
    recent: int = 0,
    extra_columns: int = 0,
) -> SelectCall:
    batch, rows, columns = scores.shape
    width = selection_width(policy, columns, sink, recent) + extra_columns
    call = SelectCall(
        scores=scores.to(DEVICE),
        prefix_lens=torch.tensor(prefixes, dtype=torch.int32, device=DEVICE),
        policy=policy,
        sink=sink,
        recent=recent,
        indices=torch.full((batch, rows, width), 2**30, dtype=torch.int32, device=DEVICE),
        counts=torch.full((batch, rows), 2**30, dtype=torch.int32, device=DEVICE),
    )
    kernel.launch(call, torch.empty(0, dtype=torch.uint8, device=DEVICE))
    return call


def assert_exact(
    kernel: triton.SelectKernel,
    scores: torch.Tensor,
    prefixes: list[int],
    policy: TopK,
    sink: int = 0,
    recent: int = 0,
) -> None:
    call = select(kernel, scores, prefixes, policy, sink, recent)
    assert check_selection(call).passed, call


@pytest.mark.triton_sample
@pytest.mark.parametrize("radix_bits", [4, 8])
@pytest.mark.parametrize("policy", [TopK(k=70), TopK(k=5000), TopK(ratio=0.05, min=30, max=90)], ids=str)
@pytest.mark.parametrize("forced", [(0, 0), (4, 64), (100, 2000)], ids=str)
def test_attention_like_scores(forced: tuple[int, int], policy: TopK, radix_bits: int) -> None:
    prefixes = [1500, 0, -7, 1024, 33, 2100]  # whole tiles, parts of them, nothing, and past the columns
    scores = random_scores(len(prefixes), 2, [min(p, 2050) for p in prefixes], 2050, seed=1)
    assert_exact(select_kernel(radix_bits=radix_bits), scores, prefixes, policy, *forced)


ADVERSARIAL = {
    "constant": [0.25] * 40,
    "two values": [0.5, 0.25] * 20,
    "ascending": [j / 64 for j in range(40)],
    "descending": [-j / 64 for j in range(40)],
    "signed zeros": [0.0, -0.0] * 20,
    "infinities": [INFINITY, -INFINITY, 0.0, 1.0] * 10,
    "nan below -inf": [math.nan, -INFINITY, math.nan, -1.0] * 10,
    "all nan": [math.nan] * 40,
    "denormals": [DENORMAL * (j % 5) for j in range(40)],
    "one bucket": [1.0 + 2.0**-23 * (j % 7) for j in range(40)],
}


@pytest.mark.parametrize("k", [1, 7, 20, 39, 40])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_scores(name: str, k: int) -> None:
    scores = torch.tensor(ADVERSARIAL[name]).expand(1, 1, 40)
    assert_exact(select_kernel("layer"), scores, [40], TopK(k=k), sink=k % 3, recent=k % 2)


def test_ties_that_span_tiles_go_to_the_smaller_index() -> None:
    scores = torch.full((1, 1, 3000), 0.5)
    scores[0, 0, 2900] = 1.0
    chosen = select(select_kernel("layer"), scores, [3000], TopK(k=1500))
    assert chosen.indices[0, 0].tolist() == [*range(1499), 2900]


def test_forced_keys_stay_where_the_budget_is_smaller() -> None:
    scores = torch.rand(1, 1, 50, generator=torch.Generator().manual_seed(0))
    chosen = select(select_kernel("layer"), scores, [50], TopK(k=3), sink=4, recent=4)
    assert chosen.indices[0, 0].tolist() == [0, 1, 2, 3, 46, 47, 48, 49]
    assert chosen.counts.item() == 8


def test_columns_past_the_selection_are_minus_one() -> None:
    scores = random_scores(2, 2, [9, 0], 1200, seed=2)
    chosen = select(select_kernel(), scores, [9, 0], TopK(k=1100), extra_columns=40)
    assert chosen.counts.tolist() == [[9, 9], [0, 0]]
    assert chosen.indices[0, :, :9].tolist() == [list(range(9))] * 2
    assert (chosen.indices[0, :, 9:] == -1).all()
    assert (chosen.indices[1] == -1).all()


def test_the_ratio_is_taken_in_64_bits() -> None:
    """ratio_ppm * prefix passes 2^31 from a prefix of 2,148 keys on."""
    scores = random_scores(1, 1, [3000], 3000, seed=3)
    for ratio in (1.0, 0.999999, 0.5, 1e-6):
        assert_exact(select_kernel("layer"), scores, [3000], TopK(ratio=ratio))


def test_scores_may_be_a_view() -> None:
    wide = random_scores(2, 2, [90, 90], 200, seed=4)
    view = wide[:, :, 50:140]
    assert_exact(select_kernel(), view, [90, 64], TopK(k=10), sink=1, recent=3)


SCORE = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True), st.sampled_from([0.0, -0.0, 0.5])
)


@settings(max_examples=40, deadline=None)
@given(
    row=st.lists(SCORE, min_size=1, max_size=60),
    k=st.integers(1, 70),
    sink=st.integers(0, 6),
    recent=st.integers(0, 6),
    shorter_by=st.integers(0, 5),
)
def test_any_scores(row: list[float], k: int, sink: int, recent: int, shorter_by: int) -> None:
    scores = torch.tensor(row).view(1, 1, -1)
    assert_exact(select_kernel("layer"), scores, [len(row) - shorter_by], TopK(k=k), sink, recent)
