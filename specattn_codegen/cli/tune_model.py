"""specattn-tune --explain and --calibrate: what the cost model says and why, and how far it agrees with records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from specattn_codegen import cost_model, space
from specattn_codegen.cli.progress import microseconds
from specattn_codegen.cli.tune_replay import arch_of, read_measured
from specattn_codegen.cli.tune_request import Request
from specattn_codegen.cost_model import Prediction
from specattn_codegen.cost_model.calibration import Agreement, Observation, agreement, fit, terms_by_limit
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.outcome import Status
from specattn_codegen.plan import Plan
from specattn_codegen.record import Record
from specattn_codegen.shortlist import ranked
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tune_session import Target


def explain(request: Request, kinds: Sequence[HeadConfig], target: Target, screen: Console) -> None:
    """For every kernel and size, the terms of the default plan and of the model's own choice. Nothing is built."""
    screen.print(
        f"modelled for {target.arch.name}: nothing was built or timed; registers and shared memory are guesses",
        markup=False,
        soft_wrap=True,
    )
    for heads in kinds:
        for task in request.tasks(heads, target):
            if not cost_model.covers(task.spec, target.backend):
                continue
            for workload in task.workloads:
                screen.print(explanation(task.spec, workload, target))


def explanation(spec: KernelSpec, workload: Workload, target: Target) -> Table:
    """The terms of every backend's default plan and of the plan that the model likes best of all of that backend's."""
    table = Table(box=box.SIMPLE, title=f"{spec.name} {workload.name}", title_justify="left")
    for name in ("plan", "term", "bound by"):
        table.add_column(name)
    for name in ("time", "share", "of ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in target.each(spec):
        default = space.default_plan(spec, one.arch, one.backend)
        choice = ranked(spec, workload, one.arch, one.backend)[0]
        named = f"{one.backend}, " if target.further else ""
        for label, plan in ((f"{named}default", default), (f"{named}the model's choice", choice)):
            _add_rows(table, label, plan, _predict(spec, workload, plan, one))
    return table


def _predict(spec: KernelSpec, workload: Workload, plan: Plan, target: Target) -> Prediction:
    guessed = cost_model.guess_resources(spec, plan, target.arch)
    return cost_model.predict(spec, workload, plan, target.arch, guessed)


def _add_rows(table: Table, label: str, plan: Plan, prediction: Prediction) -> None:
    settings = " ".join(f"{name}={value}" for name, value in plan.settings)
    for index, term in enumerate(prediction.terms):
        table.add_row(
            f"{label}: {settings}" if index == 0 else "",
            term.name,
            term.limit,
            microseconds(term.microseconds),
            f"{term.microseconds / prediction.latency_us:.0%}",
        )
    residency = prediction.residency
    waiting = residency.bytes_in_flight / residency.bytes_to_saturate
    table.add_row(
        f"  {prediction.excess_bytes:.2f} x the least bytes; {waiting:.1f} x the bytes in flight that saturate memory",
        "in all",
        prediction.bound,
        microseconds(prediction.latency_us),
        "",
        f"{prediction.share_of_ceiling:.0%}",
        end_section=True,
    )


def calibrate(path: Path, screen: Console) -> None:
    """Fits the model's terms to measured records and prints how well it agrees with them, before and after."""
    observations = [found for trial in read_measured(path) if (found := observe(trial)) is not None]
    before = agreement(observations, {})
    if before is None:
        raise SpecError(f"{path}: too few measured plans of any kernel and size to compare an order with")
    factors = fit(observations)
    after = agreement(observations, factors)
    table = Table(box=box.SIMPLE)
    for name in ("", "rank correlation", "regret of the first choice", "typical error"):
        table.add_column(name, justify="left" if not name else "right")
    for label, found in (("as it is", before), ("fitted", after)):
        if found is not None:
            table.add_row(label, *_agreement_cells(found))
    screen.print(f"{before.plans} plans of {before.cases} kernels and sizes", markup=False)
    screen.print(table)
    screen.print("factors that fit: " + ", ".join(f"{limit} x {factor:.3g}" for limit, factor in factors.items()))


def _agreement_cells(found: Agreement) -> tuple[str, str, str]:
    return f"{found.rank_correlation:.2f}", f"{found.regret:.1%}", f"{found.error:.1%}"


def observe(trial: Record) -> Observation | None:
    """None for a trial that failed, and for a kernel the model does not know."""
    if trial.outcome.status is not Status.OK or trial.workload is None:
        return None
    arch = arch_of(trial.silicon)
    try:
        prediction = cost_model.predict(trial.spec, trial.workload, trial.plan, arch, trial.outcome.resources)
    except SpecError:
        return None
    case = f"{trial.spec.heads.name} {trial.spec.name} {trial.workload.name}"
    return Observation(case=case, measured_us=trial.outcome.timings[0].median_us, terms=terms_by_limit(prediction))
