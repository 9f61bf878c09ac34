"""What would each GPU language take for a model? A pack beside the plans that its search recorded unproved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich import box
from rich.table import Table

from specattn_bench import report
from specattn_codegen.cli.progress import console, microseconds
from specattn_codegen.cli.rivals import find_rivals
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.processors import gpus
from specattn_codegen.tuning import record
from specattn_codegen.tuning.outcome import Status
from specattn_codegen.tuning.record import Record


@click.command(name="languages", short_help="Each language's best plan of a pack's kernels, by the cost model.")
@click.option("--model", default="llama3-8b", show_default=True, help="A registered model.")
@click.option("--gpu", type=click.Choice(gpus.names()), default="h100", show_default=True, help="The processor.")
@click.option("--packs", type=click.Path(path_type=Path), required=True, help="Folder of the pack.")
@click.option("--save", is_flag=True, help="Keep the answer in benchmarks/results/cross-compiled.")
def command(model: str, gpu: str, packs: Path, save: bool) -> None:
    """Reads what `specattn-tune --model MODEL --gpu GPU --backend all --out PACKS` left there and in its records."""
    arch, heads = gpus.find(gpu), HeadConfig.from_model(model)
    entries = pack.load(pack.pack_path(packs, arch, heads)).entries
    trials = compiled(record.read(record.records_path(arch, heads)))
    rows = compared(entries, trials)
    if not any(row["rivals"] for row in rows):
        raise SpecError(f"{packs}: no other language's plans are recorded for {gpu}; tune with --backend all first")
    console().print(table(rows))
    if save:
        answer = {
            "question": "languages",
            "label": "modelled",
            "model": model,
            "gpu": gpu,
            "compilers": sorted({trial.environment.compiler for trial in trials}),
            "entries": rows,
        }
        report.write_json(report.kept_path("cross-compiled", f"languages-{model}-{gpu}"), answer)


def compiled(records: Sequence[Record]) -> list[Record]:
    """The latest trial of each plan that was compiled for an absent GPU."""
    latest = {(one.spec, one.plan): one for one in records if one.stage == "compile"}
    return [one for one in latest.values() if one.outcome.status is Status.OK]


def compared(entries: Sequence[Entry], trials: Sequence[Record]) -> list[dict[str, object]]:
    """By entry, the plan that the pack has and the best of each language that it has none of; in microseconds."""
    rivals = find_rivals(entries, trials)
    return [
        {
            "kernel": entry.spec.name,
            "workload": entry.workload.name,
            "backend": entry.plan.backend,
            "plan": entry.plan.as_dict(),
            "predicted_us": round(entry.latency_us, 2),
            "chosen_by": entry.chosen_by,
            "proved_by": entry.proved_by,
            "rivals": [
                {
                    "backend": rival.plan.backend,
                    "plan": rival.plan.as_dict(),
                    "predicted_us": round(rival.latency_us, 2),
                    "proved_by": "none",
                }
                for rival in rivals
                if rival.entry is entry
            ],
        }
        for entry in entries
    ]


def table(rows: Sequence[dict[str, object]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, title="modelled; a pack takes what is proved")
    for name in ("kernel", "workload", "in the pack", "time", "proved by", "unproved", "time", "ratio"):
        shown.add_column(name, justify="right" if name in ("time", "ratio") else "left", no_wrap=name == "workload")
    for row in rows:
        rivals, taken = row["rivals"], row["predicted_us"]
        assert isinstance(rivals, list)
        assert isinstance(taken, float)
        for rival in rivals:
            shown.add_row(
                *(str(row[name]) for name in ("kernel", "workload", "backend")),
                microseconds(taken),
                str(row["proved_by"]),
                rival["backend"],
                microseconds(rival["predicted_us"]),
                f"{taken / rival['predicted_us']:.2f}",
            )
    return shown
