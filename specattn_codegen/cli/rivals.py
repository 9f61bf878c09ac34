"""Plans that rank beside a pack's and that nothing has proved: shown after a search, recorded, and never dispatched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from specattn_codegen.cli.progress import microseconds
from specattn_codegen.packs.pack import Entry
from specattn_codegen.plan import Plan
from specattn_codegen.tuning.outcome import Status
from specattn_codegen.tuning.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """The best plan of another backend than the one an entry took, and its modelled time."""

    entry: Entry
    plan: Plan
    latency_us: float


def find_rivals(entries: Sequence[Entry], trials: Sequence[Record]) -> list[Rival]:
    """For every modelled entry, the best compiled plan of each backend that no entry of its kernel is of."""
    return [rival for entry in entries if entry.chosen_by == "modelled" for rival in _rivals_of(entry, entries, trials)]


def _rivals_of(entry: Entry, entries: Sequence[Entry], trials: Sequence[Record]) -> Iterator[Rival]:
    taken = {one.plan.backend for one in entries if one.spec == entry.spec}
    found = [
        Rival(entry=entry, plan=trial.plan, latency_us=trial.predicted_us[entry.workload.name])
        for trial in trials
        if trial.spec == entry.spec
        and trial.plan.backend not in taken
        and trial.outcome.status is Status.OK
        and entry.workload.name in trial.predicted_us
    ]
    for backend in sorted({rival.plan.backend for rival in found}):
        yield min((rival for rival in found if rival.plan.backend == backend), key=lambda rival: rival.latency_us)


def rivals_table(rivals: Sequence[Rival]) -> Table:
    """A ratio above 1 says by how much the model would rather have the plan that nothing has proved."""
    table = Table(
        box=box.SIMPLE, title="modelled, proved by none: recorded, and no pack takes them", title_justify="left"
    )
    table.add_column("op", overflow="fold")  # gives way on a narrow terminal, so that no figure has to
    table.add_column("workload", no_wrap=True)
    table.add_column("plan")
    for title in ("time", "the pack's", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    for above, rival in zip((None, *rivals), rivals, strict=False):
        same_plan = above is not None and above.entry.spec == rival.entry.spec and above.plan == rival.plan
        table.add_row(
            rival.entry.spec.name,
            rival.entry.workload.name,
            "  as above" if same_plan else str(rival.plan),
            microseconds(rival.latency_us),
            f"{rival.entry.plan.backend} {microseconds(rival.entry.latency_us)}",
            f"{rival.entry.latency_us / rival.latency_us:.2f}",
        )
    return table
