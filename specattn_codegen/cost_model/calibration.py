"""Calibration: the cost model against measured records, as it is and with its terms rescaled to fit them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEAST_PLANS = 4  # of a kernel and size, for their order to mean something


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One measured plan. case: its kernel and size; terms: predicted microseconds by what limits them."""

    case: str
    measured_us: float
    terms: dict[str, float]

    def predicted_us(self, factors: dict[str, float]) -> float:
        return sum(factors.get(limit, 1.0) * time for limit, time in self.terms.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of predictions with measurements, medians over cases.

    rank_correlation  Spearman's: 1 where the model puts plans in their measured order
    regret            by how much the model's first choice is slower than the best measured plan
    error             of a prediction, as a share of the measurement
    """

    cases: int
    plans: int
    rank_correlation: float
    regret: float
    error: float


def fit(observations: Sequence[Observation]) -> dict[str, float]:
    """Factors by limit, not negative, of least squared relative error (Lawson and Hanson's NNLS)."""
    limits = sorted({limit for one in observations for limit in one.terms})
    shares = np.array([[one.terms.get(limit, 0.0) / one.measured_us for limit in limits] for one in observations])
    factors, _ = optimize.nnls(shares, np.ones(len(observations)))
    return {limit: float(factor) for limit, factor in zip(limits, factors, strict=True)}


def agreement(observations: Sequence[Observation], factors: dict[str, float]) -> Agreement | None:
    """None where no case has plans enough to be put in an order."""
    cases: dict[str, list[Observation]] = {}
    for one in observations:
        cases.setdefault(one.case, []).append(one)
    found = [case for case in cases.values() if len(case) >= LEAST_PLANS]
    if not found:
        return None
    return Agreement(
        cases=len(found),
        plans=sum(map(len, found)),
        rank_correlation=statistics.median(_rank_correlation(case, factors) for case in found),
        regret=statistics.median(_regret(case, factors) for case in found),
        error=statistics.median(abs(one.predicted_us(factors) / one.measured_us - 1) for case in found for one in case),
    )


def _rank_correlation(case: Sequence[Observation], factors: dict[str, float]) -> float:
    measured, predicted = [one.measured_us for one in case], [one.predicted_us(factors) for one in case]
    if len(set(measured)) == 1 or len(set(predicted)) == 1:
        return 0.0
    return float(np.corrcoef(stats.rankdata(measured), stats.rankdata(predicted))[0, 1])


def _regret(case: Sequence[Observation], factors: dict[str, float]) -> float:
    first = min(case, key=lambda one: one.predicted_us(factors))
    return first.measured_us / min(one.measured_us for one in case) - 1
