"""specattn-pack list: every pack that lookups see, those of one layer and processor as one line where they are many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click

from specattn_codegen import paths
from specattn_codegen.cli.options import PACKS
from specattn_codegen.cli.pack import tables
from specattn_codegen.cli.pack.grading import graded
from specattn_codegen.cli.pack.places import Place, places
from specattn_codegen.cli.progress import console, say
from specattn_codegen.errors import PackError, SpecError
from specattn_codegen.packs import pack, pack_file

FEW = 8  # packs of one processor that a list spells out

Row = dict[str, object]


@click.command("list")
@click.argument("processor", required=False)
@PACKS
@click.option("--json", "as_json", is_flag=True, help="One JSON value, with every pack, instead of a table.")
@click.option("--today", is_flag=True, help="Also how much of each still holds, for which every kernel is rendered.")
def list_packs(processor: str | None, packs: tuple[Path, ...], as_json: bool, today: bool) -> None:
    """Every pack that lookups see, or those of one PROCESSOR, the first layer first.

    Where a layer has many packs of one processor they are one line; name the processor to see them all.
    """
    known = places(packs)
    listed = [place for place in known if processor in (None, place.path.parent.name)]
    if processor is not None and not listed:
        have = ", ".join(sorted({place.path.parent.name for place in known}))
        raise SpecError(f"{processor}: no layer has packs for it; there are some for {have or 'none'}")
    rows = [_row(place, today=today) for place in listed]
    if as_json:
        click.echo(json.dumps([_worded(row) for row in rows], indent=2, sort_keys=True))
        return
    columns = ("layer", "pack", "entries", "kernels", "label", *(("today",) if today else ()), "file")
    shown = tables.table(*columns, folds=("label", "today", "file"))
    for row in map(_worded, rows if processor else _folded(rows)):
        shown.add_row(*(str(row[name]) for name in columns))
    console().print(shown)
    have = {row["layer"] for row in rows}
    for layer, folder in paths.named_layers(*packs):
        if layer not in have:
            say(f"{layer}: none in {folder}")
    say("next: specattn-pack list PROCESSOR, specattn-pack show PACK, or specattn-tune --help to make one")


def _row(place: Place, *, today: bool) -> Row:
    """label and today are counts, or a text where nothing can be counted."""
    row: Row = {
        "layer": place.layer,
        "pack": pack_file.printable(f"{place.path.parent.name}/{place.path.stem}"),
        "file": pack_file.printable(place.path),
    }
    try:
        found = pack.load(place.path)
    except (PackError, OSError) as error:
        return row | {"entries": 0, "kernels": 0, "today": "", "label": f"unreadable: {pack_file.one_line(error)}"}
    return row | {
        "today": graded(found) if today else "",
        "entries": len(found.entries),
        "kernels": len(found.coverage),
        "label": found.provenance["chosen_by"],
    }


def _worded(row: Row) -> Row:
    return {name: tables.counted(value) if isinstance(value, dict) else value for name, value in row.items()}


def _folded(rows: Iterable[Row]) -> Iterable[Row]:
    """Readable packs of one layer and processor as one row where there are many."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        alone = row["file"] if isinstance(row["label"], str) else ""
        groups.setdefault((row["layer"], Path(str(row["file"])).parent, alone), []).append(row)
    for (layer, folder, _), group in groups.items():
        if len(group) <= FEW:
            yield from group
        else:
            summed = {name: _sum(row[name] for row in group) for name in ("entries", "kernels", "label", "today")}
            yield {
                "layer": layer,
                "pack": f"{Path(str(folder)).name}: {len(group)} packs",
                "file": str(folder),
                **summed,
            }


def _sum(values: Iterable[object]) -> object:
    """Of numbers, or of counts."""
    counts, number = Counter[str](), 0
    for value in values:
        if isinstance(value, dict):
            counts.update(value)
        elif isinstance(value, int):
            number += value
    return dict(counts) or number or ""
