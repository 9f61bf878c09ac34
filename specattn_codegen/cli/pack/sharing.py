"""specattn-pack merge, install and promote: packs go from one folder into another, the better entries of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from specattn_codegen import paths
from specattn_codegen.cli.pack import tables
from specattn_codegen.cli.pack.grading import examine, grades
from specattn_codegen.cli.pack.places import find, named_files
from specattn_codegen.cli.progress import say
from specattn_codegen.errors import PackError
from specattn_codegen.packs import pack, pack_merge
from specattn_codegen.packs.pack import Pack


@click.command()
@click.argument("what", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The pack to write.")
def merge(what: tuple[str, ...], out: Path) -> None:
    """The best of several packs of one processor and HeadConfig.

    Measured entries go before modelled ones. Of two that were timed alike the faster by more than noise, else the one
    named first; of two that were not, or modelled, the one named last.
    """
    merged = pack_merge.merge_packs([pack.load(find(one).path) for one in what])
    with pack.locked(out):
        pack.write(out, merged)
    say(f"{out}: {len(merged.entries)} entries, {tables.counted(merged.provenance['chosen_by'])}")
    say(f"next: specattn-pack install {out}")


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), metavar="DIR", help="Folder of packs. [the user's own]")
def install(files: tuple[Path, ...], to: Path | None) -> None:
    """Put packs from elsewhere into your own layer, after the checks of verify. Better entries there stay."""
    for path in named_files(files):
        refuse, line = examine(path, fresh=False)
        if refuse:
            raise PackError(line)
        _add(to or paths.user_packs_dir(), pack.load(path))


def _add(root: Path, added: Pack) -> None:
    path, changed = pack_merge.add_to(root, added)
    say(f"{path}: {changed} of {len(added.entries)} entries are new or better")


@click.command()
@click.argument("what")
@click.option("--to", required=True, metavar="site|DIR", help="The machine's layer, or a folder of packs.")
@click.option("--measured", is_flag=True, help="Only entries that were measured.")
def promote(what: str, to: str, measured: bool) -> None:
    """Merge what still holds of a pack into a wider layer: the machine's, or a folder that ships.

    Only entries graded exact or compatible go; what is stale is tuned again first.
    """
    found = pack.load(find(what).path)
    kept = tuple(
        entry
        for entry, today in zip(found.entries, grades(found), strict=True)
        if today in ("exact", "compatible") and (not measured or entry.chosen_by == "measured")
    )
    if not kept:
        wanted = "measured and holds today" if measured else "holds today"
        raise PackError(
            f"{what}: none of its {len(found.entries)} entries {wanted}; see `specattn-pack show {what}` and tune again"
        )
    _add(paths.site_packs_dir() if to == "site" else Path(to), replace(found, entries=kept))
    if len(kept) < len(found.entries):
        say(f"left behind: {len(found.entries) - len(kept)} entries")
