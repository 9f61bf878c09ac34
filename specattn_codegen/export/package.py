"""The exported package as text by relative path. Pure: the same tables give the same files, byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specattn_codegen import buckets, paths
from specattn_codegen.digest import to_plain
from specattn_codegen.environment import own_version, silicon
from specattn_codegen.errors import SpecError
from specattn_codegen.export.tables import Row, Table
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render_text
from specattn_codegen.space.triton import DESCRIPTOR_ALIGNMENT, merges_last
from specattn_codegen.spec import KernelSpec, KvDtype

NAME = re.compile(r"[a-z][a-z0-9-]*[a-z0-9]")
TITLE = "Verification attention with scores, selection and sparse attention for sparse self-speculative decoding."
TORCH_NAMES: dict[KvDtype, str] = {"float8_e4m3": "float8_e4m3fn", "float8_e5m2": "float8_e5m2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Tables of one HeadConfig on one processor, under a name of lower-case letters, digits and dashes."""

    name: str
    arch: Arch
    heads: HeadConfig
    licence: str
    tables: tuple[Table, ...]

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise SpecError(f"name={self.name!r}: must be lower-case letters, digits and dashes, as my-kernels")

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for table in self.tables for row in table.rows)

    @property
    def kernels(self) -> dict[str, Row]:
        """A row of each kernel by its module's name, sorted."""
        return {row.kernel: row for row in sorted(self.rows, key=lambda row: row.kernel)}


def default_name(arch: Arch, heads: HeadConfig) -> str:
    """As in `specattn-h100-q32-kv8-d128`."""
    return re.sub(r"[^a-z0-9]+", "-", f"specattn-{arch.name}-{heads.name}")


def package_files(export: Export) -> dict[str, str]:
    """Modules of the package, its licence and its provenance."""
    common = common_facts(export)
    files = {
        "__init__.py": render_text("export/init.py.jinja", **common, **_interface(export)),
        "decision.py": render_text("export/decision.py.jinja", **common, tables=_decisions(export)),
        "smoke_test.py": render_text("export/smoke_test.py.jinja", **common, **_interface(export)),
        "kernels/__init__.py": f'{_header(common)}"""The kernels, as their templates render."""\n',
        "LICENSE": paths.licence_text(),
        "PROVENANCE.json": provenance(export),
    }
    for name, row in export.kernels.items():
        files[f"kernels/{name}.py"] = f"{_header(common)}# Plan: {row.source.plan}\n{row.source.text}"
    return files


def folder_files(export: Export) -> dict[str, str]:
    """The package and what goes beside it, for a folder that is put on sys.path."""
    usage = f"from {export.package} import verify_attention"
    readme = render_text("export/README.md.jinja", **common_facts(export), usage=usage, front_matter=False)
    return {"README.md": readme, **below(export.package, package_files(export))}


def below(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


def common_facts(export: Export) -> dict[str, object]:
    """What every template may name."""
    spec = next(table.spec for table in export.tables if table.spec.op != "select_kv")
    return {
        "name": export.name,
        "package": export.package,
        "arch": export.arch.name,
        "heads": export.heads,
        "licence": export.licence,
        "version": own_version(),
        "dtype": spec.dtype,
        "cache_dtype": spec.cache_dtype,
        "torch_cache_dtype": TORCH_NAMES.get(spec.cache_dtype, spec.cache_dtype),
        "page_size": spec.page_size,
        "kernels": list(export.kernels),
        "modelled": any(row.found.candidate is None or "modelled" in row.note for row in export.rows),
    }


def _header(common: Mapping[str, object]) -> str:
    return render_text("export/header.jinja", **common)


def _interface(export: Export) -> dict[str, object]:
    """What the launch functions and their test need to know of the kernels there are."""
    specs = [table.spec for table in export.tables]
    scores = [spec.score for spec in specs if spec.score and not _mixes(spec)]
    sparse = {spec.selection: spec.name for spec in specs if spec.op == "sparse_attention"}
    selects = bool(sparse) and any(spec.op == "select_kv" for spec in specs)
    plain = next((spec.name for spec in specs if spec.op == "verify_attention" and not spec.score), None)
    if plain is None:
        raise SpecError("nothing to export without verify_attention; leave --op out")
    # With one KV head both kinds of selection have one row; the kernel of kv_head, named first, serves it.
    mixed = {
        (spec.score.name if spec.score else None, spec.selection_heads): spec.name
        for spec in reversed(specs)
        if _mixes(spec)
    }
    exported = ["VerifyOutput", "choose", "verify_attention", *(["mixed_attention"] * bool(mixed))]
    exact = [score.name for score in scores if score.normaliser == "exact" and score.value == "weight"]
    return {
        "title": TITLE,
        "exported": sorted(exported + (["Selection", "SparseOutput", "select_kv", "sparse_attention"] * selects)),
        "selects": selects,
        "mixes": bool(mixed),
        "mixed": mixed,
        "score_names": [score.name for score in scores],
        "has_reference": any(score.normaliser == "reference" for score in scores),
        "smoke_score": exact[0] if exact else None,
        "tables": export.tables,
        "plain_verify": plain,
        "sparse_layer": sparse.get("layer", sparse.get("kv_head")),
        "sparse_kv_head": sparse.get("kv_head", sparse.get("layer")),
        "counting": any(merges_last(row.source.plan) for row in export.rows),
        "aligned": [
            name for name, row in export.kernels.items() if row.source.plan.as_dict().get("kv_load") == "descriptor"
        ],
        "descriptor_alignment": DESCRIPTOR_ALIGNMENT,
    }


def _mixes(spec: KernelSpec) -> bool:
    return spec.op == "mixed_attention"


def _decisions(export: Export) -> list[dict[str, object]]:
    return [
        {
            "spec": table.spec,
            "sizes": table.sizes,
            "rows": [
                {"sizes": buckets.sizes(table.spec.op, row.workload), "kernel": row.kernel, "note": row.note}
                for row in table.rows
            ],
        }
        for table in export.tables
    ]


def provenance(export: Export) -> str:
    """Where every row comes from: its rung, plan and text, and the pack's entry with its environment."""
    plain = {
        "specattn_codegen": own_version(),
        "licence": export.licence,
        "arch": to_plain(silicon(export.arch)),
        "heads": to_plain(export.heads),
        "rows": [_plain_row(table.spec, row) for table in export.tables for row in table.rows],
    }
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def _plain_row(spec: KernelSpec, row: Row) -> dict[str, object]:
    entry = row.found.candidate.entry if row.found.candidate else None
    return {
        "operation": spec.name,
        "workload": to_plain(row.workload),
        "kernel": row.kernel,
        "source_digest": row.source.digest,
        "plan": row.source.plan.as_dict(),
        "rung": row.found.rung,
        "chosen_by": entry.chosen_by if entry else None,
        "proved_by": entry.proved_by if entry else None,
        "latency_us": entry.latency_us if entry and row.is_as_tuned else None,  # of these sizes alone
        "environment": to_plain(entry.environment) if entry else None,
    }


def write(folder: Path, files: Mapping[str, str] | Mapping[str, bytes]) -> None:
    """Raises SpecError for a folder that holds anything already, and OSError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"{folder}: is not an empty folder; remove it, or name another with --out")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
