"""Several backends in one search: each searches its own space, and their proposals take turns. Evaluates nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from specattn_codegen.plan import Backend, Plan
from specattn_codegen.tuning.tune_session import Proposer


class ByBackend:
    """Proposers of one task by backend, as one: what they try next in turns, until none has anything left."""

    def __init__(self, proposers: Mapping[Backend, Proposer]) -> None:
        self._proposers = proposers
        self._turns = itertools.cycle(proposers.values())

    @property
    def left(self) -> int:
        return sum(proposer.left for proposer in self._proposers.values())

    def ask(self, count: int) -> list[Plan]:
        plans: list[Plan] = []
        passed = 0  # turns in a row that gave nothing
        while len(plans) < count and passed < len(self._proposers):
            proposed = next(self._turns).ask(1)
            plans.extend(proposed)
            passed = 0 if proposed else passed + 1
        return plans

    def tell(self, plan: Plan, value: float | None, note: str = "") -> None:
        self._proposers[plan.backend].tell(plan, value, note)

    def heard(self) -> list[str]:
        return [note for proposer in self._proposers.values() for note in proposer.heard()]

    def close(self) -> None:
        for proposer in self._proposers.values():
            proposer.close()
