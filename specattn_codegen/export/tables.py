"""What is exported: for each kernel of a model the sizes it is tuned at, and the ladder's plan at each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from specattn_codegen import buckets, space
from specattn_codegen.errors import SpecError
from specattn_codegen.packs.ladder import Found, Ladder, tuned_as
from specattn_codegen.packs.pack import structure
from specattn_codegen.render import Source, render
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.workloads import default_workloads

TARGET = "triton"  # its text serves every GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tuned size: where its plan comes from, and its kernel's text."""

    workload: Workload
    found: Found
    source: Source

    @property
    def kernel(self) -> str:
        """Of the module that holds the text."""
        return f"{self.source.spec.op}_{self.source.digest[:10]}"

    @property
    def note(self) -> str:
        """As in `exact: modelled, proved by interpreter`."""
        candidate = self.found.candidate
        if candidate is None:
            return self.found.rung
        entry = candidate.entry
        whose = "" if entry.spec.op == self.source.spec.op else f" as {entry.spec.op}"
        return f"{self.found.rung}: {entry.chosen_by}, proved by {entry.proved_by}{whose}"

    @property
    def is_as_tuned(self) -> bool:
        """Whether it is an entry's own kernel at the entry's own sizes, which its time is of."""
        candidate = self.found.candidate
        return self.found.rung == "exact" and candidate is not None and candidate.entry.spec.op == self.source.spec.op


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A kernel's decision table; no two rows share a size bucket."""

    spec: KernelSpec
    rows: tuple[Row, ...]

    @property
    def sizes(self) -> tuple[str, ...]:
        return buckets.SIZES[self.spec.op]


def table(spec: KernelSpec, ladder: Ladder) -> Table:
    """The sizes of the packs' entries for this very processor, or the default ones where they have none."""
    kernel = structure(tuned_as(spec))
    tuned = [
        one.entry.workload
        for one in ladder.candidates
        if not one.apart and one.why_unusable is None and structure(one.entry.spec) == kernel
    ]
    rows: dict[tuple[int, ...], Row] = {}
    for workload in tuned or default_workloads(tuned_as(spec), ladder.arch):
        place = buckets.buckets(spec.op, workload)
        if place not in rows:
            found = ladder.find(spec, workload)
            mixes = spec.op == "mixed_attention"
            plan = space.for_mixed(found.plan, spec, ladder.arch) if mixes else found.plan
            rows[place] = Row(workload=workload, found=found, source=render(spec, plan, TARGET))
    return Table(spec=spec, rows=tuple(rows.values()))


def tables(specs: Sequence[KernelSpec], ladder: Ladder) -> tuple[Table, ...]:
    """Raises SpecError for a processor whose kernels are not Triton's."""
    if "triton" not in space.backends_for(ladder.arch):
        raise SpecError(f"{ladder.arch.name}: only Triton kernels are exported; name a GPU, as in --gpu h100")
    own = tuple(one for one in ladder.candidates if one.entry.plan.backend == TARGET)
    return tuple(table(spec, dataclasses.replace(ladder, candidates=own)) for spec in specs)
