"""Budgets: integer arithmetic, bounds and refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specattn_codegen.errors import SpecError
from specattn_codegen.policy import TopK, selection_width


@given(ratio=st.floats(1e-6, 1.0), prefix=st.integers(0, 2**31 - 1), least=st.integers(0, 9000))
def test_a_ratio_budget_is_the_ceiling_of_exact_millionths(ratio: float, prefix: int, least: int) -> None:
    policy = TopK(ratio=ratio, min=least)
    exact = math.ceil(Fraction(policy.ratio_ppm, 1_000_000) * prefix)
    assert policy.budget(prefix) == min(prefix, max(exact, least))


@given(k=st.integers(1, 10**6), prefix=st.integers(-5, 10**6), sink=st.integers(0, 99), recent=st.integers(0, 99))
def test_the_width_holds_every_selection(k: int, prefix: int, sink: int, recent: int) -> None:
    policy = TopK(k=k)
    width = selection_width(policy, max(prefix, 0), sink, recent)
    assert policy.budget(prefix) <= width <= max(prefix, 0)
    assert min(sink + recent, max(prefix, 0)) <= width


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


def test_minimum_above_maximum() -> None:
    with pytest.raises(SpecError, match="min <= max"):
        TopK(ratio=0.1, min=10, max=5)
