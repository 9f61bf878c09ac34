"""TileLang's kernels as NVIDIA binaries: their CUDA source and machine code, and what launches them with torch and the
driver alone, where neither a compiler nor TileLang is."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specattn_codegen import paths, space
from specattn_codegen.build import cubin, tilelang
from specattn_codegen.digest import to_plain
from specattn_codegen.environment import compiler_version, own_version, silicon
from specattn_codegen.errors import SpecError
from specattn_codegen.export.package import NAME, below
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs.ladder import Ladder
from specattn_codegen.packs.pack import ProvedBy, structure
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import Source, render, render_text
from specattn_codegen.spec import KernelSpec

BACKEND = "tilelang"
VECTORS = (8, 1)  # elements read at once: where addresses and strides are multiples of 8, and anywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Binaries:
    """One kernel and the folders of its compiled device functions, by the width of their loads.

    proved_by  what stands for its results; None where nothing does
    """

    source: Source
    proved_by: ProvedBy | None
    folders: Mapping[int, Path]

    @property
    def kernel(self) -> str:
        """Of the module that holds the text."""
        return f"{self.source.spec.op}_{self.source.digest[:10]}"


def compiled(specs: Sequence[KernelSpec], arch: Arch, known: Ladder) -> list[Binaries]:
    """Every kernel that TileLang serves, compiled for a GPU that need not be here.

    Raises BuildError in the compiler's words, or where it is missing, and SpecError where nothing is served.
    """
    served = [spec for spec in specs if space.why_unserved(spec, arch, BACKEND) is None]
    if not served:
        raise SpecError(
            f"{arch.name}: {space.why_unserved(specs[0], arch, BACKEND)}; TileLang's binaries are for NVIDIA's GPUs"
        )
    tilelang.require_compilers()
    compiler = importlib.import_module(tilelang.COMPILER)
    found: list[Binaries] = []
    for spec in served:
        plan, proved_by = plan_of(spec, arch, known)
        source = render(spec, plan, BACKEND)
        folders = {vector: compiler.compiled_folder(source, arch, vector) for vector in VECTORS}
        found.append(Binaries(source=source, proved_by=proved_by, folders=folders))
    return found


def plan_of(spec: KernelSpec, arch: Arch, known: Ladder) -> tuple[Plan, ProvedBy | None]:
    """TileLang's plan of the first entry that was proved on this processor, else the default, which nothing proves."""
    entries = (
        one.entry
        for one in known.candidates
        if not one.apart and one.why_unusable is None and one.entry.plan.backend == BACKEND
    )
    entry = next((entry for entry in entries if structure(entry.spec) == structure(spec)), None)
    return (entry.plan, entry.proved_by) if entry else (space.default_plan(spec, arch, BACKEND), None)


def cubin_files(
    name: str, arch: Arch, heads: HeadConfig, licence: str, kernels: Sequence[Binaries]
) -> dict[str, bytes]:
    """A package of the kernels by relative path. Raises SpecError for a name that would not do for one."""
    if not NAME.fullmatch(name):
        raise SpecError(f"name={name!r}: must be lower-case letters, digits and dashes, as my-kernels")
    package = name.replace("-", "_")
    common: dict[str, object] = {
        "name": name,
        "package": package,
        "arch": arch.name,
        "heads": heads,
        "licence": licence,
        "version": own_version(),
        "kernels": {one.source.spec.name: one.kernel for one in kernels},
        "unproved": [one.source.spec.name for one in kernels if one.proved_by is None],
    }
    texts = {
        "__init__.py": render_text("export/cubins.py.jinja", **common),
        "cubin.py": Path(cubin.__file__).read_text(),
        "kernels/__init__.py": '"""The kernels, as their templates render: grids, strides and workspaces."""\n',
        **{f"kernels/{one.kernel}.py": f"# Plan: {one.source.plan}\n{one.source.text}" for one in kernels},
        "LICENSE": paths.licence_text(),
        "PROVENANCE.json": provenance(arch, heads, licence, kernels),
    }
    binaries = {
        f"binaries/{one.kernel}/vector{vector}/{file.name}": file.read_bytes()
        for one in kernels
        for vector, folder in one.folders.items()
        for file in sorted(folder.iterdir())
    }
    readme = {"README.md": render_text("export/cubins.md.jinja", **common)}
    encoded = {path: text.encode() for path, text in {**readme, **below(package, texts)}.items()}
    return encoded | {f"{package}/{path}": content for path, content in binaries.items()}


def provenance(arch: Arch, heads: HeadConfig, licence: str, kernels: Sequence[Binaries]) -> str:
    """Where every kernel comes from, and what stands for its results."""
    plain = {
        "specattn_codegen": own_version(),
        "licence": licence,
        "arch": to_plain(silicon(arch)),
        "heads": to_plain(heads),
        "compiler": compiler_version(BACKEND),
        "kernels": [
            {
                "operation": one.source.spec.name,
                "kernel": one.kernel,
                "source_digest": one.source.digest,
                "plan": one.source.plan.as_dict(),
                "proved_by": one.proved_by,
            }
            for one in kernels
        ],
    }
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"
