"""Search: proposals, on a space whose best plan is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from specattn_codegen import space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.processors import gpus
from specattn_codegen.spec import KernelSpec, ScoreSpec
from specattn_codegen.tuning import shared_study
from specattn_codegen.tuning.search import (
    FEW_BEST,
    PENALTY_RATIO,
    TURNS,
    Sampler,
    Search,
    Strategy,
    neighbours,
    space_of,
)
from specattn_codegen.tuning.shared_study import Share, open_storage

ARCH = gpus.find("h100")
HEADS = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
SCORED = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16, score=ScoreSpec())
SELECT = KernelSpec(op="select_kv", heads=HEADS, selection="kv_head")
POSITIONS = {axis.name: {value: at for at, value in enumerate(axis.values)} for axis in space.axes(SCORED, "triton")}
BEST = list(space.feasible(SCORED, ARCH, "triton"))[1234]


def cost(plan: Plan) -> float:
    """One bowl over the positions of the axes, its bottom at BEST."""
    return 1.0 + sum((at[plan[name]] - at[BEST[name]]) ** 2 for name, at in POSITIONS.items())


def explore(search: Search, batch: int = 1) -> list[Plan]:
    plans: list[Plan] = []
    while asked := search.ask(batch):
        for plan in asked:
            plans.append(plan)
            search.tell(plan, cost(plan))
    return plans


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_the_best_of_thousands_in_a_hundred_and_tries_nothing_twice(seed: int) -> None:
    plans = explore(
        Search(space_of(SCORED, ARCH, "triton"), seeds=(), strategy=Strategy(sampler="tpe", trials=100, seed=seed)),
        batch=4,
    )
    assert len(plans) == len(set(plans)) == 100
    assert all(space.why_invalid(plan, SCORED, ARCH) is None for plan in plans)
    assert min(map(cost, plans)) == cost(BEST) == 1.0


def test_the_default_comes_first_and_the_seeds_next() -> None:
    plans = explore(
        Search(space_of(SCORED, ARCH, "triton"), seeds=(BEST, BEST), strategy=Strategy(sampler="tpe", trials=5, seed=0))
    )
    assert plans[:2] == [space.default_plan(SCORED, ARCH, "triton"), BEST]
    assert len(plans) == len(set(plans)) == 5


def test_equal_seeds_propose_equally() -> None:
    first, second, other = (
        explore(
            Search(space_of(SCORED, ARCH, "triton"), seeds=(), strategy=Strategy(sampler="tpe", trials=20, seed=seed))
        )
        for seed in (7, 7, 8)
    )
    assert first == second != other


def test_a_small_space_is_swept_whole() -> None:
    feasible = set(space.feasible(SELECT, ARCH, "triton"))
    search = Search(space_of(SELECT, ARCH, "triton"), seeds=(), strategy=Strategy(sampler="tpe", trials=10_000, seed=0))
    seen: list[Plan] = []
    while plans := search.ask(3):
        seen.extend(plans)
        for plan in plans:
            search.tell(plan, None)
    assert len(seen) == len(feasible)
    assert set(seen) == feasible


def test_penalties_stand_beside_real_values_even_before_there_is_one(tmp_path: Path) -> None:
    share = Share(storage=open_storage(f"journal:{tmp_path / 'study.log'}"), name="a search", worker="a test")
    searched = space_of(SCORED, ARCH, "triton")
    search = Search(searched, seeds=(), strategy=Strategy(sampler="tpe", trials=12, seed=0, share=share))
    for turn, plan in enumerate(search.ask(8)):  # some of what the sampler proposes is infeasible
        search.tell(plan, None if turn < 2 else 50.0 + turn)
    search.close()
    trials = optuna.load_study(study_name=share.name, storage=share.storage).get_trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    values = [trial.value for trial in trials if trial.value is not None]
    assert len(values) > 8
    assert max(values) <= PENALTY_RATIO * 57.0
    assert sum(value > 57.0 for value in values) == len(values) - 6
    told = [trial.user_attrs[shared_study.PLAN] for trial in trials if not trial.user_attrs.get(shared_study.REFUSED)]
    assert len(told) == len(set(told)) == 8
    assert set(told) <= set(map(str, searched.feasible))


def test_every_plan_failing_still_ends_and_repeats_nothing() -> None:
    spec = dataclasses.replace(SELECT, selection="layer")
    search = Search(space_of(spec, ARCH, "triton"), seeds=(), strategy=Strategy(sampler="tpe", trials=20, seed=0))
    seen: list[Plan] = []
    while plans := search.ask(1):
        seen.extend(plans)
        search.tell(plans[0], None)
    assert len(seen) == len(set(seen)) == 20


def test_neighbours_are_the_nearest_feasible_plans_along_each_axis() -> None:
    axes, feasible = space.axes(SCORED, "triton"), list(space.feasible(SCORED, ARCH, "triton"))
    near = list(neighbours(BEST, axes, frozenset(feasible)))
    assert len(near) == len(set(near))
    for axis in axes:
        at = axis.values.index(BEST[axis.name])
        line = [plan for plan in feasible if plan.replace(**{axis.name: BEST[axis.name]}) == BEST and plan != BEST]
        places = {axis.values.index(plan[axis.name]): plan for plan in line}
        below, above = [i for i in places if i < at], [i for i in places if i > at]
        if isinstance(BEST[axis.name], int):
            below, above = below[-1:], above[:1]
        assert {places[i] for i in below + above} == {plan for plan in near if plan in line}


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_samplers_take_turns_with_steps_from_the_best(sampler: Sampler) -> None:
    searched = space_of(SCORED, ARCH, "triton")
    search = Search(searched, seeds=(), strategy=Strategy(sampler=sampler, trials=20, seed=3))
    feasible, told, steps = frozenset(searched.feasible), list[Plan](), 0
    while asked := search.ask(1):
        best = sorted(told, key=cost)[:FEW_BEST]
        steps += any(asked[0] in set(neighbours(plan, searched.axes, feasible)) for plan in best)
        search.tell(asked[0], cost(asked[0]))
        told.extend(asked)
    assert steps >= (20 - 1) * (TURNS - 1) // TURNS
