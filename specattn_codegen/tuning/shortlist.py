"""Shortlist: the plans worth timing where there is no time to search, ranked by the cost model before any is built."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from specattn_codegen import cost_model, space
from specattn_codegen.build.resources import Resources
from specattn_codegen.plan import Backend, Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, Workload

LEAST_DIFFERENCES = 2  # settings in which a plan differs from the ones before it, as neighbours teach little


def ranked(spec: KernelSpec, workload: Workload, arch: Arch, backend: Backend) -> list[Plan]:
    """Every feasible plan, the best by its guessed resources first; in the order of the axes without a model."""
    if not cost_model.covers(spec, backend):
        return list(space.feasible(spec, arch, backend))
    return list(guessed_us(spec, workload, arch, backend))


@functools.lru_cache(maxsize=16)  # the sizes of one search, which asks again after every few trials
def guessed_us(spec: KernelSpec, workload: Workload, arch: Arch, backend: Backend) -> dict[Plan, float]:
    """Predicted time of every feasible plan by the resources its binary may take, the best first."""
    times = cost_model.latencies_us(spec, workload, _guessed(spec, arch, backend), arch)
    return dict(sorted(times.items(), key=lambda item: item[1]))


@functools.lru_cache(maxsize=2)
def _guessed(spec: KernelSpec, arch: Arch, backend: Backend) -> dict[Plan, tuple[Resources, ...]]:
    plans = space.feasible(spec, arch, backend)
    return {plan: cost_model.guess_resources(spec, plan, arch) for plan in plans}


def shortlist(spec: KernelSpec, workload: Workload, arch: Arch, backend: Backend, *, count: int) -> list[Plan]:
    """Up to `count` plans: the default, then the best ranked that are no neighbours of those before them, then the best
    ranked of the rest."""
    order = ranked(spec, workload, arch, backend)
    chosen = [space.default_plan(spec, arch, backend)]
    for plan in order:
        if len(chosen) < count and all(differences(plan, other) >= LEAST_DIFFERENCES for other in chosen):
            chosen.append(plan)
    rest = (plan for plan in order if plan not in chosen)
    return [*chosen, *itertools.islice(rest, max(0, count - len(chosen)))][:count]


def differences(first: Plan, second: Plan) -> int:
    """Settings in which two plans of one space differ."""
    return sum(one != other for one, other in zip(first.settings, second.settings, strict=True))


class Shortlisted:
    """Proposes the plans of a list in their order, whatever became of the ones before."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = list(plans)

    @property
    def left(self) -> int:
        return len(self._plans)

    def ask(self, count: int) -> list[Plan]:
        asked, self._plans = self._plans[:count], self._plans[count:]
        return asked

    def tell(self, plan: Plan, value: float | None, note: str = "") -> None:
        """Nothing is learnt: the list is as it is."""

    def heard(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nobody shares the list."""
