"""Acceptance against a loop that decodes one token at a time, and rejection sampling counted out in whole numbers."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_runtime.decoding.acceptance import accept_greedy, accept_sampled, residual


def accepted_by_hand(drafts: list[int], targets: list[int]) -> int:
    """Takes drafts while they are what the full model would have said."""
    count = 0
    while count < len(drafts) and drafts[count] == targets[count]:
        count += 1
    return count


@settings(deadline=None)
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


def probabilities(weights: list[int]) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


def shares(weights: list[int]) -> list[Fraction]:
    return [Fraction(weight, sum(weights)) for weight in weights]


def middles(count: int) -> list[float]:
    """One uniform in the middle of each of `count` equal parts of [0, 1): a draw is exact where parts do not straddle
    a decision, and rounding cannot reach one."""
    return [(part + 0.5) / count for part in range(count)]


def emitted_law(
    drafts: list[list[int]], targets: list[list[int]], accept_parts: int, final_parts: int
) -> dict[tuple[int, ...], Fraction]:
    """The exact distribution of what a round emits, over every draft and every uniform on a grid.

    drafts[i] and targets[i] are the weights of step i, the same whatever came before.
    """
    draft_len, vocab = len(drafts), range(len(targets[0]))
    cases = list(
        itertools.product(
            itertools.product(vocab, repeat=draft_len),
            itertools.product(middles(accept_parts), repeat=draft_len),
            middles(final_parts),
        )
    )
    found = accept_sampled(
        torch.tensor([tokens for tokens, _, _ in cases]).view(len(cases), draft_len),
        torch.stack([probabilities(weights) for weights in drafts]).expand(len(cases), -1, -1),
        torch.stack([probabilities(weights) for weights in targets]).expand(len(cases), -1, -1),
        torch.full((len(cases),), draft_len),
        torch.tensor([[*accepts, final] for _, accepts, final in cases], dtype=torch.float64),
    )
    law: dict[tuple[int, ...], Fraction] = {}
    for (tokens, _, _), count, following in zip(cases, found.counts.tolist(), found.following.tolist(), strict=True):
        weight = prod((shares(drafts[i])[token] for i, token in enumerate(tokens)), start=Fraction(1))
        emitted = (*tokens[:count], following)
        law[emitted] = law.get(emitted, Fraction(0)) + weight / (accept_parts**draft_len * final_parts)
    return {emitted: weight for emitted, weight in law.items() if weight}


def least_parts(draft: list[int], target: list[int]) -> tuple[int, int]:
    """Parts of [0, 1) that hold every decision of one step: acceptances are multiples of one over the first."""
    scaled = [(d * sum(target), t * sum(draft)) for d, t in zip(draft, target, strict=True)]
    accept_parts = prod({d for d, _ in scaled if d})
    refused = sum(max(0, t - d) for d, t in scaled)
    return accept_parts, sum(target) * max(1, refused)


WEIGHTS = st.lists(st.integers(0, 2), min_size=3, max_size=3).filter(any)


@settings(deadline=None, max_examples=40)
@given(WEIGHTS, WEIGHTS)
def test_acceptance_and_residual_give_the_target_exactly(draft: list[int], target: list[int]) -> None:
    accept_parts, final_parts = least_parts(draft, target)
    law = emitted_law([draft], [target, [1, 0, 0]], accept_parts, final_parts)
    first = [sum(weight for emitted, weight in law.items() if emitted[0] == token) for token in range(3)]
    assert first == shares(target)
    # A draft holds with the mass the two share.
    kept = sum(weight for emitted, weight in law.items() if len(emitted) == 2)
    assert kept == sum(map(min, shares(draft), shares(target)))


def test_two_drafts_and_what_follows_have_the_law_of_sampling_one_by_one() -> None:
    drafts, targets = [[2, 1, 1], [0, 1, 1]], [[1, 2, 1], [1, 1, 0], [3, 0, 1]]
    law = emitted_law(drafts, targets, accept_parts=4, final_parts=8)
    assert len({len(emitted) for emitted in law}) == 3  # refused at once, refused later, all kept
    full: dict[tuple[int, ...], Fraction] = {}
    for emitted, weight in law.items():
        rest = targets[len(emitted) :]
        for more in itertools.product(range(3), repeat=len(rest)):
            longer = weight * prod(
                (shares(row)[token] for row, token in zip(rest, more, strict=True)), start=Fraction(1)
            )
            full[(*emitted, *more)] = full.get((*emitted, *more), Fraction(0)) + longer
    wanted = {
        tokens: prod((shares(row)[token] for row, token in zip(targets, tokens, strict=True)), start=Fraction(1))
        for tokens in itertools.product(range(3), repeat=3)
    }
    assert {tokens: weight for tokens, weight in full.items() if weight} == {
        tokens: weight for tokens, weight in wanted.items() if weight
    }


@settings(deadline=None)
@given(WEIGHTS, WEIGHTS)
def test_the_closed_identity(draft: list[int], target: list[int]) -> None:
    """In multiples of 2^-20, where float64 is exact: p * min(1, q / p) + residual = q, and both refuse as often."""
    p, q = (torch.tensor(weights, dtype=torch.float64) * 2.0**-20 for weights in (draft, target))
    p[0] += 1.0 - p.sum()
    q[0] += 1.0 - q.sum()
    kept = torch.minimum(p, q)
    if not torch.equal(p, q):
        assert torch.equal(kept + residual(q, p), q)
        assert residual(q, p).sum() == 1.0 - kept.sum()


def test_a_residual_that_rounding_emptied_is_the_target() -> None:
    target = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert torch.equal(residual(target, target + 2.0**-40), target)


def test_with_all_mass_on_one_token_sampling_is_greedy() -> None:
    generator = torch.Generator().manual_seed(0)
    drafts = torch.randint(2, (200, 3), generator=generator)
    targets = torch.randint(2, (200, 4), generator=generator)
    lengths = torch.randint(4, (200,), generator=generator)
    one_hot = torch.nn.functional.one_hot
    found = accept_sampled(
        drafts,
        one_hot(drafts, 2).double(),
        one_hot(targets, 2).double(),
        lengths,
        torch.rand(200, 4, dtype=torch.float64, generator=generator),
    )
    counts = accept_greedy(drafts, targets, lengths)
    assert torch.equal(found.counts, counts)
    assert torch.equal(found.following, targets[torch.arange(200), counts])


@pytest.mark.parametrize("draft_len", [0, 1])
def test_a_request_without_drafts_draws_from_the_full_model(draft_len: int) -> None:
    drafts = torch.zeros(4, draft_len, dtype=torch.int64)
    nonsense = torch.zeros(4, draft_len, 4, dtype=torch.float64)
    targets = torch.full((4, draft_len + 1, 4), 0.25, dtype=torch.float64)
    uniforms = torch.tensor(middles(4), dtype=torch.float64)[:, None].expand(-1, draft_len + 1)
    found = accept_sampled(drafts, nonsense, targets, torch.zeros(4, dtype=torch.int64), uniforms)
    assert found.counts.tolist() == [0, 0, 0, 0]
    assert found.following.tolist() == [0, 1, 2, 3]
