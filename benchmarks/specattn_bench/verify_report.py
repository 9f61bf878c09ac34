"""How the answer about verification is written down and shown. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from specattn_bench.ceilings import Ceilings
from specattn_bench.verify_series import Series
from specattn_bench.verify_standing import Standing

COLUMNS = (
    "case",
    "series",
    "median",
    "20-80 %",
    "GB/s",
    "of read",
    "of floor",
    "of method",
    "over none",
    "x best",
    "x plain",
)
LEGEND = (
    "of read: bytes of K and V a second, of the read ceiling. of floor: the longer of bytes at the read ceiling and",
    "operations at the multiply ceiling, over the median. of method: the same with what this way to scores adds.",
    "over none: beside ours without scores. x best, x plain: times as fast as the fastest torch layout without scores,",
    "and as SDPA over K/V repeated for every head.",
)


def result(series: Series, standing: Standing | None) -> dict[str, object]:
    """One series as a flat JSON object; only what names it and says why where it was not timed."""
    size, chosen = series.case.workload, series.chosen
    named = {
        "dtype": series.case.dtype,
        "batch": size.batch,
        "rows": size.q_len,
        "keys": size.kv_len,
        "series": series.name,
        "kind": series.kind,
        "plan": chosen and chosen.plan.as_dict(),
        "plan_found": chosen and chosen.found,
    }
    if standing is None:
        return {**named, "status": series.refused}
    return {
        **named,
        "status": "timed",
        "median_us": round(standing.timing.median_us, 1),
        "p20_us": round(standing.timing.p20_us, 1),
        "p80_us": round(standing.timing.p80_us, 1),
        "n": standing.timing.n,
        "cache_gbs": round(standing.cache_gbs, 2),
        "gflops": round(standing.gflops, 2),
        "least_bytes": standing.work.memory_bytes,
        "least_operations": standing.work.operations,
        "floor_us": round(standing.floor.microseconds, 1),
        "floor_is": standing.floor.bound,
        "share_of_read_ceiling": round(standing.share_of_read, 4),
        "share_of_floor": round(standing.share_of_floor, 4),
        "share_of_method_floor": _rounded(standing.method_share),
        "overhead_over_none": _rounded(standing.over_none),
        "times_best_peer": round(standing.to_best, 3),
        "times_plain_peer": round(standing.to_plain, 3),
        "times_scored_peer": _rounded(standing.to_scored),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def show(
    series: Sequence[Series], standings: Sequence[Standing], ceilings: Ceilings, title: str, screen: Console
) -> None:
    by_series = {standing.series: standing for standing in standings}
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for column in COLUMNS:
        is_text = column in ("case", "series")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for above, one in zip((None, *series), series, strict=False):
        is_first = above is None or above.case != one.case
        if is_first and above is not None:
            table.add_section()
        case = one.case.name if is_first else ""
        name = one.name if one.kind == "peer" else f"ours, scores {one.name}"
        standing = by_series.get(one)
        table.add_row(case, name, *(("not served",) if standing is None else _cells(standing)))
    screen.print(table)
    for reason in dict.fromkeys(f"{one.case.dtype}, scores {one.name}: {one.refused}" for one in series if one.refused):
        screen.print(reason, markup=False, soft_wrap=True)
    rates = ", ".join(f"{dtype} {rate * 1e3:.0f} GFLOP/s" for dtype, rate in ceilings.tflops.items())
    screen.print(f"ceilings of this run: read {ceilings.bandwidth_gbs:.1f} GB/s; multiply {rates}", soft_wrap=True)
    for line in LEGEND:
        screen.print(line, markup=False, soft_wrap=True)


def _cells(standing: Standing) -> tuple[str, ...]:
    timing = standing.timing
    return (
        f"{timing.median_us / 1e3:.2f} ms",
        f"{timing.p20_us / 1e3:.2f}-{timing.p80_us / 1e3:.2f}",
        f"{standing.cache_gbs:.1f}",
        f"{standing.share_of_read:.0%}",
        f"{standing.share_of_floor:.0%}",
        "" if standing.method_share is None else f"{standing.method_share:.0%}",
        "" if standing.over_none is None else f"{standing.over_none:+.1%}",
        f"{standing.to_best:.2f}",
        f"{standing.to_plain:.2f}",
    )
