"""Imports a rendered Python file as a module. It must be a real file, as kernel languages read their own text."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from specattn_codegen import paths
from specattn_codegen.build.store import publish
from specattn_codegen.errors import BuildError
from specattn_codegen.render import Source


def import_source(source: Source) -> ModuleType:
    """The rendered file as a module, written to its content-addressed place first. Raises BuildError."""
    backend = source.plan.backend
    name = f"specattn_{backend}_{source.digest}"
    if name in sys.modules:
        return sys.modules[name]
    file_name = f"{source.spec.op}{source.suffix}"

    def write(folder: Path) -> None:
        (folder / file_name).write_text(source.text)

    folder = publish(paths.cache_dir() / "kernels" / backend / source.digest, write)
    import_spec = importlib.util.spec_from_file_location(name, folder / file_name)
    if import_spec is None or import_spec.loader is None:
        raise BuildError(f"cannot import {folder / file_name}")
    module = importlib.util.module_from_spec(import_spec)
    import_spec.loader.exec_module(module)
    return sys.modules.setdefault(name, module)
