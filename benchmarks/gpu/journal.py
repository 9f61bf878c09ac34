"""The journal: what a campaign has done so far, one line a step, and the archive that carries it home."""

from __future__ import annotations

import dataclasses
import hashlib
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.gpu import CHECKOUT
from specattn_codegen import json_lines
from specattn_codegen.errors import SpecError

JOURNAL, ARCHIVE = "journal.jsonl", "results.tar.gz"
SOURCES = ("specattn_codegen", "runtime", "benchmarks", "templates")
SUFFIXES = (".py", ".jinja")
MOST_ATTEMPTS = 2  # of a step that took its process along: the first time it may have been cut by the clock
Answer = Mapping[str, object]
Status = Literal["started", "done", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What became of one step.

    key       the step, as in `ceilings/read`
    revision  of the sources it ran with
    seconds   it took
    answer    what it found; of one that failed `error` alone
    """

    key: str
    status: Status
    revision: str
    seconds: float = 0.0
    answer: dict[str, object] = field(default_factory=dict)


def revision() -> str:
    """First 12 digits of the digest of every source: a step that failed is tried again once they change."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((CHECKOUT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                found.update(f"{path.relative_to(CHECKOUT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """Facts in a folder, appended as they come; a cut loses the step that is under way."""

    folder: Path
    revision: str

    @property
    def path(self) -> Path:
        return self.folder / JOURNAL

    def facts(self) -> list[Fact]:
        """Oldest first."""
        return json_lines.read(self.path, Fact)

    def answers(self) -> dict[str, dict[str, object]]:
        """Of every step that is done, by key, in the order they were done."""
        return {fact.key: fact.answer for fact in self.facts() if fact.status == "done"}

    def is_settled(self, key: str) -> bool:
        """Whether a step is done, or has failed with these very sources."""
        same = [fact for fact in self.facts() if fact.key == key]
        return any(
            fact.status == "done" or (fact.status == "failed" and fact.revision == self.revision) for fact in same
        )

    def attempts(self, key: str) -> int:
        """How often a step was begun with these sources and never ended."""
        own = [fact for fact in self.facts() if fact.key == key and fact.revision == self.revision]
        return sum(1 if fact.status == "started" else -1 for fact in own)

    def started(self, key: str) -> None:
        json_lines.append(self.path, Fact(key=key, status="started", revision=self.revision))

    def done(self, key: str, seconds: float, answer: Answer) -> None:
        self._end(Fact(key=key, status="done", revision=self.revision, seconds=seconds, answer=dict(answer)))

    def failed(self, key: str, seconds: float, error: str) -> None:
        self._end(Fact(key=key, status="failed", revision=self.revision, seconds=seconds, answer={"error": error}))

    def _end(self, fact: Fact) -> None:
        json_lines.append(self.path, dataclasses.replace(fact, seconds=round(fact.seconds, 3)))


def pack(folder: Path) -> Path:
    """One archive of everything in a campaign's folder, replaced in one go. Raises OSError."""
    archive = folder / ARCHIVE
    scratch = archive.with_suffix(".part")
    with tarfile.open(scratch, "w:gz") as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path not in (archive, scratch):
                packed.add(path, arcname=str(path.relative_to(folder)))
    scratch.replace(archive)
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Puts an archive's files into a folder that has no journal yet. Raises SpecError where it is none."""
    try:
        with tarfile.open(archive, "r:gz") as packed:
            packed.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise SpecError(f"{archive}: not an archive of a campaign ({error}); give the {ARCHIVE} of one") from error
