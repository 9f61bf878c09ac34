"""Triton's select_kv: exact by every policy, in one block a row and in several, compared with the sorting oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from select_cases import MASSES, NAN, SCORES, any_mass, any_score, call_of, rows_of, threshold, top_k, top_p
from specattn_codegen.build import triton
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import SelectCall
from specattn_codegen.plan import Plan
from specattn_codegen.policy import Policy, Threshold, TopK, TopP
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import check_selection
from specattn_codegen.proof.problems import random_scores
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec
from triton_cases import DEVICE

SPEC = KernelSpec(op="select_kv", heads=HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32), selection="kv_head")
MANY_SMS = 64


def select_kernel(max_splits: int = 1, radix_bits: int = 8, block_n: int = 64) -> triton.SelectKernel:
    """Small tiles, so that short rows have several."""
    plan = Plan.of("triton", block_n=block_n, num_warps=4, radix_bits=radix_bits, max_splits=max_splits)
    kernel = triton.load(render(SPEC, plan, "triton"))
    assert isinstance(kernel, triton.SelectKernel)
    return kernel


@pytest.fixture(scope="module", params=[1, 4], ids=["one block", "several blocks"])
def kernel(request: pytest.FixtureRequest) -> triton.SelectKernel:
    return select_kernel(max_splits=request.param, block_n=64 if request.param == 1 else 32)


@pytest.fixture(autouse=True)
def many_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows are shared by several blocks wherever the plan allows it."""
    monkeypatch.setattr(triton, "num_sms", lambda _: MANY_SMS)


def select(
    kernel: triton.SelectKernel, scores: torch.Tensor, prefixes: list[int], policy: Policy, **arguments: object
) -> SelectCall:
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    call = call_of(scores.to(DEVICE), prefixes, policy, **moved)
    launch(kernel, call)
    return call


def launch(kernel: triton.SelectKernel, call: SelectCall) -> None:
    kernel.launch(call, torch.full((kernel.workspace_bytes(call),), 0xFF, dtype=torch.uint8, device=DEVICE))


POLICIES = [
    TopK(k=70),
    TopK(k=5000),
    TopK(ratio=0.05, min=30, max=90),
    TopP(0.9),
    TopP(1.0),
    TopP(0.5, min=40),
    TopP(0.99, max=25),
    TopP(0.95, bisection_steps=6),
    Threshold(0.01),
]


@pytest.mark.triton_sample
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_attention_like_scores(policy: Policy) -> None:
    prefixes = [500, 0, 33]  # past the columns, nothing, and part of a tile
    scores = random_scores(len(prefixes), 1, [min(p, 145) for p in prefixes], 145, seed=1)
    assert check_selection(select(select_kernel(), scores, prefixes, policy, sink=4, recent=20)).passed


@pytest.mark.parametrize("policy", [TopK(ratio=0.2), TopP(0.9), TopP(0.99, max=9)], ids=str)
def test_rows_shared_by_several_blocks(policy: Policy) -> None:
    """One row in four whole tiles, one that ends in the first."""
    scores = random_scores(2, 1, [128, 20], 130, seed=8)
    kernel = select_kernel(max_splits=4, block_n=32)
    assert check_selection(select(kernel, scores, [128, 20], policy, sink=2, recent=5)).passed


def test_adversarial_scores() -> None:
    scores = torch.stack([make(90) for make in SCORES.values()])[:, None]
    assert check_selection(select(select_kernel(), scores, [88] * len(SCORES), Threshold(0.25), recent=2)).passed


@pytest.mark.parametrize("policy", [TopP(0.95), TopP(0.6, max=9), TopP(0.9, bisection_steps=4)], ids=str)
def test_adversarial_masses(policy: TopP) -> None:
    scores = torch.stack([make(90) for make in MASSES.values()])[:, None]
    assert check_selection(select(select_kernel(), scores, [88] * len(MASSES), policy, sink=1, recent=2)).passed


