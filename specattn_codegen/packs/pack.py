"""Packs: the winners of one HeadConfig on one processor, as JSON. Reads, merges and writes them; never tunes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import filelock
import msgspec

from specattn_codegen import buckets, paths
from specattn_codegen.build.resources import Resources
from specattn_codegen.digest import canonical_json, digest, to_plain
from specattn_codegen.environment import Environment, Silicon, silicon
from specattn_codegen.errors import PackError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack_file
from specattn_codegen.packs.pack_file import LICENCE, Plain
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.processors.silicon import same
from specattn_codegen.spec import KernelSpec, Workload

LARGEST_SIZE = 2**40  # of a workload; far above any real one, and safe in floating point
PATH_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")  # what a pack may call its processor, as that names a folder
DERIVED = ("schema_version", "digest", "coverage", "provenance")  # written for people and other tools, never read

ChosenBy = Literal["measured", "modelled"]
ProvedBy = Literal["device", "interpreter", "interpreter-float16-twin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One winner and what stands for it.

    chosen_by         measured on a device, or modelled: compiled for it and ranked by the cost model
    proved_by         what showed its results to be right
    latency_us        median of one call; predicted where modelled
    noise_us          half the distance between the 20th and 80th percentile, or the run's noise floor where that is
                      more; 0 where modelled
    share_of_ceiling  the roofline's time over latency_us
    resources         of the binary; empty on the CPU
    source_digest     of the rendered text that was compiled
    space_digest      of the axes it was found in; empty where nobody noted it
    policy            how it was timed, in the words of measure.policy; empty where nothing was timed or noted
    unknown           JSON of the fields that only a later version knows, kept for it; empty for none
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
    space_digest: str = ""
    policy: str = ""
    unknown: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_us) and self.latency_us > 0):
            raise PackError(f"latency_us={self.latency_us!r}: must be positive")
        if max(self.workload.batch, self.workload.kv_len, self.workload.budget) > LARGEST_SIZE:
            raise PackError(f"workload={self.workload}: no size may pass {LARGEST_SIZE}")
        if (self.chosen_by == "measured") != (self.proved_by == "device"):
            raise PackError(f"chosen_by={self.chosen_by}, proved_by={self.proved_by}: measured goes with device")

    def summary(self) -> str:
        """One line for people."""
        return (
            f"winner of {self.spec.name} {self.workload.name}, {self.plan}: {self.chosen_by} {self.latency_us:.1f} us"
        )

    @property
    def is_understood(self) -> bool:
        """Whether what is computed, at which sizes and how has no field that this version does not know."""
        return not self.unknown or json.loads(self.unknown).keys().isdisjoint(("spec", "workload", "plan"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """licence is an SPDX expression; unknown is that of Entry."""

    arch: Silicon
    heads: HeadConfig
    entries: tuple[Entry, ...]
    licence: str = LICENCE
    unknown: str = ""

    def __post_init__(self) -> None:
        if not PATH_PART.fullmatch(self.arch.name):
            raise PackError(f"arch.name={self.arch.name!r}: must be lower-case letters, digits, dots and dashes")
        if any(entry.spec.heads != self.heads for entry in self.entries):
            raise PackError(f"an entry is for other heads than {self.heads.name}")

    @property
    def is_understood(self) -> bool:
        """Whether its processor and heads have no field that this version does not know."""
        return not self.unknown or json.loads(self.unknown).keys().isdisjoint(("arch", "heads"))

    @property
    def coverage(self) -> dict[str, list[str]]:
        """Sizes by kernel."""
        names: dict[str, list[str]] = {}
        for entry in self.entries:
            names.setdefault(entry.spec.name, []).append(entry.workload.name)
        return names

    @property
    def provenance(self) -> dict[str, dict[str, int]]:
        """How many entries come from where: labels, proofs, compilers, devices, versions of this project, and fits of
        the cost model where there were any."""
        facts = {
            "chosen_by": [entry.chosen_by for entry in self.entries],
            "proved_by": [entry.proved_by for entry in self.entries],
            "compiler": [entry.environment.compiler for entry in self.entries],
            "device": [entry.environment.device or "none" for entry in self.entries],
            "specattn_codegen": [entry.environment.specattn_codegen for entry in self.entries],
        }
        if any(entry.environment.fit for entry in self.entries):
            facts["fit"] = [entry.environment.fit or "none" for entry in self.entries]
        return {name: dict(sorted(Counter(values).items())) for name, values in facts.items()}


def pack_path(root: Path, arch: Arch, heads: HeadConfig) -> Path:
    return root / arch.name / f"{heads.name}.json"


def load(path: Path) -> Pack:
    """Reads and checks a whole pack. Raises PackError in one line; OSError where the file cannot be read at all."""
    raw = pack_file.read_plain(path)
    try:
        found = msgspec.convert(_settings_as_pairs(raw), Pack, strict=True)
    except (ValueError, RecursionError, OverflowError, PackError) as error:
        raise PackError(f"{path}: {pack_file.one_line(error)}") from error
    return _keep_unknown(raw, found)


def stored_digest(path: Path) -> str:
    """Of a pack that loads; empty for one of a schema without."""
    return str(pack_file.read_plain(path).get("digest", ""))


def _keep_unknown(raw: Plain, found: Pack) -> Pack:
    """The pack and its entries with what this version did not understand of them."""
    raw_entries = raw["entries"]
    assert isinstance(raw_entries, list)
    entries = tuple(
        replace(entry, unknown=_unknown(before, _plain_entry(replace(entry, unknown=""))))
        for before, entry in zip(raw_entries, found.entries, strict=True)
    )
    own = {name: value for name, value in raw.items() if name not in (*DERIVED, "entries")}
    known = {"arch": to_plain(found.arch), "heads": to_plain(found.heads), "licence": found.licence}
    return replace(found, entries=entries, unknown=_unknown(own, known))


def _unknown(raw: object, known: object) -> str:
    part = pack_file.unknown_part(raw, known)
    return "" if part is None else canonical_json(part)


def _settings_as_pairs(raw: Plain) -> Plain:
    """On disk a plan's settings are an object, which people read; in memory they are sorted pairs, which hash."""
    entries = raw.get("entries")
    if not isinstance(entries, list):
        return raw
    return {**raw, "unknown": "", "entries": [_entry_as_pairs(entry) for entry in entries]}


