"""Seeds: what a search begins with after the default, from the cost model and from packs of its kin."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pack_cases import ARCH, SCORED, SMALL, VERIFY, entry, publish
from specattn_codegen import space
from specattn_codegen.plan import Plan
from specattn_codegen.processors import gpus
from specattn_codegen.spec import Workload
from specattn_codegen.tuning.seeds import AS_GOOD, KIN_SEEDS, MODELLED_SEEDS, model_seeds, modelled_seeds, seeds_for
from specattn_codegen.tuning.shortlist import guessed_us
from specattn_codegen.tuning.tune_session import Target, Task
from specattn_codegen.workloads import default_workloads

TARGET = Target(arch=ARCH, backend="triton", is_present=True, page_size=16)
TASK = Task(spec=VERIFY, workloads=(SMALL,))
DEFAULT = space.default_plan(VERIFY, ARCH, "triton")
OTHERS = [plan for plan in space.feasible(VERIFY, ARCH, "triton") if plan not in model_seeds(TASK, TARGET)]


def kin(root: Path, *sizes: tuple[Workload, Plan], arch: str = ARCH.name) -> None:
    publish(root, *(dataclasses.replace(entry(workload=size), plan=plan) for size, plan in sizes), arch=gpus.find(arch))


def test_the_model_comes_first_then_the_nearest_size_here_then_siblings(tmp_path: Path) -> None:
    near, far = Workload(batch=1, q_len=7, kv_len=8192), Workload(batch=16, q_len=7, kv_len=131072)
    kin(tmp_path, (SMALL, OTHERS[30]), arch="h200")
    kin(tmp_path, (far, OTHERS[10]), (near, OTHERS[20]))
    seeds = seeds_for(TASK, TARGET, [tmp_path])
    assert seeds == [*model_seeds(TASK, TARGET), OTHERS[20], OTHERS[10], OTHERS[30]]
    assert len(set(seeds)) == len(seeds)


def test_kin_are_few_of_this_very_kernel_and_feasible_here(tmp_path: Path) -> None:
    sizes = [Workload(batch=1, q_len=7, kv_len=4096 << doubling) for doubling in range(6)]
    kin(tmp_path, *zip(sizes, OTHERS[:60:10], strict=True))
    damaged = tmp_path / "l40s" / f"{VERIFY.heads.name}.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    assert len(seeds_for(TASK, TARGET, [tmp_path])) == len(model_seeds(TASK, TARGET)) + KIN_SEEDS
    scored = Task(spec=SCORED, workloads=(SMALL,))
    assert seeds_for(scored, TARGET, [tmp_path]) == model_seeds(scored, TARGET)  # another kernel has no kin here
    other = tmp_path / "elsewhere"
    too_large = next(
        plan
        for plan in space.feasible(VERIFY, ARCH, "triton")
        if space.why_invalid(plan, VERIFY, gpus.find("rtx4090")) is not None
    )
    kin(other, (SMALL, too_large))
    small = Target(arch=gpus.find("rtx4090"), backend="triton", is_present=True, page_size=16)
    assert too_large not in seeds_for(TASK, small, [other])


def test_where_nothing_is_timed_few_plans_that_serve_every_size_come_first(tmp_path: Path) -> None:
    target = dataclasses.replace(TARGET, is_present=False)
    task = Task(spec=SCORED, workloads=default_workloads(SCORED, ARCH))
    guesses = [guessed_us(SCORED, workload, ARCH, "triton") for workload in task.workloads]
    seeds = modelled_seeds(task, target)
    assert seeds_for(task, target, [tmp_path]) == seeds
    assert len(set(seeds)) == len(seeds) == MODELLED_SEEDS

    limits = [(1 + AS_GOOD) * min(times.values()) for times in guesses]
    serves = {plan: {size for size, times in enumerate(guesses) if times[plan] <= limits[size]} for plan in guesses[0]}
    everything, served = set(range(len(guesses))), serves[space.default_plan(SCORED, ARCH, "triton")]
    assert served < everything
    first = next(
        count for count in range(len(seeds)) if served.union(*(serves[plan] for plan in seeds[:count])) == everything
    )
    assert first < len(everything) - len(served)  # a plan for each size would do as well
    for place, plan in enumerate(seeds[:first]):
        before = served.union(*(serves[plan] for plan in seeds[:place]))
        most = max(len(sizes - before) for sizes in serves.values())
        assert len(serves[plan] - before) == most > 0
