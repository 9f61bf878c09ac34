"""Budgets: integer arithmetic, bounds and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_codegen.errors import SpecError
from specattn_codegen.policy import Policy, Threshold, TopK, TopP, selection_width
from specattn_codegen.proof import reference


@settings(deadline=None)
@given(ratio=st.floats(1e-6, 1.0), prefix=st.integers(0, 2**31 - 1), least=st.integers(0, 9000))
def test_a_ratio_budget_is_the_ceiling_of_exact_millionths(ratio: float, prefix: int, least: int) -> None:
    policy = TopK(ratio=ratio, min=least)
    exact = math.ceil(Fraction(policy.ratio_ppm, 1_000_000) * prefix)
    assert policy.budget(prefix) == min(prefix, max(exact, least))


policies: st.SearchStrategy[Policy] = st.one_of(
    st.integers(1, 300).map(lambda k: TopK(k=k)),
    st.builds(lambda ratio, least: TopK(ratio=ratio, min=least), st.floats(0.001, 1.0), st.integers(0, 30)),
    st.builds(lambda most: TopP(0.5, max=most), st.integers(1, 300)),
    st.sampled_from([TopP(0.9), Threshold(0.5)]),
)


@settings(deadline=None)
@given(
    policy=policies,
    columns=st.integers(0, 40),
    missing=st.integers(0, 40),
    sink=st.integers(0, 99),
    recent=st.integers(0, 99),
    block=st.integers(1, 17),
    union=st.integers(1, 3),
)
def test_the_width_holds_every_selection(
    policy: Policy, columns: int, missing: int, sink: int, recent: int, block: int, union: int
) -> None:
    """Even where every key scores alike, a partial last block makes the recent keys touch one more, and united rows
    have nothing in common."""
    prefix = max(0, columns * block - missing)
    prefix_lens = torch.tensor([prefix])
    scores = torch.stack([(torch.arange(columns) % union == row).float() for row in range(union)])[None]
    selection = reference.select_kv(scores, prefix_lens, policy, sink=sink, recent=recent, block=block, union=union)
    assert int(selection.counts) <= selection_width(policy, columns * block, sink, recent, block, union) <= columns


def test_five_percent_of_a_prefix() -> None:
    assert TopK(ratio=0.05, min=256).budget(100_000) == 5000
    assert TopK(ratio=0.05, min=256).budget(1000) == 256
    assert TopK(ratio=0.05, min=256).budget(100) == 100
    assert TopK(ratio=0.05, min=256, max=300).budget(100_000) == 300


@pytest.mark.parametrize(
    "arguments", [{}, {"k": 3, "ratio": 0.5}, {"k": 0}, {"ratio": 0.0}, {"ratio": 1.5}, {"k": 5, "min": 1}]
)
def test_bad_policies_name_the_value(arguments: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=r"TopK\("):
        TopK(**arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "arguments", [{"p": -0.1}, {"p": 1.5}, {"p": math.nan}, {"p": 0.5, "bisection_steps": 0}, {"p": 0.5, "max": 0}]
)
def test_bad_shares_name_the_value(arguments: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=r"TopP\("):
        TopP(**arguments)  # pyright: ignore[reportArgumentType]


def test_a_threshold_is_a_number() -> None:
    with pytest.raises(SpecError, match=r"Threshold\(nan\)"):
        Threshold(math.nan)


@pytest.mark.parametrize("policy", [lambda: TopK(ratio=0.1, min=10, max=5), lambda: TopP(0.5, min=10, max=5)])
def test_minimum_above_maximum(policy: Callable[[], Policy]) -> None:
    with pytest.raises(SpecError, match="min <= max"):
        policy()
