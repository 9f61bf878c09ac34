"""What a decoding run produced and what it cost. Numbers only; printing is the command line's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """One request's new tokens.

    margins   each token's distance from the second choice, in logits of the full model
    accepted  drafts that held, a round
    drafted   drafts made, a round; the last rounds make fewer, so that no token is emitted past the limit
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    accepted: tuple[int, ...]
    drafted: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A batch's results.

    full_passes      forward passes over the whole cache, the one that ends the prefill included
    selected_share   keys selected for drafts as a share of the prefix they were selected from, mean over rounds
    prefill_seconds  until every request's first token
    decode_seconds   from there to the end
    phases           decode seconds by phase: draft, verify, select
    """

    requests: tuple[RequestResult, ...]
    full_passes: int
    selected_share: float
    prefill_seconds: float
    decode_seconds: float
    phases: Mapping[str, float]

    @property
    def new_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.requests)

    @property
    def decode_rate(self) -> float:
        """Tokens a second after each request's first token."""
        decoded = self.new_tokens - len(self.requests)
        return decoded / self.decode_seconds if decoded else 0.0

    @property
    def total_rate(self) -> float:
        """Tokens a second, prefill included."""
        return self.new_tokens / (self.prefill_seconds + self.decode_seconds)

    @property
    def accepted_histogram(self) -> Mapping[int, int]:
        """Rounds by the number of drafts that held, over all requests."""
        return dict(sorted(Counter(count for request in self.requests for count in request.accepted).items()))

    @property
    def drafted(self) -> int:
        """Drafts made, over all rounds and requests."""
        return sum(sum(request.drafted) for request in self.requests)

    @property
    def mean_drafted(self) -> float:
        """Drafts made, a round and request."""
        return self.drafted / max(1, sum(len(request.drafted) for request in self.requests))

    @property
    def mean_accepted(self) -> float:
        """Drafts that held, a round and request."""
        counts = [count for request in self.requests for count in request.accepted]
        return sum(counts) / max(1, len(counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token, counted from 1, where two runs part, and the dense run's top-2 logit margin there."""

    token: int
    margin: float

    # Orders of magnitude above what float32 rounding moves a logit by, and below what a wrong key moves it by.
    ROUNDING_MARGIN = 1e-3

    @property
    def is_rounding_tie(self) -> bool:
        """In float32: too close a call to be more than the two runs' orders of summation."""
        return self.margin < self.ROUNDING_MARGIN


def first_difference(run: RequestResult, dense: RequestResult) -> Difference | None:
    """Where `run` leaves the dense run; None when they are identical."""
    shared = min(len(run.tokens), len(dense.tokens))
    if run.tokens == dense.tokens:
        return None
    index = next((i for i in range(shared) if run.tokens[i] != dense.tokens[i]), shared)
    margin = dense.margins[index] if index < len(dense.margins) else run.margins[index]
    return Difference(token=index + 1, margin=margin)
