"""The layout of Hugging Face `kernels`: a torch-noarch source tree for kernel-builder, and what it builds."""

from __future__ import annotations

import json

from specattn_codegen.digest import digest
from specattn_codegen.environment import silicon
from specattn_codegen.export.package import Export, below, common_facts, package_files
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry, Pack
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render_text

VERSION = 1  # of the kernel; a repository counts it up when its interface changes
BACKENDS = {"nvidia": "cuda", "amd": "rocm"}


def variant(arch: Arch) -> str:
    """The noarch variant's folder, as in `torch-cuda`: of no torch version, C++ ABI or CPU."""
    return f"torch-{BACKENDS[arch.vendor]}"


def repository_files(export: Export) -> dict[str, str]:
    """Everything a kernel repository holds, by relative path."""
    package = package_files(export)
    configs = {f"configs/{export.arch.name}/{export.heads.name}.json": config(export)}
    usage = f'from kernels import get_kernel\n\nkernel = get_kernel("OWNER/{export.name}", version={VERSION})'
    facts = common_facts(export)
    return {
        "README.md": render_text("export/README.md.jinja", **facts, usage=usage, front_matter=True),
        "LICENSE": package["LICENSE"],
        "build.toml": render_text("export/build.toml.jinja", **facts, backend=BACKENDS[export.arch.vendor]),
        **below(f"torch-ext/{export.package}", {**package, **configs}),
        **below(f"build/{variant(export.arch)}", {**package, **configs, "metadata.json": metadata(export, package)}),
    }


def metadata(export: Export, package: dict[str, str]) -> str:
    """What `kernels` reads before it imports a variant. The id tells versions in one process apart."""
    plain = {
        "id": f"_{export.package}_{digest(package)}",
        "name": export.name,
        "version": VERSION,
        "license": export.licence,
        "python-depends": [],
        "backend": {"type": BACKENDS[export.arch.vendor], "archs": [_capability(export.arch)]},
    }
    return json.dumps(plain, indent=2) + "\n"


def _capability(arch: Arch) -> str:
    return arch.target if arch.vendor == "amd" else f"{arch.compute_capability // 10}.{arch.compute_capability % 10}"


def config(export: Export) -> str:
    """The entries that were exported, as a pack: `specattn-pack install` takes it."""
    entries: dict[Entry, None] = {
        row.found.candidate.entry: None
        for row in export.rows
        if row.found.candidate is not None and not row.found.candidate.apart
    }
    return pack.encode(Pack(arch=silicon(export.arch), heads=export.heads, entries=pack.in_order(entries)))
