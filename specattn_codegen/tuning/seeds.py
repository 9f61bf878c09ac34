"""Seeds: plans that did well for something similar, or that the cost model likes. A search tries them first."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from specattn_codegen import buckets, cost_model, space
from specattn_codegen.environment import Silicon
from specattn_codegen.errors import PackError
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.plan import Plan
from specattn_codegen.tuning.shortlist import differences, guessed_us, ranked
from specattn_codegen.tuning.tune_session import Target, Task

MODEL_SEEDS = 4  # of a task's workloads together, where they are timed
KIN_SEEDS = 3  # from packs
MODELLED_SEEDS = 16  # where the model alone decides; a search asks for most of them only where binaries surprise it
# A plan guessed so close to the best of a size serves it as well: half of what makes two compiled plans equal
# (tune_modelled.MODEL_ERROR), as what a binary takes is guessed nearly right.
AS_GOOD = 0.01


def seeds_for(task: Task, target: Target, roots: Sequence[Path]) -> list[Plan]:
    """Distinct plans, all of them feasible: the model's best for each workload, then winners from the packs under
    `roots`, of the nearest size on this processor first, then of its siblings. Where nothing is timed those would be
    judged by the model as well, which has seen every plan."""
    if not target.is_present and cost_model.covers(task.spec, target.backend):
        return modelled_seeds(task, target)
    relatives = sorted(_relatives(task, target, roots), key=lambda relative: _strangeness(*relative, task, target))
    kin = (entry.plan for _, entry in relatives if space.why_invalid(entry.plan, task.spec, target.arch) is None)
    return [*model_seeds(task, target), *list(dict.fromkeys(kin))[:KIN_SEEDS]]


def model_seeds(task: Task, target: Target) -> list[Plan]:
    """The best of each workload in turn, then the second best, up to MODEL_SEEDS plans and one for each workload."""
    orders = [ranked(task.spec, workload, target.arch, target.backend) for workload in task.workloads]
    count = max(MODEL_SEEDS, len(orders))
    in_turn = dict.fromkeys(plan for rank in itertools.islice(zip(*orders, strict=True), count) for plan in rank)
    return list(in_turn)[:count]


def modelled_seeds(task: Task, target: Target) -> list[Plan]:
    """Up to MODELLED_SEEDS plans without the default: the fewest that serve all sizes which the default is not guessed
    to serve; then, of what is left, the fewest that serve all sizes; and so on. So few are compiled and proved."""
    default = space.default_plan(task.spec, target.arch, target.backend)
    guesses = [guessed_us(task.spec, workload, target.arch, target.backend) for workload in task.workloads]
    unserved = [times for times in guesses if times[default] > (1 + AS_GOOD) * min(times.values())]
    seeds: list[Plan] = []
    while len(seeds) < MODELLED_SEEDS and (fewest := _fewest(unserved or guesses, default, seeds)):
        seeds += fewest
        unserved = []
    return seeds[:MODELLED_SEEDS]


def _fewest(guesses: Sequence[Mapping[Plan, float]], default: Plan, known: Collection[Plan]) -> list[Plan]:
    """Plans beside the default and the known ones of which each size has one AS_GOOD as the best: always the one that
    serves most of the sizes left, among equals one that is much like the default, with which it may share functions.
    guesses: by size, the best plan first."""
    waiting = [_as_good(times, {default, *known}) for times in guesses]
    chosen: list[Plan] = []
    while waiting := [plans for plans in waiting if plans and plans.isdisjoint(chosen)]:
        served = Counter(itertools.chain.from_iterable(waiting))
        most = max(served.values())
        equals = [plan for plan, count in served.items() if count == most]
        chosen.append(min(equals, key=lambda plan: (differences(plan, default), _total(plan, guesses), str(plan))))
    return chosen


def _total(plan: Plan, guesses: Sequence[Mapping[Plan, float]]) -> float:
    """So that each size counts by ratio."""
    return sum(math.log(times[plan]) for times in guesses)


def _as_good(times: Mapping[Plan, float], known: Collection[Plan]) -> set[Plan]:
    left = ((plan, time) for plan, time in times.items() if plan not in known)
    best = next(left, None)
    if best is None:
        return set()
    limit = (1 + AS_GOOD) * best[1]
    return {best[0], *(plan for plan, _ in itertools.takewhile(lambda item: item[1] <= limit, left))}


def _relatives(task: Task, target: Target, roots: Sequence[Path]) -> Iterator[tuple[Silicon, Entry]]:
    """Entries for this very kernel on any processor of the same backend; damaged packs hold none."""
    for path in (path for root in roots for path in sorted(root.glob(f"*/{task.spec.heads.name}.json"))):
        try:
            found = pack.load(path)
        except (PackError, OSError):
            continue
        for entry in found.entries:
            same = pack.structure(entry.spec) == pack.structure(task.spec)
            if same and entry.plan.backend == target.backend:
                yield found.arch, entry


def _strangeness(silicon: Silicon, entry: Entry, task: Task, target: Target) -> tuple[int, float, str]:
    """How far an entry is from what is tuned: its processor's generation, then its size."""
    nearest = min(buckets.distance(task.spec.op, entry.workload, workload) for workload in task.workloads)
    generations = abs(silicon.compute_capability - target.arch.compute_capability)
    return generations + (silicon.name != target.arch.name), nearest, str(entry.plan)
