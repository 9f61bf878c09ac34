"""Pieces of a report that several questions print and write: tables, times, ceilings and plans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from specattn_bench.ceilings import Ceilings
from specattn_bench.plans import Chosen, Plans
from specattn_bench.series import Series
from specattn_codegen.tuning.outcome import Timing

TEXT_COLUMNS = ("series", "case", "plan", "binds", "label")


def table(title: str, columns: Sequence[str]) -> Table:
    empty = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        empty.add_column(column, justify="left" if column in TEXT_COLUMNS else "right", no_wrap=True)
    return empty


def print_lines(screen: Console, lines: Iterable[str]) -> None:
    for line in lines:
        screen.print(line, markup=False, soft_wrap=True)


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def source_facts(plans: Plans) -> dict[str, object]:
    return {"plans": plans.source, "overrides": dict(plans.overrides)}


def series_facts(series: Series[Any]) -> dict[str, object]:
    """What names a series in a JSON object, its case and its plan included; its status where it was not timed."""
    facts = {"series": series.name, "kind": series.kind, **series.case.facts(), **plan_facts(series.chosen)}
    return {**facts, "status": series.refused} if series.refused else facts


def plan_facts(chosen: Chosen | None) -> dict[str, object]:
    return {"plan": chosen and chosen.plan.as_dict(), "plan_found": chosen and chosen.found}


def timing_facts(timing: Timing) -> dict[str, object]:
    return {
        "status": "timed",
        "median_us": round(timing.median_us, 1),
        "low_us": round(timing.low_us, 1),
        "high_us": round(timing.high_us, 1),
        "p20_us": round(timing.p20_us, 1),
        "p80_us": round(timing.p80_us, 1),
        "n": timing.n,
        "noise_floor": round(timing.noise_floor, 4),
    }


def timing_cells(timing: Timing) -> tuple[str, str]:
    """The median with its unit, and the middle three fifths in the same."""
    scale, unit = (1e3, "ms") if timing.median_us >= 1e3 else (1.0, "us")
    return f"{timing.median_us / scale:.2f} {unit}", f"{timing.p20_us / scale:.2f}-{timing.p80_us / scale:.2f}"


def ceilings_line(before: Ceilings, after: Ceilings, best: Ceilings) -> str:
    read = f"{before.bandwidth_gbs:.1f} GB/s before, {after.bandwidth_gbs:.1f} after"
    multiply = ", ".join(f"{dtype} {rate * 1e3:.0f} GFLOP/s" for dtype, rate in best.tflops.items())
    gather = ", ".join(f"{size} bytes {rate:.1f} GB/s" for size, rate in best.gather_gbs.items())
    rates = [f"read {read}", f"multiply {multiply}", *([f"scattered rows of {gather}"] if gather else [])]
    return f"ceilings of this run, the better counts: {'; '.join(rates)}"
