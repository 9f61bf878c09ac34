"""Acceptance against a loop that decodes one token at a time."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from specattn_runtime.acceptance import accept_greedy


def accepted_by_hand(drafts: list[int], targets: list[int]) -> int:
    """Takes drafts while they are what the full model would have said."""
    count = 0
    while count < len(drafts) and drafts[count] == targets[count]:
        count += 1
    return count


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=0, max_size=5), min_size=1, max_size=4)
)
def test_a_ragged_batch_equals_request_by_request(requests: list[list[tuple[int, int]]]) -> None:
    longest = max(len(request) for request in requests)
    drafts = torch.full((len(requests), longest), -1)
    targets = torch.full((len(requests), longest + 1), -1)
    for index, request in enumerate(requests):
        drafts[index, : len(request)] = torch.tensor([draft for draft, _ in request], dtype=torch.int64)
        targets[index, : len(request) + 1] = torch.tensor([*(target for _, target in request), 1])
    accepted = accept_greedy(drafts, targets, torch.tensor([len(request) for request in requests]))
    by_hand = [accepted_by_hand([d for d, _ in request], [t for _, t in request]) for request in requests]
    assert accepted.tolist() == by_hand


def test_all_none_and_a_right_draft_after_a_wrong_one() -> None:
    drafts = torch.tensor([[5, 6, 7], [9, 6, 7], [5, 9, 7]])
    targets = torch.tensor([[5, 6, 7, 8]]).repeat(3, 1)
    assert accept_greedy(drafts, targets, torch.tensor([3, 3, 3])).tolist() == [3, 0, 1]


def test_drafts_past_a_requests_own_length_never_count() -> None:
    drafts = torch.tensor([[5, 6], [5, 6], [5, 6]])
    targets = torch.tensor([[5, 6, 7]]).repeat(3, 1)
    assert accept_greedy(drafts, targets, torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]


def test_one_draft_and_no_draft() -> None:
    assert accept_greedy(torch.tensor([[4], [4]]), torch.tensor([[4, 1], [3, 1]]), torch.tensor([1, 1])).tolist() == [
        1,
        0,
    ]
    assert accept_greedy(torch.zeros(1, 0, dtype=torch.int64), torch.tensor([[3]]), torch.tensor([0])).tolist() == [0]
