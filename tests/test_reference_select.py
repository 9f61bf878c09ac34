"""The oracle's selections against the definitions of the policies, by hand and on any scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_codegen.policy import Policy, Threshold, TopK, TopP
from specattn_codegen.proof import reference

NAN, INFINITY = math.nan, math.inf


def chosen(
    scores: list[float], policy: Policy, prefix: int | None = None, sink: int = 0, recent: int = 0, block: int = 1
) -> list[int]:
    """The keys of one row; by default its prefix is all of it."""
    prefix_lens = torch.tensor([len(scores) * block if prefix is None else prefix], dtype=torch.int32)
    row = torch.tensor(scores).view(1, 1, -1)
    selection = reference.select_kv(row, prefix_lens, policy, sink=sink, recent=recent, block=block)
    assert selection.counts.item() == selection.indices.shape[-1]
    return selection.indices[0, 0].tolist()


BY_HAND: dict[str, tuple[list[int], list[float], Policy, dict[str, int]]] = {
    "largest": ([1, 3], [1.0, 9.0, 2.0, 8.0], TopK(k=2), {}),
    "ties go to the smaller index": ([0, 1], [5.0, 5.0, 5.0], TopK(k=2), {}),
    "signed zeros are equal": ([0, 1], [-0.0, 0.0, -1.0], TopK(k=2), {}),
    "NaN comes after minus infinity": ([1], [NAN, -INFINITY, NAN], TopK(k=1), {}),
    "forced keys count inside the budget": ([0, 1, 3], [0.0, 9.0, 8.0, 0.0], TopK(k=3), {"sink": 1, "recent": 1}),
    "forced keys stay above the budget": ([0, 1, 3], [0.0] * 4, TopK(k=1), {"sink": 2, "recent": 1}),
    "forced keys may overlap": ([0, 1, 2], [0.0] * 3, TopK(k=1), {"sink": 2, "recent": 2}),
    "the fewest keys with the mass": ([1, 3], [1.0, 5.0, 1.0, 3.0], TopP(0.8), {}),
    "equal masses by index": ([0, 1, 2], [2.0, 2.0, 2.0, 2.0], TopP(0.7), {}),
    "forced mass counts": ([0, 1], [2.0, 5.0, 1.0, 2.0], TopP(0.7), {"sink": 1}),
    "forced mass may be enough": ([1], [1.0, 9.0], TopP(0.9), {"recent": 1}),
    "no mass asked for": ([], [1.0, 9.0], TopP(0.0), {}),
    "all mass leaves zeros out": ([1, 2], [0.0, 9.0, 1e-30, 0.0], TopP(1.0), {}),
    "at least min": ([0, 1], [0.0, 9.0, 0.0], TopP(0.5, min=2), {}),
    "at most max": ([1], [4.0, 5.0, 4.0], TopP(0.9, max=1), {}),
    "forced keys stay above max": ([0, 2], [4.0, 5.0, 4.0], TopP(0.9, max=1), {"sink": 1, "recent": 1}),
    "without mass the forced keys": ([0, 3], [0.0] * 4, TopP(0.9), {"sink": 1, "recent": 1}),
    "without mass the newest to min": ([0, 2, 3], [0.0] * 4, TopP(0.9, min=3), {"sink": 1}),
    # thresholds 4, then 2 as 4 holds 8 of 13, then 3 as 2 holds 13, of which 3 holds 11
    "three halvings": ([0, 2], [8.0, 2.0, 3.0], TopP(0.8, bisection_steps=3), {}),
    "one halving": ([0, 1, 2], [8.0, 2.0, 3.0], TopP(0.8, bisection_steps=1), {}),
    "a halving's max": ([0, 2], [8.0, 2.0, 3.0], TopP(0.8, bisection_steps=1, max=2), {}),
    "at the threshold or above": ([0, 2], [0.5, 0.4, 0.6], Threshold(0.5), {}),
    "signed zeros reach each other": ([0, 1], [-0.0, 0.0, -1.0], Threshold(0.0), {}),
    "NaN reaches no threshold": ([1, 2], [NAN, -INFINITY, 0.0], Threshold(-INFINITY), {}),
    "forced below the threshold": ([0, 2], [0.0, 0.1, 0.9], Threshold(0.5), {"sink": 1}),
    "nothing reaches it": ([], [0.1, 0.2], Threshold(0.5), {}),
    "only the prefix": ([1], [1.0, 2.0, 9.0], TopK(k=1), {"prefix": 2}),
    "no prefix": ([], [1.0, 2.0], TopK(k=1), {"prefix": -3}),
    "a prefix past the columns": ([1], [1.0, 2.0], TopK(k=1), {"prefix": 50}),
    "budgets round up to blocks": ([1, 2], [1.0, 9.0, 8.0, 0.0], TopK(k=5), {"block": 4}),
    "a partial block counts": ([2], [1.0, 2.0, 3.0, 9.0], TopK(k=4), {"block": 4, "prefix": 9}),
    "recent keys touch two blocks": ([1, 2], [5.0, 0.0, 0.0, 9.0], TopK(k=4), {"block": 4, "prefix": 9, "recent": 2}),
    "sinks touch two blocks": ([0, 1], [0.0, 0.0, 5.0], TopK(k=4), {"block": 4, "sink": 5}),
    "min of mass in blocks": ([0, 1], [9.0, 1.0, 0.5], TopP(0.5, min=5), {"block": 4}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    expected, scores, policy, arguments = BY_HAND[name]
    assert chosen(scores, policy, **arguments) == expected


masses = st.lists(st.one_of(st.floats(0.0, 2.0**100, width=32), st.sampled_from([0.0, 1.0, 2.0**-149])), min_size=1)


@settings(deadline=None)
@given(scores=masses, p=st.floats(0.0, 1.0), sink=st.integers(0, 3), recent=st.integers(0, 3))
def test_top_p_is_the_smallest_superset_of_the_forced_keys(
    scores: list[float], p: float, sink: int, recent: int
) -> None:
    picked = chosen(scores, TopP(p), sink=sink, recent=recent)
    row = torch.tensor(scores).double()
    forced = {j for j in range(len(scores)) if j < sink or j >= len(scores) - recent}
    assert forced <= set(picked)
    total, free = float(row.sum()), [j for j in picked if j not in forced]
    if total > 0.0:
        assert float(row[picked].sum()) >= p * total * (1 - 1e-12)
    if free:
        least = min(free, key=lambda j: (row[j], -j))
        assert row[least] > 0
        assert p == 1.0 or float(row[picked].sum() - row[least]) < p * total * (1 + 1e-12)
        assert all(row[j] <= row[least] for j in set(range(len(scores))) - set(picked))


@settings(deadline=None)
@given(scores=masses, p=st.floats(0.0, 1.0), q=st.floats(0.0, 1.0), least=st.integers(0, 9))
def test_top_p_grows_with_p(scores: list[float], p: float, q: float, least: int) -> None:
    fewer = chosen(scores, TopP(min(p, q), min=least))
    assert set(fewer) <= set(chosen(scores, TopP(max(p, q), min=least)))
    assert len(fewer) >= min(least, len(scores))


@settings(deadline=None)
@given(scores=masses, p=st.floats(0.0, 0.999), steps=st.integers(1, 12))
def test_bisection_holds_the_mass_and_keeps_whole_ties(scores: list[float], p: float, steps: int) -> None:
    row, picked = torch.tensor(scores).double(), chosen(scores, TopP(p, bisection_steps=steps))
    if float(row.sum()) > 0.0:
        assert float(row[picked].sum()) >= p * float(row.sum()) * (1 - 1e-12)
        assert all(row[j] < row[picked].min() for j in set(range(len(scores))) - set(picked))


def test_a_threshold_of_its_own_for_every_head_and_layer() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.9]]).expand(2, 3, 2, 3)  # [layers, requests, heads, keys]
    prefix_lens = torch.tensor([3, 2, 3], dtype=torch.int32)
    per_head = reference.select_kv(scores, prefix_lens, Threshold(torch.tensor([0.5, 2.0])))
    assert per_head.counts.tolist() == [[[2, 0], [1, 0], [2, 0]]] * 2
    per_layer = reference.select_kv(scores, prefix_lens, Threshold(torch.tensor([0.9, math.nan])[:, None, None]))
    assert per_layer.counts.tolist() == [[[1, 1], [0, 0], [1, 1]], [[3, 3], [2, 2], [3, 3]]]


def test_slots_follow_the_page_table_and_nothing_else() -> None:
    """Two keys to a block, three blocks to a page; a negative entry and an index past the table give -1."""
    scores = torch.ones(1, 1, 1, 8)
    table = torch.tensor([[5, -1]], dtype=torch.int32)
    chosen = reference.select_kv(
        scores, torch.tensor([16], dtype=torch.int32), TopK(k=16), block=2, page_table=table, page_size=6
    )
    assert chosen.block == 2
    assert chosen.slots is not None
    assert chosen.slots.tolist() == [[[[15, 16, 17, -1, -1, -1, -1, -1]]]]
