"""Content-addressed folders: made in a temporary place, then renamed, so a half-written one cannot be seen."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from specattn_codegen.errors import BuildError


def publish(destination: Path, write: Callable[[Path], None]) -> Path:
    """Fills `destination` by calling `write` on a fresh sibling folder. Whoever renames first wins; results are equal.

    Raises BuildError when the cache cannot be written; what `write` raises passes through.
    """
    if destination.is_dir():
        return destination
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    except OSError as error:
        raise BuildError(
            f"cannot write the kernel cache {destination.parent}: {error.strerror}; "
            "free some space or set SPECATTN_CACHE_DIR to a writable folder"
        ) from error
    try:
        write(scratch)
        scratch.chmod(0o755)
        os.rename(scratch, destination)
    except OSError as error:
        if not destination.is_dir():
            raise BuildError(
                f"cannot write the kernel cache {destination}: {error.strerror or error}; "
                "free some space or set SPECATTN_CACHE_DIR to a writable folder"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return destination
