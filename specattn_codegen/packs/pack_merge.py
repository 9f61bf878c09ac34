"""Packs of one processor and HeadConfig made into one, the best entry of each place; what changed between two."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from specattn_codegen.digest import canonical_json
from specattn_codegen.errors import PackError
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry, Pack
from specattn_codegen.processors.silicon import same


def better(known: Entry, other: Entry) -> Entry:
    """Measured goes before modelled. Of two that were timed alike the other has to be faster by more than both their
    noises; of two that were not, or modelled, it is taken, as their times do not compare."""
    if known.chosen_by != other.chosen_by:
        return known if known.chosen_by == "measured" else other
    timed_alike = known.chosen_by == "measured" and known.policy == other.policy
    if timed_alike and other.latency_us + other.noise_us >= known.latency_us - known.noise_us:
        return known
    return other


def merge_best(first: Iterable[Entry], second: Iterable[Entry]) -> tuple[Entry, ...]:
    """One entry a kernel and size bucket."""
    merged = {pack.place(entry): entry for entry in first}
    for entry in second:
        known = merged.get(pack.place(entry))
        merged[pack.place(entry)] = entry if known is None else better(known, entry)
    return pack.in_order(merged.values())


def merge_packs(packs: Sequence[Pack]) -> Pack:
    """All of them in one, the first's fields before the others'. Raises PackError where they are not for one thing."""
    first, *others = packs
    for other in others:
        if other.heads != first.heads or not same(other.arch, first.arch):
            raise PackError(
                f"{first.arch.name}/{first.heads.name} and {other.arch.name}/{other.heads.name} are for different "
                "processors or heads; merge packs of one, and keep the others in files of their own"
            )
        licences = first.licence if other.licence == first.licence else f"{first.licence} AND {other.licence}"
        unknown = {**json.loads(other.unknown or "{}"), **json.loads(first.unknown or "{}")}
        first = replace(
            first,
            entries=merge_best(first.entries, other.entries),
            licence=licences,
            unknown=canonical_json(unknown) if unknown else "",
        )
    return first


def add_to(root: Path, added: Pack) -> tuple[Path, int]:
    """Merges a pack into the one of a layer. Returns its path and how many entries are new or changed.

    Raises PackError where the layer's pack is damaged or another processor's, and OSError.
    """
    path = root / added.arch.name / f"{added.heads.name}.json"
    with pack.locked(path):
        known = pack.load(path) if path.exists() else None
        merged = merge_packs([known, added]) if known else added
        pack.write(path, merged)
    before = set(known.entries) if known else set()
    return path, len(set(merged.entries) - before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A place that two packs fill differently; before or after is None where one of them leaves it empty."""

    before: Entry | None
    after: Entry | None

    @property
    def entry(self) -> Entry:
        entry = self.after or self.before
        assert entry is not None
        return entry


def changes(before: Pack, after: Pack) -> list[Change]:
    """In the order of entries; equal entries are left out."""
    olds = {pack.place(entry): entry for entry in before.entries}
    news = {pack.place(entry): entry for entry in after.entries}
    found = [
        Change(before=olds.get(place), after=news.get(place))
        for place in {**olds, **news}
        if olds.get(place) != news.get(place)
    ]
    order = {entry: index for index, entry in enumerate(pack.in_order(change.entry for change in found))}
    return sorted(found, key=lambda change: order[change.entry])
