"""specattn-tune --explain and --calibrate: what the cost model says and why, and its fit to records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from specattn_codegen import cost_model, space
from specattn_codegen.cli.progress import microseconds
from specattn_codegen.cli.tune_replay import arch_of, read_measured
from specattn_codegen.cli.tune_request import Request, announce_fit
from specattn_codegen.cost_model import Prediction
from specattn_codegen.cost_model.calibration import Agreement, Observation, agreement, fit, terms_by_limit
from specattn_codegen.environment import silicon
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import model_fit
from specattn_codegen.tuning.model_fit import ModelFit
from specattn_codegen.tuning.outcome import Status
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.shortlist import ranked
from specattn_codegen.tuning.tune_session import Target


def explain(request: Request, kinds: Sequence[HeadConfig], target: Target, screen: Console) -> None:
    """For every kernel and size, the terms of the default plan and of the model's own choice. Nothing is built."""
    screen.print(
        f"modelled for {target.arch.name}: nothing was built or timed; registers and shared memory are guesses",
        markup=False,
        soft_wrap=True,
    )
    announce_fit(target.arch, screen)
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


def calibrate(path: Path, to: Path | None, screen: Console) -> None:
    """Fits the model's terms to the measured records of one processor, prints how well it agrees with them, before and
    after, and writes the fit to `to`, or to the user's own folder: unless its first choices are the worse ones."""
    trials = read_measured(path)
    arch = _only_arch(path, trials)
    observations = [found for trial in trials if (found := observe(trial)) is not None]
    factors = fit(observations)
    before, after = agreement(observations, {}), agreement(observations, factors)
    if before is None or after is None:
        raise SpecError(f"{path}: too few measured plans of any kernel and size to compare an order with")
    table = Table(box=box.SIMPLE)
    for name in ("", "rank correlation", "regret of the first choice", "typical error"):
        table.add_column(name, justify="left" if not name else "right")
    for label, found in (("as it is", before), ("fitted", after)):
        table.add_row(label, *_agreement_cells(found))
    screen.print(f"{before.plans} plans of {before.cases} kernels and sizes", markup=False)
    screen.print(table)
    screen.print("factors that fit: " + ", ".join(f"{limit} x {factor:.3g}" for limit, factor in factors.items()))
    if after.regret > before.regret:
        screen.print("not written: the model as it is makes the better first choices")
        return
    target = to or model_fit.user_path(arch)
    made = ModelFit(arch=silicon(arch), model=model_fit.model_digest(), factors=factors, as_it_is=before, fitted=after)
    model_fit.write(target, made)
    taken = f"specattn-tune takes it for {arch.name}" + (" where it is given as --fit" if to else "")
    screen.print(f"fit: {target}; {taken}", markup=False, soft_wrap=True)


def _only_arch(path: Path, trials: Sequence[Record]) -> Arch:
    found = {trial.silicon for trial in trials}
    if len(found) > 1:
        names = ", ".join(sorted(f"{one.name} ({one.target}, {one.num_sms})" for one in found))
        raise SpecError(
            f"{path}: holds measurements of several processors, {names}; a fit is of one: give its own file"
        )
    return arch_of(found.pop())


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
