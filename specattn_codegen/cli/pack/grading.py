"""How much of a pack still holds today, and what a file must pass to be taken."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from specattn_codegen.cli.pack import tables
from specattn_codegen.errors import PackError, SpecError
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Pack
from specattn_codegen.packs.staleness import Grade, grade
from specattn_codegen.processors.silicon import arch_of


def grades(found: Pack) -> list[Grade]:
    arch = arch_of(found.arch)
    return [grade(entry, arch) for entry in found.entries]


def graded(found: Pack) -> dict[str, int]:
    """How many entries have each grade."""
    return {str(name): count for name, count in Counter(grades(found)).items()}


def examine(path: Path, fresh: bool) -> tuple[bool, str]:
    """Whether a file is to be refused, and one line about it."""
    try:
        found = pack.load(path)
        counts = graded(found)
    except (PackError, SpecError) as error:
        return True, str(error) if str(path) in str(error) else f"{path}: {error}"
    except OSError as error:
        return True, f"{path}: {error.strerror}"
    summary = f"{path}: {len(found.entries)} entries, {tables.counted(counts)}"
    if counts.get("invalid"):
        return True, f"{summary}; invalid entries are never used; `specattn-pack show {path}` lists them, tune again"
    if fresh and counts.get("stale"):
        return True, f"{summary}; stale entries may be slow: tune again"
    return False, summary
