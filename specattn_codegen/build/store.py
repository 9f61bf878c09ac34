"""Content-addressed folders: made in a temporary place, then renamed, so a half-written one cannot be seen."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from specattn_codegen.errors import CacheError

RESULT = "result.json"

Result = TypeVar("Result")

logger = logging.getLogger("specattn")


def publish(destination: Path, write: Callable[[Path], None]) -> Path:
    """Fills `destination` by calling `write` on a fresh sibling folder. Whoever renames first wins; results are equal.

    Where the cache takes nothing, as on a full or read-only disk, the folder is made for this process alone, in the
    system's temporary place, with one warning. Raises CacheError when neither can be written; what `write` raises
    passes through.
    """
    try:
        return _publish(destination, write)
    except OSError as error:
        _warn_once(destination.parent, error.strerror or str(error))
    try:
        return _publish(own_folder() / destination.name, write)
    except OSError as error:
        raise CacheError(
            f"cannot write the kernel cache {destination.parent}, nor a temporary folder: {error.strerror or error}; "
            "free some space or set SPECATTN_CACHE_DIR to a writable folder"
        ) from error


def remembered(kept: Path, kind: type[Result], make: Callable[[], Result]) -> Result:
    """A result that is kept as JSON in the folder `kept`, made first where there is none."""
    if kept.is_dir():
        return msgspec.json.decode((kept / RESULT).read_bytes(), type=kind)
    result = make()

    def write(folder: Path) -> None:
        (folder / RESULT).write_bytes(msgspec.json.encode(result))

    publish(kept, write)
    return result


def _publish(destination: Path, write: Callable[[Path], None]) -> Path:
    if destination.is_dir():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        write(scratch)
        scratch.chmod(0o755)
        os.rename(scratch, destination)
    except OSError:
        if not destination.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return destination


@functools.cache
def own_folder() -> Path:
    """For what this process builds and cannot keep."""
    folder = tempfile.mkdtemp(prefix="specattn-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _warn_once(folder: Path, reason: str) -> None:
    logger.warning(
        "%s: the kernel cache cannot be written (%s); what is built serves this process alone. Free some space, or set "
        "SPECATTN_CACHE_DIR to a writable folder.",
        folder,
        reason,
    )
