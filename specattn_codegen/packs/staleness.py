"""How much of an entry still holds today: what it was tuned as, compared with what its plan gives now."""

from __future__ import annotations

import functools
from typing import Literal

from specattn_codegen import environment, space
from specattn_codegen.build import target_for
from specattn_codegen.digest import digest
from specattn_codegen.errors import BuildError, SpecError
from specattn_codegen.packs.pack import Entry
from specattn_codegen.plan import Backend
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import Source, render
from specattn_codegen.spec import KernelSpec

Grade = Literal["exact", "compatible", "stale", "invalid"]

# And what dispatch makes of it.
MEANING: dict[Grade, str] = {
    "exact": "the same kernel text, search space and compiler as when it was tuned; served",
    "compatible": "another version of the compiler, the same text and space; served",
    "stale": "the templates, the space or the compiler changed since, so its proof and times are of an earlier kernel; "
    "today's space still takes the plan; served, with one warning that names the tune command",
    "invalid": "today's space refuses the plan, or it has fields this version does not know; passed over, as if absent",
}


def space_digest(spec: KernelSpec, backend: Backend) -> str:
    """Of the axes a plan is chosen from."""
    return digest([(axis.name, axis.values) for axis in space.axes(spec, backend)])


def grade(entry: Entry, arch: Arch) -> Grade:
    """Of an entry on the processor it is for."""
    if why_unusable(entry, arch) is not None:
        return "invalid"
    return grade_source(entry, render(entry.spec, entry.plan, target_for(entry.plan, arch)))


def grade_source(entry: Entry, source: Source) -> Grade:
    """Of a usable entry whose plan renders to `source` today."""
    space_now = space_digest(entry.spec, entry.plan.backend)
    if source.digest != entry.source_digest or entry.space_digest not in ("", space_now):
        return "stale"
    compiler = _compiler(entry.plan.backend)
    if compiler in (None, entry.environment.compiler):
        return "exact"
    return "compatible" if _family(compiler) == _family(entry.environment.compiler) else "stale"


def why_unusable(entry: Entry, arch: Arch) -> str | None:
    """Why an entry can serve nobody on this processor; None for one that can."""
    if not entry.is_understood:
        return "it has fields this version does not know; update specattn-codegen"
    try:
        return space.why_invalid(entry.plan, entry.spec, arch)
    except SpecError as error:  # an operation its backend does not have
        return str(error)


@functools.cache
def _compiler(backend: Backend) -> str | None:
    """None where there is no compiler to compare with."""
    try:
        return environment.compiler_version(backend)
    except BuildError:
        return None


def _family(compiler: str) -> tuple[str, str]:
    """`triton` of `triton 3.7.1`, and options that are not in a source: of one family only the version differs."""
    name, _, options = compiler.partition(", options ")
    return name.split(maxsplit=1)[0] if name else "", options
