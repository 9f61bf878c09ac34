"""Calibration: the cost model against measurements, as it is and with its terms rescaled to fit them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specattn_codegen.cost_model.prediction import Prediction

LEAST_PLANS = 4  # of a case, for their order to mean something
BELIEF = 0.05  # in the model as it is: what pulls a factor to 1 that few measurements speak for
FACTORS = (0.1, 10.0)  # bounds of what measurements may make of a term


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One measured plan. case: its kernel and size; terms: predicted microseconds by what limits them."""

    case: str
    measured_us: float
    terms: Mapping[str, float]

    def predicted_us(self, factors: Mapping[str, float]) -> float:
        """With each term times its limit's factor; 1 for a limit without one."""
        return sum(factors.get(limit, 1.0) * time for limit, time in self.terms.items())


def terms_by_limit(prediction: Prediction) -> dict[str, float]:
    terms: dict[str, float] = {}
    for term in prediction.terms:
        terms[term.limit] = terms.get(term.limit, 0.0) + term.microseconds
    return terms


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
    """Factors by limit, of least squared relative error, pulled to 1 and within FACTORS."""
    limits = sorted({limit for one in observations for limit in one.terms})
    shares = np.array([[one.terms.get(limit, 0.0) / one.measured_us for limit in limits] for one in observations])
    shares = shares.reshape(len(observations), len(limits))
    pull = BELIEF * np.sqrt(len(observations)) * np.eye(len(limits))
    wanted = np.concatenate([1.0 - shares.sum(axis=1), np.zeros(len(limits))])
    changes = np.linalg.lstsq(np.concatenate([shares, pull]), wanted, rcond=None)[0]
    return dict(zip(limits, np.clip(1.0 + changes, *FACTORS).tolist(), strict=True))


def by_case(observations: Sequence[Observation]) -> dict[str, list[Observation]]:
    """Only cases with plans enough to be put in an order."""
    cases: dict[str, list[Observation]] = {}
    for one in observations:
        cases.setdefault(one.case, []).append(one)
    return {case: found for case, found in cases.items() if len(found) >= LEAST_PLANS}


def agreement(observations: Sequence[Observation], factors: Mapping[str, float]) -> Agreement | None:
    """None where no case has plans enough to be put in an order."""
    cases = by_case(observations)
    if not cases:
        return None
    found = [one for case in cases.values() for one in case]
    return Agreement(
        cases=len(cases),
        plans=len(found),
        rank_correlation=statistics.median(case_rank_correlation(case, factors) for case in cases.values()),
        regret=statistics.median(regret(case, factors) for case in cases.values()),
        error=statistics.median(abs(one.predicted_us(factors) / one.measured_us - 1) for one in found),
    )


def case_rank_correlation(case: Sequence[Observation], factors: Mapping[str, float]) -> float:
    return rank_correlation([one.predicted_us(factors) for one in case], [one.measured_us for one in case])


def regret(case: Sequence[Observation], factors: Mapping[str, float]) -> float:
    first = min(case, key=lambda one: one.predicted_us(factors))
    return first.measured_us / min(one.measured_us for one in case) - 1.0


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing theirs; 0 where one side has only equal values."""
    one, other = _ranks(first), _ranks(second)
    if len(set(one)) == 1 or len(set(other)) == 1:
        return 0.0
    return statistics.correlation(one, other)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    places = {value: (ordered.index(value) + len(ordered) - 1 - ordered[::-1].index(value)) / 2 for value in values}
    return [places[value] for value in values]
