"""Seeds: plans that did well for something similar, or that the cost model likes. A search tries them first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from specattn_codegen import buckets, pack, space
from specattn_codegen.environment import Silicon
from specattn_codegen.errors import PackError
from specattn_codegen.pack import Entry
from specattn_codegen.plan import Plan
from specattn_codegen.shortlist import ranked
from specattn_codegen.tune_session import Target, Task

MODEL_SEEDS = 4  # of a task's workloads together
KIN_SEEDS = 3  # from packs


def seeds_for(task: Task, target: Target, roots: Sequence[Path]) -> list[Plan]:
    """Distinct plans, all of them feasible: the model's best for each workload, then winners from the packs under
    `roots`, of the nearest size on this processor first, then of its siblings."""
    relatives = sorted(_relatives(task, target, roots), key=lambda relative: _strangeness(*relative, task, target))
    kin = (entry.plan for _, entry in relatives if space.why_invalid(entry.plan, task.spec, target.arch) is None)
    return [*model_seeds(task, target), *list(dict.fromkeys(kin))[:KIN_SEEDS]]


def model_seeds(task: Task, target: Target) -> list[Plan]:
    """The best of each workload in turn, then the second best, up to MODEL_SEEDS plans and one for each workload."""
    orders = [ranked(task.spec, workload, target.arch, target.backend) for workload in task.workloads]
    count = max(MODEL_SEEDS, len(orders))
    in_turn = dict.fromkeys(plan for rank in itertools.islice(zip(*orders, strict=True), count) for plan in rank)
    return list(in_turn)[:count]


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
