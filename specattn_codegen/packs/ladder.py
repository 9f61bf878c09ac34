"""Ladder: which plan serves a call, and on which rung it was found. Pure and deterministic once its packs are read.

exact    an entry of this processor for the call's own size bucket, of the first layer that has one
nearest  an entry of this processor for other sizes, at most buckets.FARTHEST octaves away
sibling  an entry of another processor of the same instruction set, its size and the sizes together no farther away
model    the cost model's choice among the plans that entries of this kernel prove, whatever their sizes; GPUs only
default  the safe default plan, which the test suite proves for every operation

A plan of any rung is one that today's space accepts for this very processor, and none is served unproved: a proof is
of a kernel, whatever the sizes of the entry it stands in, so the model may choose among proved plans for a size that
nobody tuned, but never one of its own. Proving at first use instead would make the choice depend on what else a device
is doing at that moment, and ranks of a cluster would not agree.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from specattn_codegen import buckets, space
from specattn_codegen.digest import digest
from specattn_codegen.environment import Silicon, own_version, silicon
from specattn_codegen.errors import PackError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack, pack_file
from specattn_codegen.packs.pack import Entry, structure
from specattn_codegen.packs.staleness import why_unusable
from specattn_codegen.plan import Plan
from specattn_codegen.processors import gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.processors.silicon import are_siblings, distance, same
from specattn_codegen.render import templates_digest
from specattn_codegen.spec import KernelSpec, Workload

Rung = Literal["exact", "nearest", "sibling", "model", "default"]

logger = logging.getLogger("specattn")


def tuned_as(spec: KernelSpec) -> KernelSpec:
    """A mixed batch takes the plan of its verifying requests, which read nearly all of its bytes."""
    return dataclasses.replace(spec, op="verify_attention", selection=None) if spec.op == "mixed_attention" else spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An entry of some layer. apart: octaves between its processor and the one at hand, 0 where they are one."""

    entry: Entry
    path: Path
    silicon: Silicon
    apart: float
    why_unusable: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan and its rung. candidate: what it was taken from, or what proves it; None on the last rung."""

    plan: Plan
    rung: Rung
    candidate: Candidate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The packs of one HeadConfig that may serve one processor, read once: lookups touch no disk."""

    arch: Arch
    heads: HeadConfig
    candidates: tuple[Candidate, ...]
    _by_kernel: dict[KernelSpec, list[Candidate]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _exact: dict[tuple[KernelSpec, tuple[int, ...]], Found] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for candidate in self.candidates:
            if candidate.why_unusable is None:
                entry = candidate.entry
                kernel = structure(entry.spec)
                self._by_kernel.setdefault(kernel, []).append(candidate)
                if not candidate.apart:
                    found = Found(plan=entry.plan, rung="exact", candidate=candidate)
                    self._exact.setdefault((kernel, buckets.buckets(entry.spec.op, entry.workload)), found)

    def find(self, spec: KernelSpec, workload: Workload) -> Found:
        """The highest rung that holds. Raises SpecError for a kernel no plan can be made for."""
        return self.tuned(spec, workload) or self._modelled(spec, workload) or self._default(spec)

    def tuned(self, spec: KernelSpec, workload: Workload) -> Found | None:
        """The best of the packs, None where they have nothing within reach."""
        kernel = structure(tuned_as(spec))
        return (
            self._exact.get((kernel, buckets.buckets(kernel.op, workload)))
            or self._nearest(kernel, workload, "nearest")
            or self._nearest(kernel, workload, "sibling")
        )

    def _nearest(self, kernel: KernelSpec, workload: Workload, rung: Rung) -> Found | None:
        """Equals go to the earlier layer."""

        def octaves(candidate: Candidate) -> float:
            return candidate.apart + buckets.distance(kernel.op, candidate.entry.workload, workload)

        kin = [one for one in self._by_kernel.get(kernel, ()) if bool(one.apart) == (rung == "sibling")]
        near = [candidate for candidate in kin if octaves(candidate) <= buckets.FARTHEST]
        if not near:
            return None
        nearest = min(near, key=octaves)
        return Found(plan=nearest.entry.plan, rung=rung, candidate=nearest)

    def _modelled(self, spec: KernelSpec, workload: Workload) -> Found | None:
        """Of entries that prove one plan the earlier layer's is named."""
        kernel = structure(tuned_as(spec))
        proofs = {one.entry.plan: one for one in reversed(self._by_kernel.get(kernel, ()))}
        if not self.arch.is_gpu or not proofs:
            return None
        # Imported here, as hardly any process comes this far and all would wait for it.
        choice = importlib.import_module("specattn_codegen.cost_model.choice")
        plan = choice.best_proved(kernel, workload, self.arch, proofs)
        return None if plan is None else Found(plan=plan, rung="model", candidate=proofs[plan])

    def _default(self, spec: KernelSpec) -> Found:
        plan = space.default_plan(spec, self.arch, space.backends_for(self.arch)[0])
        return Found(plan=plan, rung="default")

    @property
    def digest(self) -> str:
        """Equal for processes in which every call gets the same plan and the same kernel text, whatever the provenance
        of their packs: ranks that must not diverge compare it before they start. Versions of this project differ, as
        their cost models may."""
        facts = dataclasses.replace(self.arch, name="", source="") if self.arch.is_gpu else silicon(self.arch)
        usable = [
            (one.entry.spec, one.entry.workload, one.entry.plan, one.apart)
            for one in self.candidates
            if one.why_unusable is None
        ]
        return digest(facts, self.heads, usable, templates_digest(), own_version())


def read(arch: Arch, heads: HeadConfig, layers: Sequence[Path]) -> Ladder:
    """Reads every pack of these heads that may serve this processor. A layer is a folder of packs, or one pack.

    Never raises: a pack that is damaged, hostile or of a later schema is a miss with one warning.
    """
    candidates = [
        candidate
        for layer in layers
        for path in _files(layer, arch, heads)
        for candidate in _candidates(path, arch, heads)
    ]
    return Ladder(arch=arch, heads=heads, candidates=tuple(candidates))


@functools.cache
def read_once(arch: Arch, heads: HeadConfig, layers: tuple[Path, ...]) -> Ladder:
    """As `read`, but a process that has read them does not read them again, whatever becomes of the files."""
    return read(arch, heads, layers)


def lookup(spec: KernelSpec, workload: Workload, arch: Arch, layers: Sequence[Path]) -> Found | None:
    """What packs have for one call; None means that the caller takes its safe default."""
    return read(arch, spec.heads, layers).tuned(spec, workload)


def _files(layer: Path, arch: Arch, heads: HeadConfig) -> list[Path]:
    """The processor's own pack before its siblings'. Packs of processors known not to be siblings are not opened."""
    own = pack.pack_path(layer, arch, heads)
    try:
        if layer.is_file():
            return [layer]
        others = [path for path in sorted(layer.glob(f"*/{heads.name}.json")) if path != own]
    except OSError as error:
        _warn_once(pack_file.one_line(error))
        return []
    return [own, *(path for path in others if _may_be_sibling(path.parent.name, arch))]


def _may_be_sibling(name: str, arch: Arch) -> bool:
    known = gpus.GPUS.get(name)
    return (known is None and (name == "cpu") != arch.is_gpu) or (
        known is not None and are_siblings(silicon(known), silicon(arch))
    )


def _candidates(path: Path, arch: Arch, heads: HeadConfig) -> list[Candidate]:
    here = silicon(arch)
    try:
        found = pack.load(path)
    except FileNotFoundError:
        return []
    except (PackError, OSError) as error:
        _warn_once(pack_file.one_line(error))
        return []
    if not (found.is_understood and found.heads == heads and are_siblings(found.arch, here)):
        return []
    # Two processors of equal size that differ in something else are still two: the least distance tells them apart.
    apart = 0.0 if same(found.arch, here) else max(distance(found.arch, here), 1e-6)
    return [
        Candidate(entry=entry, path=path, silicon=found.arch, apart=apart, why_unusable=why_unusable(entry, arch))
        for entry in found.entries
    ]


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s; its entries are passed over", message)
