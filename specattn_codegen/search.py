"""Search: which plan to try next. Optuna's ask and tell over the axes of a space; evaluates nothing itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import optuna

from specattn_codegen import space
from specattn_codegen.arch import Arch
from specattn_codegen.plan import Backend, Plan, Setting
from specattn_codegen.spec import KernelSpec

# What an infeasible or failing plan is told to the sampler as. Not a failed trial: those the sampler forgets, and then
# proposes them again and again. It ranks values, so any number above every real one will do.
PENALTY = 1e15
# Proposals in a row that were known or infeasible, after which one untried feasible plan is drawn at random.
MOST_REPEATS = 40


class Search:
    """Proposes each feasible plan at most once, `trials` of them at most: the default, then the seeds, then what the
    sampler makes of the values told. A space no larger than `trials` is simply swept.

    Axes are ordered, so a value is known to the sampler by its position. The same seed and the same values give the
    same proposals.
    """

    def __init__(
        self, spec: KernelSpec, arch: Arch, backend: Backend, *, seeds: Sequence[Plan], trials: int, seed: int
    ) -> None:
        self._backend: Backend = backend
        self._axes = space.axes(spec, backend)
        default = space.default_plan(spec, arch, backend)
        feasible = list(space.feasible(spec, arch, backend))
        self._untried = dict.fromkeys((default, *seeds, *feasible))
        self._left = min(trials, len(self._untried))
        self._swept = len(self._untried) <= trials
        self._first = [default, *(plan for plan in dict.fromkeys(seeds) if plan != default)]
        self._random = random.Random(seed)
        self._known: dict[Plan, float] = {}
        self._asked: dict[Plan, optuna.Trial] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))

    @property
    def left(self) -> int:
        """Plans that may still be proposed."""
        return self._left

    def ask(self, count: int) -> list[Plan]:
        """Up to `count` plans to try next; fewer, or none, when there is nothing left to try."""
        plans: list[Plan] = []
        while len(plans) < count and self._left > 0:
            plan = self._propose()
            del self._untried[plan]
            self._left -= 1
            plans.append(plan)
        return plans

    def tell(self, plan: Plan, value: float | None) -> None:
        """What trying a plan gave, smaller being better; None for one that failed."""
        self._known[plan] = PENALTY if value is None else value
        self._study.tell(self._asked.pop(plan), self._known[plan])

    def _propose(self) -> Plan:
        while self._first:
            plan = self._first.pop(0)
            if plan in self._untried:
                return self._fixed(plan)
        if self._swept:
            return self._fixed(next(iter(self._untried)))
        for _ in range(MOST_REPEATS):
            trial = self._study.ask(
                {axis.name: optuna.distributions.IntDistribution(0, len(axis.values) - 1) for axis in self._axes}
            )
            plan = self._plan_of(trial)
            if plan in self._untried:
                self._asked[plan] = trial
                return plan
            self._study.tell(trial, self._known.get(plan, PENALTY))
        return self._fixed(self._random.choice(list(self._untried)))

    def _plan_of(self, trial: optuna.Trial) -> Plan:
        settings: dict[str, Setting] = {axis.name: axis.values[trial.params[axis.name]] for axis in self._axes}
        return Plan.of(self._backend, **settings)

    def _fixed(self, plan: Plan) -> Plan:
        """Makes the sampler ask for this very plan."""
        position = {axis.name: axis.values.index(plan[axis.name]) for axis in self._axes}
        self._study.enqueue_trial(dict(position))
        trial = self._study.ask(
            {axis.name: optuna.distributions.IntDistribution(0, len(axis.values) - 1) for axis in self._axes}
        )
        self._asked[plan] = trial
        return plan
