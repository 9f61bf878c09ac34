"""specattn-pack show, diff and verify: what is in a pack, what changes from one to another, which files are sound."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from specattn_codegen.cli.options import PACKS
from specattn_codegen.cli.pack import tables
from specattn_codegen.cli.pack.grading import examine, grades
from specattn_codegen.cli.pack.places import find, named_files, places
from specattn_codegen.cli.progress import console, say
from specattn_codegen.errors import SpecError
from specattn_codegen.packs import pack, pack_file, pack_merge
from specattn_codegen.packs.staleness import MEANING

DIFFERENT = 1  # exit code of a diff that finds something, as of diff(1)


@click.command()
@click.argument("what")
@PACKS
def show(what: str, packs: tuple[Path, ...]) -> None:
    """What a pack holds: manifest, entries, and what of them still holds today."""
    place = find(what, packs)
    found = pack.load(place.path)
    say(f"{place.path} ({place.layer})")
    for line in tables.manifest_lines(found, pack.stored_digest(place.path)):
        say(line)
    today = grades(found)
    console().print(tables.entry_table(zip(found.entries, today, strict=True)))
    for each in dict.fromkeys(today):
        say(f"{each}: {MEANING[each]}")


@click.command()
@click.argument("before")
@click.argument("after")
def diff(before: str, after: str) -> None:
    """What changes from one pack to another. Exit code 1 where something does, as of diff."""
    old, new = (pack.load(find(what).path) for what in (before, after))
    if old.arch != new.arch or old.heads != new.heads:
        say(f"not of one thing: {old.arch.name}/{old.heads.name} and {new.arch.name}/{new.heads.name}")
    found = pack_merge.changes(old, new)
    if not found:
        say(f"equal: {len(new.entries)} entries")
        return
    console().print(tables.change_table(found))
    say(f"{len(found)} of {max(len(old.entries), len(new.entries))} entries differ")
    sys.exit(DIFFERENT)


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--fresh", is_flag=True, help="Also refuse packs with stale entries.")
def verify(files: tuple[Path, ...], fresh: bool) -> None:
    """Check files or folders of packs; all layers where none is named.

    Exit code 2, with a line for each file that is damaged, edited by hand, of a later version, or holds plans that
    today's space refuses.
    """
    checked = named_files(files) if files else [place.path for place in places(())]
    bad = 0
    for path in checked:
        problem, summary = examine(path, fresh)
        summary = pack_file.printable(summary)
        bad += problem
        click.echo(f"{'error: ' if problem else 'ok: '}{summary}", err=problem)
    if not checked:
        raise SpecError("nothing to verify; name a file or a folder, or make a pack with specattn-tune")
    if bad:
        sys.exit(2)
