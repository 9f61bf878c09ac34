"""Packs: the winners of one HeadConfig on one processor, as JSON. Reads, merges, writes and looks up; never tunes."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import filelock
import msgspec

from specattn_codegen import buckets, paths, space
from specattn_codegen.arch import Arch
from specattn_codegen.build.resources import Resources
from specattn_codegen.digest import digest, to_plain
from specattn_codegen.environment import Environment, Silicon, silicon
from specattn_codegen.errors import PackError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.spec import KernelSpec, Workload

SCHEMA_VERSION = 1
LARGEST_SIZE = 2**40  # of a workload; far above any real one, and safe in floating point

ChosenBy = Literal["measured", "modelled"]
ProvedBy = Literal["device", "interpreter", "interpreter-float16-twin"]
Rung = Literal["exact", "nearest"]

logger = logging.getLogger("specattn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One winner and what stands for it.

    chosen_by         measured on a device, or modelled: compiled for it and ranked by the cost model
    proved_by         what showed its results to be right
    latency_us        median of one call; predicted where modelled
    noise_us          half the distance between the 20th and 80th percentile; 0 where modelled
    share_of_ceiling  the roofline's time over latency_us
    resources         of the binary; empty on the CPU
    source_digest     of the rendered text that was compiled
    """

    spec: KernelSpec
    workload: Workload
    plan: Plan
    chosen_by: ChosenBy
    proved_by: ProvedBy
    latency_us: float
    noise_us: float
    share_of_ceiling: float
    resources: tuple[Resources, ...]
    source_digest: str
    environment: Environment

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_us) and self.latency_us > 0):
            raise PackError(f"latency_us={self.latency_us!r}: must be positive")
        if max(self.workload.batch, self.workload.kv_len, self.workload.budget) > LARGEST_SIZE:
            raise PackError(f"workload={self.workload}: no size may pass {LARGEST_SIZE}")
        if (self.chosen_by == "measured") != (self.proved_by == "device"):
            raise PackError(f"chosen_by={self.chosen_by}, proved_by={self.proved_by}: measured goes with device")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    schema_version: int
    arch: Silicon
    heads: HeadConfig
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if any(entry.spec.heads != self.heads for entry in self.entries):
            raise PackError(f"an entry is for other heads than {self.heads.name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a lookup found and on which rung: the call's own size bucket, or the nearest within reach."""

    plan: Plan
    rung: Rung
    entry: Entry


def pack_path(root: Path, arch: Arch, heads: HeadConfig) -> Path:
    return root / arch.name / f"{heads.name}.json"


def load(path: Path) -> Pack:
    """Reads and checks a whole pack. Raises PackError in one line; OSError where the file cannot be read at all."""
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PackError(f"{path}: not a pack, {_one_line(error)}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise PackError(
            f"{path}: schema_version {str(version)[:20]} where this version reads {SCHEMA_VERSION}; "
            "update specattn-codegen or tune again"
        )
    try:
        return msgspec.convert(_settings_as_pairs(raw), Pack, strict=True)
    except (ValueError, RecursionError, OverflowError, PackError) as error:
        raise PackError(f"{path}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _settings_as_pairs(raw: dict[str, object]) -> dict[str, object]:
    """On disk a plan's settings are an object, which people read; in memory they are sorted pairs, which hash."""
    entries = raw.get("entries")
    if not isinstance(entries, list):
        return raw
    return {**raw, "entries": [_entry_as_pairs(entry) for entry in entries]}


def _entry_as_pairs(entry: object) -> object:
    plan = entry.get("plan") if isinstance(entry, dict) else None
    settings = plan.get("settings") if isinstance(plan, dict) else None
    if not (isinstance(entry, dict) and isinstance(plan, dict) and isinstance(settings, dict)):
        return entry
    return {**entry, "plan": {**plan, "settings": sorted(settings.items())}}


def encode(pack: Pack) -> str:
    plain = json.loads(json.dumps(to_plain(pack), allow_nan=False))
    for entry in plain["entries"]:
        entry["plan"]["settings"] = dict(entry["plan"]["settings"])
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def structure(spec: KernelSpec) -> KernelSpec:
    """What must match exactly. select_kv reads float32 scores, so the cache's dtype and pages are not part of it."""
    return replace(spec, dtype="float32", page_size=0) if spec.op == "select_kv" else spec


def _place(entry: Entry) -> tuple[KernelSpec, tuple[int, ...]]:
    return structure(entry.spec), buckets.buckets(entry.spec.op, entry.workload)


def merge(old: Iterable[Entry], new: Iterable[Entry]) -> tuple[Entry, ...]:
    """One entry per kernel and size bucket, the newer one, but what was measured never gives way to a model."""
    merged = {_place(entry): entry for entry in old}
    for entry in new:
        known = merged.get(_place(entry))
        if known is None or known.chosen_by == "modelled" or entry.chosen_by == "measured":
            merged[_place(entry)] = entry
    return tuple(
        sorted(merged.values(), key=lambda entry: (entry.spec.name, buckets.sizes(entry.spec.op, entry.workload)))
    )


def existing(root: Path, arch: Arch, heads: HeadConfig) -> tuple[Entry, ...]:
    """Entries already in a pack; none where there is no file. Raises PackError for one that must not be added to."""
    path = pack_path(root, arch, heads)
    if not path.exists():
        return ()
    pack = load(path)
    if pack.arch != silicon(arch):
        raise PackError(
            f"{path}: made for another processor ({pack.arch.target}, {pack.arch.num_sms} cores or "
            "multiprocessors); move it away or choose another --out"
        )
    return pack.entries


def publish(root: Path, arch: Arch, heads: HeadConfig, winners: Iterable[Entry]) -> Path:
    """Merges winners into the pack at `<root>/<arch>/<heads>.json`, all or nothing. Raises PackError and OSError."""
    path = pack_path(root, arch, heads)
    path.parent.mkdir(parents=True, exist_ok=True)
    locks = paths.cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(locks / f"{digest(str(path.resolve()))}.lock"):
        entries = merge(existing(root, arch, heads), winners)
        pack = Pack(schema_version=SCHEMA_VERSION, arch=silicon(arch), heads=heads, entries=entries)
        _write_atomically(path, encode(pack))
    return path


def _write_atomically(path: Path, text: str) -> None:
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s; its entries are passed over", message)


def _believed(path: Path, spec: KernelSpec, arch: Arch) -> list[Entry]:
    """Entries of one file for this kernel whose plans today's space still accepts; none from a file that is damaged."""
    try:
        pack = load(path)
    except FileNotFoundError:
        return []
    except (PackError, OSError) as error:
        _warn_once(_one_line(error))
        return []
    if pack.arch != silicon(arch):
        return []
    return [
        entry
        for entry in pack.entries
        if structure(entry.spec) == structure(spec) and space.why_invalid(entry.plan, spec, arch) is None
    ]


def lookup(spec: KernelSpec, workload: Workload, arch: Arch, layers: Sequence[Path]) -> Found | None:
    """The plan that serves a call: its own size bucket in the first layer that has it, else the nearest within reach.

    Pure and deterministic for given files, and never raises: a damaged pack is a miss with one warning. None means
    that the caller takes its safe default.
    """
    op = spec.op
    candidates = [entry for root in layers for entry in _believed(pack_path(root, arch, spec.heads), spec, arch)]
    for entry in candidates:
        if buckets.buckets(op, entry.workload) == buckets.buckets(op, workload):
            return Found(plan=entry.plan, rung="exact", entry=entry)
    near = [entry for entry in candidates if buckets.distance(op, entry.workload, workload) <= buckets.FARTHEST]
    if not near:
        return None
    nearest = min(near, key=lambda entry: buckets.distance(op, entry.workload, workload))
    return Found(plan=nearest.plan, rung="nearest", entry=nearest)
