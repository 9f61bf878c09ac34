"""TileLang's select_kv: exact by every policy, in one block a row and in several, compared with the sorting oracle by
the same rendered text through TileLang's C target."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from select_cases import MASSES, NAN, SCORES, any_mass, any_score, call_of, rows_of, threshold, top_k, top_p
from specattn_codegen.kernel import SelectCall
from specattn_codegen.policy import Policy, Threshold, TopK, TopP
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import check_selection
from specattn_codegen.proof.problems import random_scores

pytest.importorskip("tilelang", reason="TileLang is not installed")

from specattn_codegen.build.tilelang import SelectKernel
from tilelang_cases import MANY_SMS, select_twin


# Compiled once: what TileLang takes half a minute for differs in nothing but the device it stands for.
@pytest.fixture(scope="module")
def shared() -> SelectKernel:
    return select_twin()


@pytest.fixture(params=[1, MANY_SMS], ids=["one block", "several blocks"])
def kernel(shared: SelectKernel, request: pytest.FixtureRequest) -> SelectKernel:
    return dataclasses.replace(shared, num_sms=request.param)


def select(
    kernel: SelectKernel, scores: torch.Tensor, prefixes: list[int], policy: Policy, **arguments: object
) -> SelectCall:
    """Launches on a workspace of NaN bit patterns."""
    call = call_of(scores, prefixes, policy, **arguments)
    kernel.launch(call, torch.full((kernel.workspace_bytes(call),), 0xFF, dtype=torch.uint8))
    return call


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


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_attention_like_scores(kernel: SelectKernel, policy: Policy) -> None:
    prefixes = [500, 0, 33, 256]  # past the columns, nothing, part of a tile, and whole tiles
    scores = random_scores(len(prefixes), 1, [min(p, 345) for p in prefixes], 345, seed=1)
    for sink, recent in ((4, 20), (0, 0), (90, 300)):
        result = check_selection(select(kernel, scores, prefixes, policy, sink=sink, recent=recent))
        assert result.passed, result.detail


@pytest.mark.parametrize("policy", [TopK(k=60), TopK(k=3), Threshold(0.25), Threshold(-float("inf"))], ids=str)
def test_adversarial_scores(kernel: SelectKernel, policy: Policy) -> None:
    scores = torch.stack([make(290) for make in SCORES.values()])[:, None]
    result = check_selection(select(kernel, scores, [288] * len(SCORES), policy, recent=2))
    assert result.passed, result.detail


@pytest.mark.parametrize("policy", [TopP(0.95), TopP(0.6, max=9), TopP(0.9, bisection_steps=4)], ids=str)
def test_adversarial_masses(kernel: SelectKernel, policy: TopP) -> None:
    scores = torch.stack([make(290) for make in MASSES.values()])[:, None]
    result = check_selection(select(kernel, scores, [288] * len(MASSES), policy, sink=1, recent=2))
    assert result.passed, result.detail


@pytest.mark.parametrize("kind", ["k", "p", "threshold"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_input(kernel: SelectKernel, kind: str, data: st.DataObject) -> None:
    """Unions of rows among them."""
    policy = data.draw({"k": top_k, "p": top_p, "threshold": threshold}[kind])
    columns, block = data.draw(st.integers(1, 300)), data.draw(st.sampled_from([1, 1, 4]))
    union = data.draw(st.sampled_from([1, 1, 3]))
    prefix = data.draw(st.integers(max(0, columns * block - 40), columns * block))
    scores = rows_of(data, any_mass if kind == "p" else any_score, (1, union, columns))
    forced = {"sink": data.draw(st.integers(0, 9)) * block, "recent": data.draw(st.integers(0, 9)) * block}
    result = check_selection(select(kernel, scores, [prefix], policy, block=block, union=union, **forced))
    assert result.passed, result.detail


def test_the_ratio_is_taken_in_64_bits(kernel: SelectKernel) -> None:
    """ratio_ppm * prefix passes 2^31 from a prefix of 2,148 keys on."""
    scores = random_scores(1, 1, [3000], 3000, seed=3)
    for ratio in (0.999999, 1e-6):
        assert check_selection(select(kernel, scores, [3000], TopK(ratio=ratio))).passed


def test_layers_thresholds_slots_and_views_in_one_launch(kernel: SelectKernel) -> None:
    """A leading layer axis, scores that are a view, a threshold for each layer and head, and 64-bit slots of blocks."""
    wide = random_scores(2 * 3, 2, [380] * 6, 380, seed=4).view(2, 3, 2, 380)
    values = torch.tensor([[[0.02, 0.05]], [[0.1, NAN]]])
    table = torch.randint(-1, 2**31 - 1, (3, 40), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    forced = {"sink": 3, "recent": 9, "block": 4, "page_size": 32}
    for pages, slot_dtype in ((table // 64, torch.int32), (table, torch.int64)):
        call = select(
            kernel,
            wide[..., 30:370],
            [1360, 0, 437],
            Threshold(values),
            page_table=pages,
            slot_dtype=slot_dtype,
            **forced,
        )
        assert check_selection(call).passed
    assert call.slots is not None
    assert int(call.slots.max()) > 2**31


def test_a_histogram_replaces_the_first_digits(kernel: SelectKernel) -> None:
    prefixes = [340, 7, 320]
    scores = random_scores(3, 1, prefixes, 340, seed=6)
    scores[2] = 0.0  # every key in the lowest bin
    written = torch.arange(340) < torch.tensor(prefixes)[:, None, None]
    histogram = reference.count_scores(torch.where(written, scores, NAN))
    for k in (60, 1, 200):
        call = select(kernel, scores, prefixes, TopK(k=k), sink=5, recent=130, histogram=histogram)
        assert check_selection(call).passed


def test_what_is_no_mass_harms_no_memory(kernel: SelectKernel) -> None:
    """On a GPU nobody looks at the scores first: the forced keys come, ascending indices and a count that fits."""
    scores = torch.stack([SCORES[name](290) for name in ("infinities", "all NaN", "signs", "all minus infinity")])
    call = select(kernel, scores[:, None], [290] * 4, TopP(0.5, max=40), sink=2, recent=2)
    for indices, count in zip(call.indices.flatten(0, 1).tolist(), call.counts.flatten().tolist(), strict=True):
        assert {0, 1, 288, 289} <= set(indices)
        assert indices[:count] == sorted(set(indices[:count]))
        assert indices[count:] == [-1] * (len(indices) - count)


def test_digits_of_eleven_bits_and_lines_of_two_warps() -> None:
    kernel = select_twin(radix_bits=11, num_warps=2, block_n=128)
    scores = torch.stack([make(390) for make in SCORES.values()])[:, None]
    for num_sms in (1, MANY_SMS):
        one = dataclasses.replace(kernel, num_sms=num_sms)
        result = check_selection(select(one, scores, [388] * len(SCORES), TopK(k=50), sink=2, recent=3))
        assert result.passed, result.detail


@pytest.mark.parametrize(
    ("rows", "columns", "splits"), [(1, 4096, 4), (8, 131072, 4), (8, 150, 1), (64, 131072, 1), (16, 64 * 64, 4)]
)
def test_blocks_of_a_row_fill_the_device_and_no_more(
    shared: SelectKernel, rows: int, columns: int, splits: int
) -> None:
    assert shared.module.num_splits(rows, columns, 132) == splits
