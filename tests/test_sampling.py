"""Token distributions against a slow reading of their definition, and draws against the distribution's own steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_codegen import SpecError
from specattn_runtime.decoding.sampling import GREEDY, Sampling, draw, token_probabilities


def by_hand(logits: list[float], sampling: Sampling) -> list[float]:
    """One row, one restriction after the other."""
    if sampling.greedy:
        return [float(token == logits.index(max(logits))) for token in range(len(logits))]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: sampling.top_k]
    weights = {token: math.exp((logits[token] - max(logits)) / sampling.temperature) for token in order}
    total, mass, kept = sum(weights.values()), 0.0, list[int]()
    for token in order:
        if mass < sampling.top_p * total:
            kept.append(token)
        mass += weights[token]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 2, 5, 9]),
    # Away from sums of equal weights, where rounding decides.
    top_p=st.sampled_from([0.011, 0.37, 0.713, 0.989, 1.0]),
)


@settings(deadline=None)
@given(st.data())
def test_a_batch_of_different_samplings_is_each_row_by_its_definition(data: st.DataObject) -> None:
    samplings = data.draw(st.lists(SAMPLINGS, min_size=1, max_size=4))
    values = st.integers(-8, 8).map(lambda value: value / 4)  # equal logits are common
    rows = [data.draw(st.lists(values, min_size=7, max_size=7)) for _ in samplings]
    found = token_probabilities(torch.tensor(rows, dtype=torch.float64), samplings)
    wanted = [by_hand(row, sampling) for row, sampling in zip(rows, samplings, strict=True)]
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-14, rtol=0)


def test_the_smallest_temperature_is_greedy_and_the_largest_uniform() -> None:
    logits = torch.tensor([[3.0, 3.5, -1.0, 3.5 - 2.0**-10]])
    cold = token_probabilities(logits, [Sampling(temperature=1e-38)])
    assert cold.tolist() == token_probabilities(logits, [GREEDY]).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert token_probabilities(logits, [Sampling(temperature=1e38)]).tolist() == [[0.25] * 4]


def test_half_precision_logits_become_float32() -> None:
    assert token_probabilities(torch.zeros(1, 3, dtype=torch.bfloat16), [Sampling(temperature=1.0)]).dtype == (
        torch.float32
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any))
def test_draws_at_evenly_spaced_marks_are_the_weights(weights: list[int]) -> None:
    total = sum(weights)
    marks = (torch.arange(total, dtype=torch.float64) + 0.5) / total  # one in the middle of each unit of weight
    drawn = draw(torch.tensor(weights, dtype=torch.float32).expand(total, -1), marks)
    assert torch.bincount(drawn, minlength=len(weights)).tolist() == weights


@pytest.mark.parametrize("scale", [1.0, 0.3, 1.7, 1e-30])
def test_a_token_without_weight_is_never_drawn(scale: float) -> None:
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float64) * scale
    marks = torch.tensor([0.0, 0.25, 1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(weights.expand(3, -1), marks).tolist() == [1, 3, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be 0, for the most likely token, or above"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0: must be at least 1 token"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"seed": 2**64}, "must fit in 64 bits"),
    ],
)
def test_bad_samplings(changes: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(GREEDY, **changes)
