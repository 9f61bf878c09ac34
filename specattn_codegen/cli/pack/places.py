"""Where packs are: the files of every layer, by path or by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from specattn_codegen import paths
from specattn_codegen.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A pack's file and the layer it is in."""

    layer: str
    path: Path


def files_of(folder: Path) -> list[Path]:
    """The packs of a layer; the layer itself where it is one."""
    return sorted(folder.glob("*/*.json")) if folder.is_dir() else [folder] if folder.exists() else []


def named_files(given: Iterable[Path]) -> list[Path]:
    """Files as they are named, and every one in the folders that are."""
    return [path for one in given for path in (sorted(one.rglob("*.json")) if one.is_dir() else [one])]


def places(packs: Iterable[Path]) -> list[Place]:
    return [Place(layer=layer, path=path) for layer, folder in paths.named_layers(*packs) for path in files_of(folder)]


def find(what: str, packs: Iterable[Path] = ()) -> Place:
    """The file of that path, or the first layer's pack of that name. Raises SpecError where there is none."""
    if Path(what).is_file():
        return Place(layer="file", path=Path(what))
    wanted = what.removesuffix(".json")
    known: dict[str, Place] = {}
    for place in places(packs):
        known.setdefault(f"{place.path.parent.name}/{place.path.stem}", place)
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, cutoff=0.7)
    hint = f"did you mean {', '.join(near)}?" if near else f"`specattn-pack list` shows all {len(known)}"
    raise SpecError(f"{what}: no such file and no pack of that name; {hint}")
