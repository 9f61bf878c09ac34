"""How the answer about verification is written down and shown. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from specattn_bench import ceilings
from specattn_bench.ceilings import Ceilings
from specattn_bench.plans import Chosen
from specattn_bench.verify_modelled import Modelled
from specattn_bench.verify_series import Asked, Case, Series
from specattn_bench.verify_standing import Standing
from specattn_codegen.cli.progress import microseconds
from specattn_codegen.cost_model import Prediction
from specattn_codegen.digest import to_plain

TEXT_COLUMNS = ("series", "case", "plan", "binds", "label")
COLUMNS = ("series", "median", "20-80 %", "GB/s", "of read", "of floor", "of method", "over none", "x best", "x plain")
LEGEND = (
    "of read: bytes of K and V a second, of the read ceiling. of floor: the longer of bytes at the read ceiling and",
    "operations at the multiply ceiling, over the median. of method: the same with what this way to scores adds.",
    "over none: beside ours without scores. x best, x plain: times as fast as the fastest torch layout without scores,",
    "and as SDPA over K/V repeated for every head.",
)
MODELLED_COLUMNS = ("case", "plan", "time", "of floor", "bytes", "occupancy", "in flight", "binds", "label")
MODELLED_LEGEND = (
    "modelled: compiled for the GPU, which is not here, and predicted by the cost model; nothing was timed.",
    "plan: how it was found. of floor: the longer of bytes and operations at the data sheet's rates, over the time.",
    "bytes: moved, over the least. occupancy: of the launch that reads the cache. in flight: the bytes it",
    "asks for at once, over latency x bandwidth, which by Little's law keep the memory busy from 1 on. binds: the",
    "longest launch and its limit.",
)


def settings(asked: Asked) -> dict[str, object]:
    """What was asked, for the JSON's head."""
    return {
        "heads": asked.heads.name,
        "page_size": asked.page_size,
        "plans": asked.plan_source,
        "overrides": dict(asked.overrides),
    }


def _named(case: Case, chosen: Chosen | None) -> dict[str, object]:
    size = case.workload
    return {
        "dtype": case.dtype,
        "batch": size.batch,
        "rows": size.q_len,
        "keys": size.kv_len,
        "plan": chosen and chosen.plan.as_dict(),
        "plan_found": chosen and chosen.found,
    }


def result(series: Series, standing: Standing | None) -> dict[str, object]:
    """One series as a flat JSON object; only what names it and says why where it was not timed."""
    named = {"series": series.name, "kind": series.kind, **_named(series.case, series.chosen)}
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
        "share_of_read_ceiling": _rounded(standing.share_of_read),
        "share_of_floor": _rounded(standing.share_of_floor),
        "share_of_method_floor": _rounded(standing.method_share),
        "overhead_over_none": _rounded(standing.over_none),
        "times_best_peer": _rounded(standing.to_best),
        "times_plain_peer": _rounded(standing.to_plain),
        "times_scored_peer": _rounded(standing.to_scored),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def modelled_result(modelled: Modelled) -> dict[str, object]:
    """One prediction as a flat JSON object."""
    named = {
        "label": "modelled",
        "gpu": modelled.arch.name,
        "scores": modelled.scores,
        **_named(modelled.case, modelled.chosen),
    }
    prediction = modelled.prediction
    if prediction is None:
        return {**named, "status": modelled.refused}
    return {
        **named,
        "status": "modelled",
        "predicted_us": round(prediction.latency_us, 2),
        "share_of_floor": _rounded(prediction.share_of_ceiling),
        "bytes_moved": prediction.bytes_moved,
        "bytes_least": prediction.bytes_least,
        "residency": to_plain(prediction.residency),
        "terms": to_plain(prediction.terms),
        "binds": prediction.bound,
    }


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right", no_wrap=True)
    return table


def show(
    series: Sequence[Series],
    standings: Sequence[Standing],
    measured: tuple[Ceilings, Ceilings],
    title: str,
    screen: Console,
) -> None:
    """measured: the ceilings before and after the run."""
    by_series = {standing.series: standing for standing in standings}
    table = _table(title, COLUMNS)
    for case in dict.fromkeys(one.case for one in series):
        table.add_row(case.name, style="bold")
        for one in (one for one in series if one.case == case):
            standing = by_series.get(one)
            cells = ("not served",) if standing is None else _cells(standing)
            table.add_row(f"  {one.label}", *cells)
        table.add_section()
    screen.print(table)
    for reason in dict.fromkeys(f"{one.case.dtype}, {one.label}: {one.refused}" for one in series if one.refused):
        screen.print(reason, markup=False, soft_wrap=True)
    for line in (_ceilings_line(*measured), *LEGEND):
        screen.print(line, markup=False, soft_wrap=True)


def _ceilings_line(before: Ceilings, after: Ceilings) -> str:
    rates = ceilings.best(before, after).tflops
    multiply = ", ".join(f"{dtype} {rate * 1e3:.0f} GFLOP/s" for dtype, rate in rates.items())
    read = f"{before.bandwidth_gbs:.1f} GB/s before, {after.bandwidth_gbs:.1f} after"
    return f"ceilings of this run, the better counts: read {read}; multiply {multiply}"


def _cells(standing: Standing) -> tuple[str, ...]:
    timing = standing.timing
    scale, unit = (1e3, "ms") if timing.median_us >= 1e3 else (1.0, "us")
    return (
        f"{timing.median_us / scale:.2f} {unit}",
        f"{timing.p20_us / scale:.2f}-{timing.p80_us / scale:.2f}",
        f"{standing.cache_gbs:.1f}",
        f"{standing.share_of_read:.0%}",
        f"{standing.share_of_floor:.0%}",
        "" if standing.method_share is None else f"{standing.method_share:.0%}",
        "" if standing.over_none is None else f"{standing.over_none:+.1%}",
        f"{standing.to_best:.2f}",
        f"{standing.to_plain:.2f}",
    )


def show_modelled(modelled: Sequence[Modelled], title: str, screen: Console) -> None:
    table = _table(title, MODELLED_COLUMNS)
    for group in dict.fromkeys((one.arch.name, one.scores) for one in modelled):
        table.add_row(f"{group[0]}, {'no scores' if group[1] == 'none' else group[1]}", style="bold")
        for one in (one for one in modelled if (one.arch.name, one.scores) == group):
            cells = ("", "not served") if one.prediction is None else _modelled_cells(one, one.prediction)
            table.add_row(f"  {one.case.name}", *cells)
        table.add_section()
    screen.print(table)
    for reason in dict.fromkeys(
        f"{one.arch.name}, scores {one.scores}: {one.refused}" for one in modelled if one.refused
    ):
        screen.print(reason, markup=False, soft_wrap=True)
    for line in MODELLED_LEGEND:
        screen.print(line, markup=False, soft_wrap=True)


def _modelled_cells(modelled: Modelled, prediction: Prediction) -> tuple[str, ...]:
    residency = prediction.residency
    return (
        modelled.chosen.found if modelled.chosen else "",
        microseconds(prediction.latency_us),
        f"{prediction.share_of_ceiling:.0%}",
        f"{prediction.excess_bytes:.2f}x",
        f"{residency.occupancy:.0%}",
        f"{residency.bytes_in_flight / residency.bytes_to_saturate:.2f}x",
        prediction.bound,
        "modelled",
    )
