"""The cost model held against what was measured: does it rank plans rightly, and what would its first choice cost?"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Sequence

from benchmarks.gpu.journal import Answer
from benchmarks.gpu.session import Session, Step, Steps
from benchmarks.gpu.sizes import PAGE_SIZE
from benchmarks.gpu.tuning import TRIALS
from specattn_codegen import space
from specattn_codegen.cost_model import guess_resources, predict
from specattn_codegen.cost_model.calibration import (
    LEAST_PLANS,
    Observation,
    by_case,
    case_rank_correlation,
    fit,
    regret,
    terms_by_limit,
)
from specattn_codegen.digest import digest
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import gpus
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import record
from specattn_codegen.tuning.outcome import Status
from specattn_codegen.workloads import REFERENCE_SCORES

MADE_UP_EVERY = 97  # of the feasible plans
MADE_UP = "made-up times from the model's own terms, to exercise the arithmetic: nothing was measured"


def steps(session: Session) -> Steps:
    found = made_up() if session.is_rehearsal else measured(session)
    key = f"model/{digest([one.measured_us for one in found])}"  # asked again once there are more trials
    yield Step(key=key, seconds=5, run=functools.partial(compare, session, found))


def measured(session: Session) -> list[Observation]:
    """Every trial that was timed on this device, by task."""
    return [
        Observation(
            case=f"{trial.spec.heads.name} {trial.spec.name} {trial.workload.name}",
            terms=terms_by_limit(
                predict(trial.spec, trial.workload, trial.plan, session.arch, trial.outcome.resources)
            ),
            measured_us=trial.outcome.timings[0].median_us,
        )
        for trial in record.read(session.journal.folder / TRIALS)
        if trial.stage == "measure" and trial.outcome.status is Status.OK and trial.workload is not None
    ]


def made_up() -> list[Observation]:
    """Terms of an H200 that memory slows by a third more than the model believes, and launches twice as much."""
    arch, heads = gpus.find("h200"), HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=64)
    spec = KernelSpec(op="verify_attention", heads=heads, dtype="bfloat16", page_size=PAGE_SIZE, score=REFERENCE_SCORES)
    factors = {"memory": 4 / 3, "launch": 2.0}
    plans = list(itertools.islice(space.feasible(spec, arch, "triton"), 0, None, MADE_UP_EVERY))
    return [
        Observation(
            case=workload.name,
            terms=terms_by_limit(prediction),
            measured_us=sum(term.microseconds * factors.get(term.limit, 1.0) for term in prediction.terms),
        )
        for workload in (Workload(batch=b, q_len=4, kv_len=n) for b, n in ((1, 8192), (4, 32768), (16, 65536)))
        for prediction in (predict(spec, workload, plan, arch, guess_resources(spec, plan, arch)) for plan in plans)
    ]


def compare(session: Session, found: Sequence[Observation]) -> Answer:
    """Each case with the model as it is, and as calibrated by all the other cases."""
    cases = by_case(found)
    if not cases:
        return session.label({"skipped": f"no task has {LEAST_PLANS} timed plans yet"})
    factors = {case: fit([one for one in found if one.case != case]) for case in cases}
    rows = {
        case: {
            "plans": len(timed),
            "rank_correlation": case_rank_correlation(timed, {}),
            "regret": regret(timed, {}),
            "calibrated_rank_correlation": case_rank_correlation(timed, factors[case]),
            "calibrated_regret": regret(timed, factors[case]),
        }
        for case, timed in cases.items()
    }
    names = ("rank_correlation", "regret", "calibrated_rank_correlation", "calibrated_regret")
    medians = {name: statistics.median(row[name] for row in rows.values()) for name in names}
    answer: dict[str, object] = {"tasks": rows, "medians": medians, "factors": fit(found)}
    return {**session.label(answer), "note": MADE_UP} if session.is_rehearsal else answer