def _entry_as_pairs(entry: object) -> object:
    plan = entry.get("plan") if isinstance(entry, dict) else None
    settings = plan.get("settings") if isinstance(plan, dict) else None
    if not (isinstance(entry, dict) and isinstance(plan, dict) and isinstance(settings, dict)):
        return entry
    return {**entry, "unknown": "", "plan": {**plan, "settings": sorted(settings.items())}}


def encode(pack: Pack) -> str:
    """The file's text: equal packs give equal texts."""
    plain = {
        "schema_version": pack_file.SCHEMA_VERSION,
        "licence": pack.licence,
        "arch": to_plain(pack.arch),
        "heads": to_plain(pack.heads),
        "coverage": pack.coverage,
        "provenance": pack.provenance,
        "entries": [_plain_entry(entry) for entry in pack.entries],
    }
    whole = pack_file.with_unknown(plain, json.loads(pack.unknown or "{}"))
    assert isinstance(whole, dict)
    return pack_file.to_text(whole)


def _plain_entry(entry: Entry) -> object:
    plain = to_plain(entry)
    assert isinstance(plain, dict)
    unknown = plain.pop("unknown")
    plain["plan"] = {"backend": entry.plan.backend, "settings": entry.plan.as_dict()}
    return pack_file.with_unknown(plain, json.loads(unknown or "{}"))


def structure(spec: KernelSpec) -> KernelSpec:
    """What must match exactly. select_kv reads float32 scores, so the cache's dtype and pages are not part of it."""
    return replace(spec, dtype="float32", page_size=0) if spec.op == "select_kv" else spec


def place(entry: Entry) -> tuple[KernelSpec, tuple[int, ...], str]:
    """What there is one entry for: a kernel and a size bucket. What is not understood replaces nothing."""
    alien = "" if entry.is_understood else entry.unknown
    return *slot(entry.spec, entry.workload), alien


def slot(spec: KernelSpec, workload: Workload) -> tuple[KernelSpec, tuple[int, ...]]:
    """What an entry serves: a kernel and a size bucket."""
    return structure(spec), buckets.buckets(spec.op, workload)


def in_order(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(
        sorted(
            entries,
            key=lambda entry: (entry.spec.name, buckets.sizes(entry.spec.op, entry.workload), entry.unknown),
        )
    )


def merge(old: Iterable[Entry], new: Iterable[Entry]) -> tuple[Entry, ...]:
    """One entry per kernel and size bucket, the newer one, but what was measured never gives way to a model."""
    merged = {place(entry): entry for entry in old}
    for entry in new:
        known = merged.get(place(entry))
        if known is None or known.chosen_by == "modelled" or entry.chosen_by == "measured":
            merged[place(entry)] = entry
    return in_order(merged.values())


def existing(root: Path, arch: Arch, heads: HeadConfig) -> Pack:
    """The pack that winners are added to, an empty one where there is no file. Raises PackError for another's."""
    path = pack_path(root, arch, heads)
    if not path.exists():
        return Pack(arch=silicon(arch), heads=heads, entries=())
    pack = load(path)
    if not same(pack.arch, silicon(arch)):
        raise PackError(
            f"{path}: made for another processor ({pack.arch.target}, {pack.arch.num_sms} cores or "
            "multiprocessors); move it away or choose another --out"
        )
    return pack


def publish(root: Path, arch: Arch, heads: HeadConfig, winners: Iterable[Entry]) -> Path:
    """Merges winners into the pack at `<root>/<arch>/<heads>.json`, all or nothing. Raises PackError and OSError."""
    path = pack_path(root, arch, heads)
    with locked(path):
        pack = existing(root, arch, heads)
        write(path, replace(pack, entries=merge(pack.entries, winners)))
    return path


def locked(path: Path) -> filelock.FileLock:
    """Held by whoever reads a pack in order to change it. Readers need none, as writing replaces a file whole."""
    locks = paths.cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(locks / f"{digest(str(path.resolve()))}.lock")


def write(path: Path, pack: Pack) -> None:
    """All or nothing; the folder is made where there is none. Raises OSError."""
    pack_file.write_whole(path, encode(pack))
