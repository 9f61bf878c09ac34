"""How the answer about verification is written down and shown. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from specattn_bench import tables
from specattn_bench.runs import Run
from specattn_bench.verify_series import Asked, Series
from specattn_bench.verify_standing import Standing

COLUMNS = (
    "series",
    "median",
    "20-80 %",
    "GB/s",
    "of reading",
    "of read",
    "of floor",
    "of method",
    "over none",
    "x best",
    "x plain",
)
LEGEND = (
    "of reading: what only reading K and V in order takes, in turns with the others, over the median.",
    "of read: bytes of K and V a second, of the read ceiling. of floor: the longer of bytes at the read ceiling and",
    "operations at the multiply ceiling, over the median. of method: the same with what this way to scores adds.",
    "over none: beside ours without scores. x best, x plain: times as fast as the fastest torch layout without scores,",
    "and as SDPA over K/V repeated for every head.",
)


def settings(asked: Asked) -> dict[str, object]:
    """What was asked, for the JSON's head."""
    return {
        "heads": asked.heads.name,
        "page_size": asked.page_size,
        **tables.source_facts(asked.plans),
    }


def result(series: Series, standing: Standing | None) -> dict[str, object]:
    """One series as a flat JSON object; only what names it and says why where it was not timed."""
    named = tables.series_facts(series)
    if standing is None:
        return {**named, "status": series.refused}
    return {
        **named,
        **tables.timing_facts(standing.timing),
        "cache_gbs": round(standing.cache_gbs, 2),
        "gflops": round(standing.gflops, 2),
        "least_bytes": series.work.memory_bytes,
        "least_operations": series.work.operations,
        "floor_us": round(standing.floor.microseconds, 1),
        "floor_is": standing.floor.bound,
        "share_of_reading": tables.rounded(standing.share_of_reading),
        "share_of_read_ceiling": tables.rounded(standing.share_of_read),
        "share_of_floor": tables.rounded(standing.share_of_floor),
        "share_of_method_floor": tables.rounded(standing.method_share),
        "overhead_over_none": tables.rounded(standing.over_none),
        "times_best_peer": tables.rounded(standing.to_best),
        "times_plain_peer": tables.rounded(standing.to_plain),
        "times_scored_peer": tables.rounded(standing.to_scored),
    }


def show(
    run: Run[Series],
    standings: Sequence[Standing],
    title: str,
    screen: Console,
) -> None:
    by_series = {standing.series: standing for standing in standings}
    table = tables.table(title, COLUMNS)
    for case in dict.fromkeys(one.case for one in run.series):
        table.add_row(case.name, style="bold")
        for one in (one for one in run.series if one.case == case):
            standing = by_series.get(one)
            cells = ("not served",) if standing is None else _cells(standing)
            table.add_row(f"  {one.label}", *cells)
        table.add_section()
    screen.print(table)
    reasons = [f"{one.case.dtype}, {one.label}: {one.refused}" for one in run.series if one.refused]
    line = tables.ceilings_line(run.before, run.after, run.best)
    tables.print_lines(screen, [*dict.fromkeys(reasons), line, *LEGEND, *run.warnings])


def _cells(standing: Standing) -> tuple[str, ...]:
    return (
        *tables.timing_cells(standing.timing),
        f"{standing.cache_gbs:.1f}",
        f"{standing.share_of_reading:.0%}",
        f"{standing.share_of_read:.0%}",
        f"{standing.share_of_floor:.0%}",
        "" if standing.method_share is None else f"{standing.method_share:.0%}",
        "" if standing.over_none is None else f"{standing.over_none:+.1%}",
        f"{standing.to_best:.2f}",
        f"{standing.to_plain:.2f}",
    )
