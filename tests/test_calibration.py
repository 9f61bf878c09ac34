"""Calibrated thresholds: on their sample they select what the budget would, and on other prefixes nearly so."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from select_cases import any_score, rows_of
from specattn_codegen import HeadConfig
from specattn_codegen.errors import SpecError
from specattn_codegen.policy import Policy, Threshold, TopK
from specattn_codegen.proof import reference
from specattn_codegen.proof.problems import random_scores
from specattn_runtime import calibrate_thresholds, load_kernels

budgets = st.one_of(st.integers(1, 30).map(lambda k: TopK(k=k)), st.floats(0.01, 1.0).map(lambda r: TopK(ratio=r)))


def selected(
    scores: torch.Tensor, prefix_lens: torch.Tensor, policy: Policy, *, sink: int, recent: int, block: int
) -> torch.Tensor:
    """Columns selected of every head's whole sample: [(L,) S]."""
    chosen = reference.select_kv(scores, prefix_lens, policy, sink=sink, recent=recent, block=block)
    return chosen.counts.sum(dim=-2)


@settings(deadline=None)
@given(data=st.data(), budget=budgets, block=st.sampled_from([1, 1, 3]), layered=st.booleans())
def test_a_threshold_is_the_largest_that_fills_the_budget(
    data: st.DataObject, budget: TopK, block: int, layered: bool
) -> None:
    columns = data.draw(st.integers(1, 20))
    scores = rows_of(data, any_score, (2, 3, 2, columns) if layered else (3, 2, columns))
    prefixes = data.draw(st.lists(st.integers(-1, columns * block + 2), min_size=3, max_size=3))
    prefix_lens = torch.tensor(prefixes, dtype=torch.int32)
    forced = {"sink": data.draw(st.integers(0, 4)), "recent": data.draw(st.integers(0, 4)), "block": block}
    threshold = calibrate_thresholds(scores, prefix_lens, budget, **forced)
    assert isinstance(threshold.value, torch.Tensor)
    assert threshold.value.shape == ((2, 1, 2) if layered else (2,))
    wanted = selected(scores, prefix_lens, budget, **forced)
    known = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)  # as a NaN reaches no threshold
    assert (selected(known, prefix_lens, threshold, **forced) >= wanted).all()
    higher = Threshold(threshold.value.nextafter(torch.tensor(math.inf)))
    fewer = selected(scores, prefix_lens, higher, **forced) < wanted
    assert (fewer | threshold.value.isinf().view(fewer.shape)).all()


def test_thresholds_carry_over_to_other_prefixes() -> None:
    """Heads of different spread, 40 prefixes to learn from and 40 others, through the kernel."""
    heads = HeadConfig(num_q_heads=4, num_kv_heads=4, head_dim=32)
    budget = TopK(ratio=0.1)
    prefix_lens = torch.full((40,), 500, dtype=torch.int32)
    seen, coming = (
        random_scores(40, 4, [500] * 40, 500, seed) * torch.tensor([0.1, 1.0, 3.0, 9.0])[:, None] for seed in (1, 2)
    )
    threshold = calibrate_thresholds(seen, prefix_lens, budget, sink=4, recent=16)
    chosen = load_kernels(heads).select_kv(coming, prefix_lens, threshold, sink=4, recent=16)
    # 30 of 480 free keys are wanted: both samples' numbers over 40 prefixes vary as those of 19,200 draws.
    deviation = math.sqrt(2.0 * 19_200 * (30 / 480) * (450 / 480))
    assert ((chosen.counts.sum(dim=0) - 40 * 50).abs() < 4.0 * deviation).all()
    assert chosen.counts.unique().numel() > 5  # while single prefixes get what their scores ask for


def test_budgets_at_their_ends() -> None:
    scores, prefix_lens = torch.rand(2, 3, 9), torch.tensor([9, 4], dtype=torch.int32)
    everything = calibrate_thresholds(scores, prefix_lens, TopK(k=9))
    assert torch.equal(torch.as_tensor(everything.value), torch.full((3,), -math.inf))
    nothing = calibrate_thresholds(scores, prefix_lens, TopK(k=2), sink=1, recent=1)
    assert torch.equal(torch.as_tensor(nothing.value), torch.full((3,), math.inf))


@pytest.mark.parametrize("shapes", [((2, 9), (2,)), ((2, 3, 9), (3,)), ((0, 3, 9), (0,))])
def test_bad_samples_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    scores, prefix_lens = shapes
    with pytest.raises(SpecError, match=r"must be \[B, S, N\]"):
        calibrate_thresholds(torch.zeros(scores), torch.zeros(prefix_lens, dtype=torch.int32), TopK(k=2))
