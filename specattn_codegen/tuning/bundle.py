"""Bundles: what a machine without the processor prepares, one with it measures, and the first takes home again.

job.json          what to time: kernels, sizes and plans, with the digest of each rendered source
sources/          those sources, for people to read and for the other side to compare with its own
records.jsonl     every trial of the measurement
packs/            its winners
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from specattn_codegen import environment
from specattn_codegen.digest import canonical_json
from specattn_codegen.environment import Silicon
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry, Pack
from specattn_codegen.plan import Backend, Plan
from specattn_codegen.processors import cpu_info, gpu_detect, gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.processors.silicon import same
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import record
from specattn_codegen.tuning.jobs import render_for
from specattn_codegen.tuning.measure import Mode
from specattn_codegen.tuning.outbox import require_saved
from specattn_codegen.tuning.shortlist import Shortlisted, shortlist
from specattn_codegen.tuning.tune_measured import tune_measured
from specattn_codegen.tuning.tune_session import Budget, Listener, Logbook, Target, Task, winners_of
from specattn_codegen.tuning.workforce import Workforce

SCHEMA_VERSION = 1
JOB, SOURCES, RECORDS, PACKS = "job.json", "sources", "records.jsonl", "packs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Plans of one kernel to time at one size, the default first; digests: of their sources, in their order."""

    spec: KernelSpec
    workload: Workload
    plans: tuple[Plan, ...]
    digests: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.plans or len(self.plans) != len(self.digests):
            raise SpecError(f"{self.spec.name}: needs a digest for each of its plans, and one plan at least")

    @property
    def task(self) -> Task:
        return Task(spec=self.spec, workloads=(self.workload,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What job.json holds. Inputs are made from the seed where they are timed."""

    schema_version: int
    silicon: Silicon
    backend: Backend
    page_size: int
    seed: int
    wanted: tuple[Wanted, ...]


def prepare(folder: Path, tasks: Sequence[Task], target: Target, *, count: int, seed: int) -> Bundle:
    """Writes a bundle of `count` plans a kernel and size, ranked by the cost model. Raises SpecError and OSError."""
    if (folder / JOB).exists():
        raise SpecError(f"{folder}: holds a bundle already; choose another folder")
    (folder / SOURCES).mkdir(parents=True, exist_ok=True)
    wanted: list[Wanted] = []
    for task, workload in [(one, workload) for one in tasks for workload in one.workloads]:
        plans = [
            plan
            for one in target.each(task.spec)
            for plan in shortlist(task.spec, workload, one.arch, one.backend, count=count)
        ]
        sources = [render_for(task.spec, plan, target.arch) for plan in plans]
        for source in sources:
            (folder / SOURCES / f"{source.digest}{source.suffix}").write_text(source.text)
        digests = tuple(source.digest for source in sources)
        wanted.append(Wanted(spec=task.spec, workload=workload, plans=tuple(plans), digests=digests))
    bundle = Bundle(
        schema_version=SCHEMA_VERSION,
        silicon=environment.silicon(target.arch),
        backend=target.backend,
        page_size=target.page_size,
        seed=seed,
        wanted=tuple(wanted),
    )
    (folder / JOB).write_text(canonical_json(bundle) + "\n")
    return bundle


def read(folder: Path) -> Bundle:
    """Raises SpecError in one line for a folder that holds no bundle this version understands."""
    path = folder / JOB
    try:
        bundle = msgspec.json.decode(path.read_bytes(), type=Bundle)
    except OSError as error:
        raise SpecError(f"{folder}: no bundle ({error.strerror}); make one with specattn-tune prepare") from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise SpecError(f"{path}: not a bundle, {' '.join(str(error).split())[:200]}") from error
    if bundle.schema_version != SCHEMA_VERSION:
        raise SpecError(f"{path}: schema_version {bundle.schema_version} where this version reads {SCHEMA_VERSION}")
    return bundle


def processor_here(bundle: Bundle) -> Arch:
    """The processor the bundle is for. Raises SpecError where it is not in this machine."""
    arch = cpu_info.detect() if bundle.silicon.vendor == "cpu" else gpu_detect.local()
    here = environment.silicon(arch)
    if not same(here, bundle.silicon):
        raise SpecError(
            f"the bundle is for {bundle.silicon.name} ({bundle.silicon.target}, {bundle.silicon.num_sms} cores or "
            f"multiprocessors); this machine has {here.name} ({here.target}, {here.num_sms})"
        )
    return arch


def measure(
    folder: Path, listener: Listener, budget: Budget, workforce: Workforce, mode: Mode = "eager"
) -> list[Entry]:
    """Times every plan of a bundle on the processor at hand; what an earlier measurement recorded is not timed again.

    Raises SpecError for another processor or other templates than the bundle was made with.
    """
    bundle = read(folder)
    arch = processor_here(bundle)
    for one in bundle.wanted:
        _require_same_sources(one, arch)
    target = Target(arch=arch, backend=bundle.backend, is_present=True, page_size=bundle.page_size, mode=mode)
    found: list[Entry] = []
    for heads, group in itertools.groupby(bundle.wanted, key=lambda one: one.spec.heads):
        lists = {one.task: one.plans for one in group}
        found += _measure_heads(folder, heads, lists, target, listener, budget, workforce)
    return found


def _measure_heads(
    folder: Path,
    heads: HeadConfig,
    lists: Mapping[Task, Sequence[Plan]],
    target: Target,
    listener: Listener,
    budget: Budget,
    workforce: Workforce,
) -> list[Entry]:
    found: list[Entry] = []
    winners = winners_of(folder / PACKS, target, heads)

    def publish(entries: Sequence[Entry]) -> None:
        found.extend(entries)
        winners.send(entries)

    logbook = Logbook.open(target, heads, folder / RECORDS)
    try:
        tune_measured(
            list(lists), target, budget, logbook, listener, publish, lambda task: Shortlisted(lists[task]), workforce
        )
    finally:
        require_saved(logbook.records, winners)
    return found


def _require_same_sources(wanted: Wanted, arch: Arch) -> None:
    for plan, expected in zip(wanted.plans, wanted.digests, strict=True):
        if render_for(wanted.spec, plan, arch).digest != expected:
            raise SpecError(
                f"{wanted.spec.name}: {plan} renders to another source than in the bundle; measure it with the "
                "version of specattn-codegen that prepared it"
            )


def merge(folder: Path, out: Path) -> tuple[int, list[Path]]:
    """Takes a measured bundle home: its trials into this machine's records, its winners into the packs under `out`,
    where they replace what was modelled. How many trials were new, and the packs. Raises SpecError and PackError."""
    bundle = read(folder)
    arch = cpu_info.detect() if bundle.silicon.vendor == "cpu" else gpus.find(bundle.silicon.name)
    if not same(environment.silicon(arch), bundle.silicon):
        raise SpecError(f"{folder}: {bundle.silicon.name} of this version is another processor than the bundle's")
    trials = record.read(folder / RECORDS)
    if not trials:
        raise SpecError(f"{folder}: was not measured yet; run specattn-tune measure {folder} where the processor is")
    new = 0
    for heads in dict.fromkeys(one.spec.heads for one in bundle.wanted):
        path = record.records_path(arch, heads)
        known = {trial.identity for trial in record.read(path)}
        for trial in trials:
            if trial.spec.heads == heads and trial.identity not in known:
                record.append(path, trial)
                new += 1
    packs: list[Path] = []
    for found in sorted((folder / PACKS).glob("*/*.json")):
        measured = pack.load(found)
        _require_asked_for(measured, bundle, found)
        packs.append(pack.publish(out, arch, measured.heads, measured.entries))
    return new, packs


def _require_asked_for(measured: Pack, bundle: Bundle, path: Path) -> None:
    """A pack may come from anywhere, so nothing is taken from one but what the bundle asked for."""
    plans = {(one.spec, one.workload): one.plans for one in bundle.wanted}
    for entry in measured.entries:
        wanted = entry.plan in plans.get((entry.spec, entry.workload), ())
        if not (wanted and entry.chosen_by == "measured" and same(measured.arch, bundle.silicon)):
            raise SpecError(f"{path}: {entry.summary()}, on {measured.arch.name}, is not what the bundle asked for")
