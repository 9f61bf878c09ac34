"""Prediction: what the cost model says of one plan, with the terms that add up to it and what they rest on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A stretch of time that nothing else overlaps. limit: memory, l2, matrix, vector, latency or launch."""

    name: str
    microseconds: float
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """How the first launch, which reads the cache or the scores, fills the device.

    blocks_per_sm, warps_per_sm  that share a multiprocessor: what its binary allows, and no more than the grid has
    occupancy                    share of the multiprocessor's threads they are
    bytes_in_flight              asked of memory and not there yet, on the whole device
    bytes_to_saturate            latency x bandwidth: by Little's law, what must be in flight to keep the memory busy
    """

    blocks_per_sm: int
    warps_per_sm: int
    occupancy: float
    bytes_in_flight: float
    bytes_to_saturate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """latency_us is the sum of the terms; share_of_ceiling is the roofline's time over it.

    bytes_moved  between the kernels and memory, scratch that one launch leaves for the next counted both ways
    bytes_least  what no implementation can avoid
    """

    latency_us: float
    terms: tuple[Term, ...]
    share_of_ceiling: float
    bytes_moved: int
    bytes_least: int
    residency: Residency

    @property
    def bound(self) -> str:
        """The longest term and its limit, as in `attend_splits: memory`."""
        longest = max(self.terms, key=lambda term: term.microseconds)
        return f"{longest.name}: {longest.limit}"

    @property
    def excess_bytes(self) -> float:
        """Bytes moved over the least: 1 where nothing is read twice and nothing is kept."""
        return self.bytes_moved / self.bytes_least
