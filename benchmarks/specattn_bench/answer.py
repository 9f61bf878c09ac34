"""A measured answer: timed, printed, written and drawn the same way for every question of ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from specattn_bench import case_plots, report, runs, tables
from specattn_bench.ceilings import Ceilings
from specattn_bench.options import Places
from specattn_bench.plots import Bars, colours
from specattn_bench.runs import Run
from specattn_bench.series import CaseT, Series
from specattn_bench.standing import Beside, Standing, standings

COLUMNS = ("series", "median", "20-80 %", "GB/s", "of read", "of floor")
LEGEND = (
    "GB/s: of the least bytes that must be moved. of read: of the read ceiling.",
    "of floor: the longer of bytes at the read ceiling and operations at the multiply ceiling, over the median.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """name: of the subcommand; title: what is the same for all cases; settings: of the JSON's head. besides: ratios, of
    which the picture shows the first as bars and the second as diamonds; legend: of their columns."""

    name: str
    title: str
    settings: Mapping[str, object]
    besides: tuple[Beside, ...]
    legend: tuple[str, ...]


def measure(
    question: Question,
    cases: Sequence[CaseT],
    measure_case: Callable[[CaseT], list[Series[CaseT]]],
    measure_ceilings: Callable[[], Ceilings],
    places: Places,
) -> None:
    """Times every case, prints the answer, writes it and draws it."""
    run = runs.time_cases(cases, measure_case, measure_ceilings)
    found = standings(run.series, run.best, question.besides)
    title = f"measured: {question.title}, {report.device(places.arch)}"
    show(question, run, found, title, report.screen())
    by_series = {id(standing.series): standing for standing in found}
    written = {
        **report.header(question.name, places.arch, run.load),
        **question.settings,
        "ceilings": run.ceilings,
        "results": [result(one, by_series.get(id(one))) for one in run.series],
    }
    for place in places.json:
        report.write_json(place, written)
    if places.picture is not None:
        case_plots.draw(places.picture, title, found, bars(found, question.besides), colour(found))


def result(series: Series[Any], standing: Standing | None) -> dict[str, object]:
    """One series as a flat JSON object; only what names it and says why where it was not timed."""
    named = tables.series_facts(series)
    if standing is None:
        return named
    return {
        **named,
        **tables.timing_facts(standing.timing),
        "gbs": round(standing.gbs, 2),
        "least_bytes": series.work.memory_bytes,
        "least_operations": series.work.operations,
        "scattered_row_bytes": series.scattered,
        "floor_us": round(standing.floor.microseconds, 1),
        "floor_is": standing.floor.bound,
        "share_of_read_ceiling": tables.rounded(standing.share_of_read),
        "share_of_gather_ceiling": tables.rounded(standing.share_of_gather),
        "share_of_floor": tables.rounded(standing.share_of_floor),
        **{key: tables.rounded(ratio) for key, ratio in standing.ratios.items()},
    }


def show(question: Question, run: Run[Series[CaseT]], found: Sequence[Standing], title: str, screen: Console) -> None:
    by_series = {id(standing.series): standing for standing in found}
    scattered = ["of gather"] if any(one.share_of_gather is not None for one in found) else []
    table = tables.table(title, (*COLUMNS, *(beside.column for beside in question.besides), *scattered))
    for case in dict.fromkeys(one.case for one in run.series):
        table.add_row(case.name, style="bold")
        for one in (one for one in run.series if one.case == case):
            standing = by_series.get(id(one))
            table.add_row(f"  {one.label}", *(("not served",) if standing is None else cells(standing)))
        table.add_section()
    screen.print(table)
    reasons = [f"{one.case.name}, {one.label}: {one.refused}" for one in run.series if one.refused]
    line = tables.ceilings_line(run.before, run.after, run.best)
    tables.print_lines(screen, [*dict.fromkeys(reasons), line, *LEGEND, *question.legend, *run.warnings])


def cells(standing: Standing) -> tuple[str, ...]:
    return (
        *tables.timing_cells(standing.timing),
        f"{standing.gbs:.1f}",
        f"{standing.share_of_read:.0%}",
        f"{standing.share_of_floor:.0%}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in standing.ratios.values()),
        *([] if standing.share_of_gather is None else [f"{standing.share_of_gather:.0%}"]),
    )


def bars(found: Sequence[Standing], besides: Sequence[Beside]) -> Bars:
    first, second = besides[:2]

    def ratios(key: str) -> dict[str, dict[str, float]]:
        by_series: dict[str, dict[str, float]] = {}
        for one in found:
            ratio = one.ratios[key]
            if one.series.kind == "ours" and ratio is not None:
                by_series.setdefault(one.series.label, {})[one.series.case.name] = ratio
        return by_series

    return Bars(label=first.said, marks_label=second.said, values=ratios(first.key), marks=ratios(second.key))


def colour(found: Sequence[Standing]) -> dict[str, str]:
    ours = dict.fromkeys(one.series.label for one in found if one.series.kind == "ours")
    rest = dict.fromkeys(one.series.label for one in found if one.series.kind != "ours")
    return colours(list(ours), list(rest))
