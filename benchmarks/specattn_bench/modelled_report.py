"""How predictions for GPUs that are not here are shown and written down. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from specattn_bench import report, tables
from specattn_bench.modelled import Modelled, Wanted, model
from specattn_bench.options import Common
from specattn_codegen.cli.progress import microseconds
from specattn_codegen.cost_model import Prediction
from specattn_codegen.digest import to_plain

COLUMNS = ("case", "plan", "time", "of floor", "bytes", "occupancy", "in flight", "binds", "label")
LEGEND = (
    "modelled: compiled for the GPU, which is not here, and predicted by the cost model; nothing was timed.",
    "plan: how it was found. of floor: the longer of bytes and operations at the data sheet's rates, over the time.",
    "bytes: moved, over the least. occupancy: of the launch that reads the cache or the scores. in flight: the bytes",
    "it asks for at once, over latency x bandwidth, which by Little's law keep the memory busy from 1 on. binds: the",
    "longest launch and its limit.",
)


def answer(question: str, common: Common, wanted: Sequence[Wanted], title: str, settings: Mapping[str, object]) -> None:
    """Predicts every kernel on every GPU, prints the answer and writes it."""
    if common.json_path is not None:
        report.require_writable(common.json_path, "--json")
    found = model(wanted, common.gpus, common.plans)
    show(found, f"modelled: {common.heads.name}, {title}; no GPU was timed", report.screen())
    if common.json_path is not None:
        results = [result(one) for one in found]
        report.write_json(common.json_path, {"question": question, "label": "modelled", **settings, "results": results})


def result(modelled: Modelled) -> dict[str, object]:
    """One prediction as a flat JSON object."""
    wanted, size = modelled.wanted, modelled.wanted.workload
    named = {
        "label": "modelled",
        "gpu": modelled.arch.name,
        "series": wanted.series,
        "case": wanted.case,
        "dtype": wanted.spec.dtype,
        "batch": size.batch,
        "rows": size.q_len,
        "keys": size.kv_len,
        "budget": size.budget,
        **tables.plan_facts(modelled.chosen),
    }
    prediction = modelled.prediction
    if prediction is None:
        return {**named, "status": modelled.refused}
    return {
        **named,
        "status": "modelled",
        "predicted_us": round(prediction.latency_us, 2),
        "share_of_floor": tables.rounded(prediction.share_of_ceiling),
        "bytes_moved": prediction.bytes_moved,
        "bytes_least": prediction.bytes_least,
        "residency": to_plain(prediction.residency),
        "terms": to_plain(prediction.terms),
        "binds": prediction.bound,
    }


def show(modelled: Sequence[Modelled], title: str, screen: Console) -> None:
    table = tables.table(title, COLUMNS)
    for group in dict.fromkeys((one.arch.name, one.wanted.series) for one in modelled):
        table.add_row(", ".join(group), style="bold")
        for one in (one for one in modelled if (one.arch.name, one.wanted.series) == group):
            cells = ("", "not served") if one.prediction is None else _cells(one, one.prediction)
            table.add_row(f"  {one.wanted.case}", *cells)
        table.add_section()
    screen.print(table)
    reasons = [f"{one.arch.name}, {one.wanted.series}: {one.refused}" for one in modelled if one.refused]
    tables.print_lines(screen, [*dict.fromkeys(reasons), *LEGEND])


def _cells(modelled: Modelled, prediction: Prediction) -> tuple[str, ...]:
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
