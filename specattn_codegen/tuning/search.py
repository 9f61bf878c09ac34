"""Search: which plan to try next. Optuna's ask and tell over the axes of a space; evaluates nothing itself."""

from __future__ import annotations

import contextlib
import heapq
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from specattn_codegen import space
from specattn_codegen.plan import Backend, Plan, Setting
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space import Axis
from specattn_codegen.spec import KernelSpec
from specattn_codegen.tuning import shared_study
from specattn_codegen.tuning.shared_study import Share

Sampler = Literal["tpe", "gp", "cmaes", "random", "grid"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

# What an infeasible or failing plan is told to the sampler as. Not a failed trial: those the sampler forgets, and then
# proposes them again and again. It ranks values, so any number above every real one will do; one not too far above is
# kinder to samplers that fit a surface.
PENALTY_RATIO = 4.0  # over the largest real value told so far
# Proposals in a row that were known or infeasible, after which one untried feasible plan is drawn at random.
MOST_REPEATS = 40
SAYS_WITHIN_S = 5.0  # from a trial's number to what it tries: milliseconds where its process is alive
STARTUP_TRIALS = 10  # before a sampler trusts what it has seen
# Kernels' times are smooth along an axis, which samplers that model axes apart are slow to see. So of every TURNS
# proposals all but one are neighbours of the FEW_BEST plans known, several since the best may be a lucky measurement.
LEARNERS: tuple[Sampler, ...] = ("tpe", "gp", "cmaes")
TURNS = 3
FEW_BEST = 3

_MAKERS: dict[Sampler, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "grid": lambda seed: optuna.samplers.RandomSampler(seed=seed),  # never asked: a grid is walked
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How a space is searched.

    sampler  tpe, gp and cmaes learn from what they are told, and take turns with steps from the best plans known;
             random does neither; grid walks evenly over the space
    trials   plans tried at most, the default and the seeds among them
    share    a study that other processes search as well; None for one of this search's own
    """

    sampler: Sampler
    trials: int
    seed: int
    share: Share | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What is searched: the axes, the plan that comes first, and every feasible plan in the order of the axes."""

    axes: tuple[Axis, ...]
    default: Plan
    feasible: tuple[Plan, ...]


def space_of(spec: KernelSpec, arch: Arch, backend: Backend) -> Searched:
    return Searched(
        axes=space.axes(spec, backend),
        default=space.default_plan(spec, arch, backend),
        feasible=tuple(space.feasible(spec, arch, backend)),
    )


class Search:
    """Proposes each feasible plan at most once, `trials` of them at most: the default, then the seeds, then what the
    sampler makes of the values told. A space no larger than `trials` is simply swept.

    Axes are ordered, so a value is known to the sampler by its position. Where the study is not shared, the same seed
    and the same values give the same proposals. Where it is, plans that others have tried or are trying count as
    tried.
    """

    def __init__(
        self,
        searched: Searched,
        *,
        seeds: Sequence[Plan],
        strategy: Strategy,
    ) -> None:
        default, feasible = searched.default, searched.feasible
        self._backend: Backend = default.backend
        self._fixed_settings = {axis.name: axis.values[0] for axis in searched.axes if len(axis.values) == 1}
        self._axes = [axis for axis in searched.axes if len(axis.values) > 1]
        self._feasible = frozenset(feasible)
        self._untried = dict.fromkeys((default, *seeds, *feasible))
        self._budget = min(strategy.trials, len(self._untried))
        self._first = [default, *(plan for plan in dict.fromkeys(seeds) if plan != default)]
        if len(self._untried) <= strategy.trials:
            self._first = list(self._untried)
        elif strategy.sampler == "grid":
            self._first = [default, *_evenly([plan for plan in feasible if plan != default], self._budget - 1)]
        self._random = random.Random(strategy.seed)
        self._steps = strategy.sampler in LEARNERS
        self._turn = 0
        self._taken: set[Plan] = set()
        self._known: dict[Plan, float] = {}
        self._asked: dict[Plan, optuna.Trial] = {}
        self._penalised: list[optuna.Trial] = []  # until a real value says how much
        self._share = strategy.share
        self._turns = contextlib.nullcontext() if self._share is None else self._share.turns()
        self._notes: list[str] = []
        self._heard_of: set[int] = set()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = _MAKERS[strategy.sampler](strategy.seed)
        if self._share is None:
            self._study = optuna.create_study(sampler=sampler)
        else:
            self._study = self._share.open(sampler)
            self._listen()

    @property
    def left(self) -> int:
        """Plans that may still be proposed."""
        return self._budget - len(self._taken)

    def ask(self, count: int) -> list[Plan]:
        """Up to `count` plans to try next; fewer, or none, when there is nothing left to try."""
        plans: list[Plan] = []
        while len(plans) < count and self.left > 0:
            if self._share is not None:
                self._listen()
                if self.left <= 0:
                    break
            plan = self._propose()
            if plan is not None:
                plans.append(plan)
        return plans

    def tell(self, plan: Plan, value: float | None, note: str = "") -> None:
        """What trying a plan gave, smaller being better; None for one that failed. `note` is for those who share."""
        trial = self._asked.pop(plan)
        if value is not None:
            self._known[plan] = value
        if self._share is not None:
            self._heard_of.add(trial.number)
            trial.set_user_attr(shared_study.NOTE, note)
            trial.set_user_attr(shared_study.FAILED, value is None)
        self._say(trial, value)

    def heard(self) -> list[str]:
        """What others who share the study have noted since the last time this was asked."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Gives back what was asked for and not tried, so that others who share the study may try it."""
        for trial in self._asked.values():
            self._study.tell(trial, state=TrialState.FAIL)
        self._asked.clear()
        self._tell_penalties()

    def _say(self, trial: optuna.Trial, value: float | None) -> None:
        """Tells the sampler a value, or the penalty for None, as soon as there is a value to set it by: a made-up one
        would be all that a sampler that fits a surface sees."""
        if value is not None:
            self._study.tell(trial, value)
        else:
            self._penalised.append(trial)
        if self._known:
            self._tell_penalties()

    def _tell_penalties(self) -> None:
        penalty = PENALTY_RATIO * max(self._known.values(), default=1.0)
        for trial in self._penalised:
            self._study.tell(trial, penalty)
        self._penalised.clear()

    def _propose(self) -> Plan | None:
        """A plan nobody has tried; None where another process was quicker."""
        while self._first:
            plan = self._first.pop(0)
            if plan in self._untried:
                return self._take(self._fixed(plan))
        self._turn += 1
        if self._steps and self._turn % TURNS and (near := self._near_the_best()) is not None:
            return self._take(self._fixed(near))
        for _ in range(MOST_REPEATS):
            trial = self._ask()
            plan = self._plan_of(trial.params)
            if plan in self._untried:
                return self._take(trial)
            self._refuse(trial, self._known.get(plan))
        return self._take(self._fixed(self._random.choice(list(self._untried))))

    def _near_the_best(self) -> Plan | None:
        """An untried neighbour of the best plan that has one, among the few best."""
        for plan in heapq.nsmallest(FEW_BEST, self._known, key=self._known.__getitem__):
            near = [other for other in neighbours(plan, self._axes, self._feasible) if other in self._untried]
            if near:
                return self._random.choice(near)
        return None

    def _ask(self) -> optuna.Trial:
        positions: dict[str, BaseDistribution] = {
            axis.name: IntDistribution(0, len(axis.values) - 1) for axis in self._axes
        }
        with self._turns:
            trial = self._study.ask(positions)
            if self._share is not None:
                trial.set_user_attr(shared_study.WORKER, self._share.worker)
        return trial

    def _fixed(self, plan: Plan) -> optuna.Trial:
        """Makes the sampler ask for this very plan."""
        with self._turns:
            self._study.enqueue_trial({axis.name: axis.values.index(plan[axis.name]) for axis in self._axes})
            return self._ask()

    def _take(self, trial: optuna.Trial) -> Plan | None:
        plan = self._plan_of(trial.params)
        if plan not in self._untried or (self._share is not None and self._is_too_late(trial, plan)):
            self._refuse(trial, self._known.get(plan))
            return None
        del self._untried[plan]
        self._taken.add(plan)
        self._asked[plan] = trial
        if self._share is not None:
            trial.set_user_attr(shared_study.PLAN, str(plan))
        return plan

    def _refuse(self, trial: optuna.Trial, value: float | None) -> None:
        """Tells the sampler what it should have known: the value of a plan that was tried, the penalty for another."""
        if self._share is not None:
            trial.set_user_attr(shared_study.REFUSED, True)
        self._say(trial, value)

    def _plan_of(self, positions: dict[str, int]) -> Plan:
        settings: dict[str, Setting] = {axis.name: axis.values[positions[axis.name]] for axis in self._axes}
        return Plan.of(self._backend, **self._fixed_settings, **settings)

    def _listen(self) -> None:
        """Takes in what other processes have tried, and what they are trying."""
        shared_study.reap(self._study)
        abandoned = {plan for plan in self._taken if plan not in self._asked and plan not in self._known}
        for trial in self._study.get_trials(deepcopy=False):
            if not self._counts(trial):
                continue
            plan = self._plan_of(trial.params)
            abandoned.discard(plan)
            self._taken.add(plan)
            self._untried.pop(plan, None)
            if trial.state == TrialState.COMPLETE and trial.number not in self._heard_of:
                self._heard_of.add(trial.number)
                if not trial.user_attrs.get(shared_study.FAILED) and trial.value is not None:
                    self._known[plan] = trial.value
                self._notes.append(str(trial.user_attrs.get(shared_study.NOTE, "")))
        for plan in abandoned:  # its worker has died since: it may be tried again
            self._taken.discard(plan)
            self._untried[plan] = None

    def _counts(self, trial: FrozenTrial) -> bool:
        """Whether a trial stands for a plan that is tried or being tried."""
        is_whole = len(trial.params) == len(self._axes)
        return is_whole and trial.state != TrialState.FAIL and not trial.user_attrs.get(shared_study.REFUSED)

    def _is_too_late(self, mine: optuna.Trial, plan: Plan) -> bool:
        """Whether others took the same plan, or the last of the trials, first: of those who ask at once the lowest
        number has it."""
        earlier = {self._plan_of(trial.params) for trial in self._before(mine) if self._counts(trial)}
        return plan in earlier or len(earlier) >= self._budget

    def _before(self, mine: optuna.Trial) -> list[FrozenTrial]:
        """The trials with lower numbers, once each that is under way has said what it tries; one whose worker died
        before it could is not waited for longer than SAYS_WITHIN_S."""
        deadline = time.monotonic() + SAYS_WITHIN_S
        while True:
            before = [trial for trial in self._study.get_trials(deepcopy=False) if trial.number < mine.number]
            silent = [t for t in before if t.state == TrialState.RUNNING and len(t.params) < len(self._axes)]
            if not silent or time.monotonic() > deadline:
                return before
            time.sleep(0.005)


def neighbours(plan: Plan, axes: Sequence[Axis], feasible: Collection[Plan]) -> Iterator[Plan]:
    """The nearest feasible plans along each axis: one on either side where it has an order, else all."""
    for axis in axes:
        at = axis.values.index(plan[axis.name])
        sides = (axis.values[at + 1 :], axis.values[:at][::-1])
        found = [
            [other for value in side if (other := plan.replace(**{axis.name: value})) in feasible] for side in sides
        ]
        is_ordered = isinstance(plan[axis.name], int)
        yield from (other for side in found for other in (side[:1] if is_ordered else side))


def _evenly(plans: Sequence[Plan], count: int) -> list[Plan]:
    """`count` plans at equal distances over the space."""
    return [plans[index * len(plans) // max(1, count)] for index in range(count)]
