"""Records: every trial of every tuning run as one JSON line, failures included. Append only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from specattn_codegen import json_lines, paths
from specattn_codegen.digest import digest
from specattn_codegen.environment import Environment, Silicon
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning.outcome import DIED, HUNG, POISONED, Outcome, Status

Stage = Literal["compile", "interpret", "measure"]


class Identity(NamedTuple):
    """Equal for trials that would give the same answer. Compared, not digested: 50 and 50.0 are one softcap."""

    stage: Stage
    spec: KernelSpec
    workload: Workload | None
    plan: Plan
    source_digest: str
    silicon: Silicon
    compiler: str
    device: str | None
    page_size: int
    policy: str
    specattn_codegen: str  # another version may prove more
    fit: str  # what predictions rest on


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One trial.

    stage         compile: for a GPU that is absent; interpret: a proof there; measure: proved and timed on the device
    workload      None where it plays no part, as in compiling
    outcome       what became of it
    page_size     keys per page of the timed cache, where the spec leaves it to the call; 0 where nothing was timed
    policy        how it was timed, in the words of measure.policy; empty where nothing was timed
    predicted_us  the cost model's time by workload; empty for anything but a compiled plan
    """

    stage: Stage
    spec: KernelSpec
    workload: Workload | None
    plan: Plan
    source_digest: str
    silicon: Silicon
    environment: Environment
    outcome: Outcome
    page_size: int = 0
    policy: str = ""
    predicted_us: Mapping[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> Identity:
        return Identity(
            self.stage,
            self.spec,
            self.workload,
            self.plan,
            self.source_digest,
            self.silicon,
            self.environment.compiler,
            self.environment.device,
            self.page_size,
            self.policy,
            self.environment.specattn_codegen,
            self.environment.fit if self.stage == "compile" else "",
        )

    def summary(self) -> str:
        """One line for people."""
        sizes = f" {self.workload.name}" if self.workload else ""
        time = f" {self.outcome.timings[0].median_us:.1f} us" if self.outcome.timings else ""
        return f"{self.stage} of {self.spec.name}{sizes}, {self.plan}: {self.outcome.status.value}{time}"

    @property
    def offence(self) -> tuple[str, str, str] | None:
        """What ended its worker: the binary by its digest, silicon and compiler; None for a well-behaved one."""
        hung = self.outcome.status is Status.TIMEOUT and self.outcome.detail.startswith(HUNG)
        if not hung and not (
            self.outcome.status is Status.RUNTIME and self.outcome.detail.startswith((DIED, POISONED))
        ):
            return None
        return self.source_digest, digest(self.silicon), self.environment.compiler

    @property
    def is_settled(self) -> bool:
        """Whether trying again would teach nothing; a machine under load may exceed a deadline once."""
        return self.outcome.status is not Status.TIMEOUT


def records_path(arch: Arch, heads: HeadConfig) -> Path:
    return paths.cache_dir() / "records" / arch.name / f"{heads.name}.jsonl"


def read(path: Path) -> list[Record]:
    """Every whole line, oldest first. One cut short by a crash or a full disk, or of another version, is no record."""
    return json_lines.read(path, Record)


def decode(lines: Sequence[str]) -> list[Record]:
    """Records from elsewhere than a file, by the same rule."""
    return [found for line in lines if (found := json_lines.decode(line.encode(), Record)) is not None]


def append(path: Path, record: Record) -> None:
    """Raises OSError."""
    json_lines.append(path, record)
