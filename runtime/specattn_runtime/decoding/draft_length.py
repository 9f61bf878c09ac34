"""How many drafts a round should make, from what drafts and verifications cost and how often drafts hold.

Pure arithmetic: who measures, and when, is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTiming:
    """One measured round: steps is the most drafts any request made, rows what all of them verified."""

    steps: int
    rows: int
    draft_seconds: float
    verify_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCosts:
    """Seconds of one draft step, of a verification whatever its rows, and of each row in it."""

    step: float
    verification: float
    row: float

    def seconds(self, steps: int, rows: int) -> float:
        return self.step * steps + self.verification + self.row * rows


def fit_costs(timings: Sequence[RoundTiming]) -> RoundCosts:
    """Least squares: drafts in proportion to their steps, verifications as a line over their rows, never falling.

    Rounds that all had as many rows say nothing about a row's cost, which is then 0.
    """
    steps = sum(timing.steps**2 for timing in timings)
    step = sum(timing.steps * timing.draft_seconds for timing in timings) / steps if steps else 0.0
    rows = sum(timing.rows for timing in timings) / len(timings)
    seconds = sum(timing.verify_seconds for timing in timings) / len(timings)
    spread = sum((timing.rows - rows) ** 2 for timing in timings)
    slope = (
        sum((timing.rows - rows) * (timing.verify_seconds - seconds) for timing in timings) / spread if spread else 0.0
    )
    row = min(max(0.0, slope), seconds / rows)  # nor does a verification without rows take less than no time
    return RoundCosts(step=step, verification=seconds - row * rows, row=row)


def acceptance_rate(accepted: Sequence[int], drafted: Sequence[int]) -> float:
    """The share of drafts that hold among those whose predecessors did, over some rounds of a request.

    Two drafts that would have held are counted in, so that a request without a past is taken to be a good one.
    """
    tried = sum(min(held + 1, made) for held, made in zip(accepted, drafted, strict=True))
    return (sum(accepted) + 2) / (tried + 2)


def expected_tokens(rate: float, draft_len: int) -> float:
    """Tokens a round emits if each draft whose predecessors hold does so at `rate`: the sum of its powers up to
    draft_len, the first being the token that no draft decides (Leviathan et al., arXiv 2211.17192, equation 1)."""
    return sum(rate**held for held in range(draft_len + 1))


def best_draft_lens(costs: RoundCosts, rates: Sequence[float], longest: Sequence[int]) -> list[int]:
    """The drafts each request should make, 1 .. longest[b], or 0 where that is 0, for the most tokens a second.

    Draft steps run the whole batch, so first one length for all is chosen; then a request's last drafts are left out
    where they promise fewer tokens than the rest of the batch makes in the time that verifying them takes. At least one
    is made, so that the rate stays known.
    """

    def tokens_per_second(steps: int) -> float:
        lengths = [min(steps, most) for most in longest]
        tokens = sum(expected_tokens(rate, length) for rate, length in zip(rates, lengths, strict=True))
        return tokens / max(costs.seconds(max(lengths), sum(lengths) + len(lengths)), 1e-12)

    steps = max(range(1, max(1, *longest) + 1), key=tokens_per_second)
    price = costs.row * tokens_per_second(steps)  # tokens that the time of one row is worth
    return [_worthwhile(rate, min(steps, most), price) for rate, most in zip(rates, longest, strict=True)]


def _worthwhile(rate: float, most: int, price: float) -> int:
    return max((length for length in range(1, most + 1) if length == 1 or rate**length >= price), default=0)
