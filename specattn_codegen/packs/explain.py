"""Why a call got its plan: the entries nearest to it and in what they differ from what was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from specattn_codegen import buckets
from specattn_codegen.digest import to_plain
from specattn_codegen.environment import silicon
from specattn_codegen.packs.ladder import Candidate, Ladder, tuned_as
from specattn_codegen.packs.pack import structure
from specattn_codegen.spec import KernelSpec, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """An entry and why it is not the call's own. octaves: of processor and sizes together; differences: a line each."""

    candidate: Candidate
    octaves: float
    differences: tuple[str, ...]


def neighbours(ladder: Ladder, spec: KernelSpec, workload: Workload, *, count: int = 5) -> list[Neighbour]:
    """The nearest entries, those of the same kernel first."""
    kernel = structure(tuned_as(spec))
    found = [
        (
            len(structural := [*_differences(to_plain(structure(one.entry.spec)), to_plain(kernel))]),
            Neighbour(
                candidate=one,
                octaves=one.apart + buckets.distance(kernel.op, one.entry.workload, workload),
                differences=(*structural, *_other_sizes(one, workload), *_other_processor(one, ladder)),
            ),
        )
        for one in ladder.candidates
        if one.entry.spec.op == kernel.op
    ]
    return [near for _, near in sorted(found, key=lambda pair: (pair[0], pair[1].octaves))[:count]]


def _differences(theirs: object, asked: object, name: str = "") -> Iterator[str]:
    """Fields in which two plain values differ; a whole object against none is one difference."""
    if isinstance(theirs, dict) and isinstance(asked, dict):
        for field in asked:
            yield from _differences(theirs[field], asked[field], f"{name}.{field}" if name else field)
    elif theirs != asked:
        yield f"{name}: {_shown(theirs)} there, {_shown(asked)} asked"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(str(item) for item in value.values())
    return "none" if value is None else str(value)


def _other_sizes(candidate: Candidate, workload: Workload) -> Iterator[str]:
    op = candidate.entry.spec.op
    pairs = zip(
        buckets.SIZES[op],
        buckets.sizes(op, candidate.entry.workload),
        buckets.sizes(op, workload),
        strict=True,
    )
    for name, theirs, asked in pairs:
        if buckets.bucket(theirs) != buckets.bucket(asked):
            yield f"{name}: {theirs} there, {asked} asked"


def _other_processor(candidate: Candidate, ladder: Ladder) -> Iterator[str]:
    if candidate.apart:
        theirs = dataclasses.replace(candidate.silicon, name="")
        yield from _differences(to_plain(theirs), to_plain(dataclasses.replace(silicon(ladder.arch), name="")))
    if candidate.why_unusable is not None:
        yield f"not usable: {candidate.why_unusable}"