ANY_INPUT = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", ["k", "p", "threshold"])
@ANY_INPUT
@given(data=st.data())
def test_any_input(kernel: triton.SelectKernel, kind: str, data: st.DataObject) -> None:
    policy = data.draw({"k": top_k, "p": top_p, "threshold": threshold}[kind])
    columns, block = data.draw(st.integers(1, 140)), data.draw(st.sampled_from([1, 1, 4]))
    prefix = data.draw(st.integers(max(0, columns * block - 40), columns * block))
    scores = rows_of(data, any_mass if kind == "p" else any_score, (1, 1, columns))
    sink, recent = data.draw(st.integers(0, 9)) * block, data.draw(st.integers(0, 9)) * block
    call = select(kernel, scores, [prefix], policy, sink=sink, recent=recent, block=block)
    assert check_selection(call).passed, call


def test_digits_of_four_bits() -> None:
    scores = random_scores(1, 2, [300], 300, seed=2)
    call = select(select_kernel(radix_bits=4), scores, [300], TopK(k=50), sink=2, recent=3)
    assert check_selection(call).passed


def test_the_ratio_is_taken_in_64_bits() -> None:
    """ratio_ppm * prefix passes 2^31 from a prefix of 2,148 keys on."""
    scores = random_scores(1, 1, [3000], 3000, seed=3)
    for ratio in (0.999999, 1e-6):
        assert check_selection(select(select_kernel(block_n=1024), scores, [3000], TopK(ratio=ratio))).passed


def test_layers_thresholds_slots_and_views_in_one_launch(kernel: triton.SelectKernel) -> None:
    """A leading layer axis, scores that are a view, a threshold for each layer and head, and 64-bit slots of blocks."""
    wide = random_scores(2 * 3, 2, [180] * 6, 180, seed=4).view(2, 3, 2, 180)
    values = torch.tensor([[[0.02, 0.05]], [[0.1, NAN]]])
    table = torch.randint(-1, 2**31 - 1, (3, 20), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    call = select(
        kernel,
        wide[..., 30:170],
        [560, 0, 437],
        Threshold(values.to(DEVICE)),
        sink=3,
        recent=9,
        block=4,
        page_table=table,
        page_size=32,
        slot_dtype=torch.int64,
    )
    assert call.slots is not None
    assert int(call.slots.max()) > 2**31
    assert check_selection(call).passed


def test_a_histogram_replaces_the_first_digits(kernel: triton.SelectKernel) -> None:
    prefixes = [140, 7, 120]
    scores = random_scores(3, 1, prefixes, 140, seed=6)
    scores[2] = 0.0  # every key in the lowest bin
    written = torch.arange(140) < torch.tensor(prefixes)[:, None, None]
    histogram = reference.count_scores(torch.where(written, scores, NAN))
    call = select(kernel, scores, prefixes, TopK(k=60), sink=5, recent=30, histogram=histogram)
    assert check_selection(call).passed


def test_what_is_no_mass_harms_no_memory(kernel: triton.SelectKernel) -> None:
    """On a GPU nobody looks at the scores first: the forced keys come, ascending indices and a count that fits."""
    scores = torch.stack([SCORES[name](90) for name in ("infinities", "all NaN", "signs", "all minus infinity")])
    call = select(kernel, scores[:, None], [90] * 4, TopP(0.5, max=40), sink=2, recent=2)
    for indices, count in zip(call.indices.flatten(0, 1).tolist(), call.counts.flatten().tolist(), strict=True):
        assert {0, 1, 88, 89} <= set(indices)
        assert indices[:count] == sorted(set(indices[:count]))
        assert indices[count:] == [-1] * (len(indices) - count)


@pytest.mark.parametrize(
    ("rows", "columns", "splits"), [(1, 4096, 16), (8, 131072, 16), (8, 700, 1), (64, 131072, 1), (16, 512 * 64, 8)]
)
def test_blocks_of_a_row_fill_the_device_and_no_more(rows: int, columns: int, splits: int) -> None:
    assert select_kernel(max_splits=16, block_n=256).module.num_splits(rows, columns, 132) == splits
