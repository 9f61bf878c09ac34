"""The cost model held against what was measured: does it rank plans rightly, and what would its first choice cost?"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.gpu.journal import Answer
from benchmarks.gpu.session import Session, Step, Steps
from benchmarks.gpu.sizes import PAGE_SIZE
from benchmarks.gpu.tuning import TRIALS
from specattn_codegen import gpus, record, space
from specattn_codegen.cost_model import Prediction, guess_resources, predict
from specattn_codegen.digest import digest
from specattn_codegen.heads import HeadConfig
from specattn_codegen.outcome import Status
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.workloads import REFERENCE_SCORES

LIMITS = ("memory", "l2", "matrix", "vector", "latency", "launch")
LEAST_PLANS = 4  # of a task, below which a rank says nothing
BELIEF = 0.05  # in the model as it is: what pulls a factor to 1 that few measurements speak for
FACTORS = (0.1, 10.0)  # bounds of what a measurement may make of a term
MADE_UP_EVERY = 97  # of the feasible plans
MADE_UP = "made-up times from the model's own terms, to exercise the arithmetic: nothing was measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One plan of a task: the model's prediction from its binary, and its median."""

    task: str
    prediction: Prediction
    measured_us: float


def steps(session: Session) -> Steps:
    found = made_up() if session.is_rehearsal else measured(session)
    key = f"model/{digest([one.measured_us for one in found])}"  # asked again once there are more trials
    yield Step(key=key, seconds=5, run=functools.partial(compare, session, found))


def measured(session: Session) -> list[Timed]:
    """Every trial that was timed on this device, by task."""
    return [
        Timed(
            task=f"{trial.spec.heads.name} {trial.spec.name} {trial.workload.name}",
            prediction=predict(trial.spec, trial.workload, trial.plan, session.arch, trial.outcome.resources),
            measured_us=trial.outcome.timings[0].median_us,
        )
        for trial in record.read(session.journal.folder / TRIALS)
        if trial.stage == "measure" and trial.outcome.status is Status.OK and trial.workload is not None
    ]


def made_up() -> list[Timed]:
    """Terms of an H200 that memory slows by a third more than the model believes, and launches twice as much."""
    arch, heads = gpus.find("h200"), HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=64)
    spec = KernelSpec(op="verify_attention", heads=heads, dtype="bfloat16", page_size=PAGE_SIZE, score=REFERENCE_SCORES)
    factors = {"memory": 4 / 3, "launch": 2.0}
    plans = list(itertools.islice(space.feasible(spec, arch, "triton"), 0, None, MADE_UP_EVERY))
    return [
        Timed(
            task=workload.name,
            prediction=prediction,
            measured_us=sum(term.microseconds * factors.get(term.limit, 1.0) for term in prediction.terms),
        )
        for workload in (Workload(batch=b, q_len=4, kv_len=n) for b, n in ((1, 8192), (4, 32768), (16, 65536)))
        for prediction in (predict(spec, workload, plan, arch, guess_resources(spec, plan, arch)) for plan in plans)
    ]


def compare(session: Session, found: Sequence[Timed]) -> Answer:
    by_task = tasks_of(found)
    if not by_task:
        return session.label({"skipped": f"no task has {LEAST_PLANS} timed plans yet"})
    factors = {task: fitted([one for one in found if one.task != task]) for task in by_task}
    rows = {
        task: {
            "plans": len(timed),
            **_standing("", timed, [one.prediction.latency_us for one in timed]),
            **_standing("calibrated_", timed, [scaled_us(one.prediction, factors[task]) for one in timed]),
        }
        for task, timed in by_task.items()
    }
    names = ("rank_correlation", "regret", "calibrated_rank_correlation", "calibrated_regret")
    medians = {name: statistics.median(row[name] for row in rows.values()) for name in names}
    answer: dict[str, object] = {"tasks": rows, "medians": medians, "factors": fitted(found)}
    return {**session.label(answer), "note": MADE_UP} if session.is_rehearsal else answer


def tasks_of(found: Sequence[Timed]) -> dict[str, list[Timed]]:
    tasks: dict[str, list[Timed]] = {}
    for one in found:
        tasks.setdefault(one.task, []).append(one)
    return {task: timed for task, timed in tasks.items() if len(timed) >= LEAST_PLANS}


def _standing(prefix: str, timed: Sequence[Timed], predicted: Sequence[float]) -> dict[str, float]:
    times = [one.measured_us for one in timed]
    chosen = times[min(range(len(times)), key=predicted.__getitem__)]
    return {
        f"{prefix}rank_correlation": rank_correlation(predicted, times),
        f"{prefix}regret": chosen / min(times) - 1.0,
    }


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


def _by_limit(prediction: Prediction) -> list[float]:
    return [sum(term.microseconds for term in prediction.terms if term.limit == limit) for limit in LIMITS]


def fitted(found: Sequence[Timed]) -> dict[str, float]:
    """Factors of the model's terms by what limits them, by least squares of relative errors, pulled to 1."""
    if not found:
        return dict.fromkeys(LIMITS, 1.0)
    shares = np.array([[part / one.measured_us for part in _by_limit(one.prediction)] for one in found])
    pull = BELIEF * np.sqrt(len(found)) * np.eye(len(LIMITS))
    wanted = np.concatenate([1.0 - shares.sum(axis=1), np.zeros(len(LIMITS))])
    changes = np.linalg.lstsq(np.concatenate([shares, pull]), wanted, rcond=None)[0]
    return dict(zip(LIMITS, np.clip(1.0 + changes, *FACTORS).tolist(), strict=True))


def scaled_us(prediction: Prediction, factors: Mapping[str, float]) -> float:
    return sum(term.microseconds * factors[term.limit] for term in prediction.terms)
