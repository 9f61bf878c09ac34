"""Prediction: what the cost model says of one plan, with the terms that add up to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A stretch of time that nothing else overlaps. limit: memory, l2, matrix, vector, latency or launch."""

    name: str
    microseconds: float
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """latency_us is the sum of the terms; share_of_ceiling is the roofline's time over it."""

    latency_us: float
    terms: tuple[Term, ...]
    share_of_ceiling: float

    @property
    def bound(self) -> str:
        """The longest term and its limit, as in `attend_splits: memory`."""
        longest = max(self.terms, key=lambda term: term.microseconds)
        return f"{longest.name}: {longest.limit}"
