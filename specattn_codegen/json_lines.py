"""Files of one JSON value a line, append only: a crash or a full disk loses at most the line being written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from specattn_codegen.digest import canonical_json

Value = TypeVar("Value")


def read(path: Path, kind: type[Value]) -> list[Value]:
    """Every whole line, oldest first; none without a file. One cut short, or of another version, is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [found for line in lines if (found := decode(line, kind)) is not None]


def decode(line: bytes, kind: type[Value]) -> Value | None:
    """One line's value; None for a line that is no such value."""
    try:
        return msgspec.json.decode(line, type=kind)
    except (ValueError, RecursionError, OverflowError):
        return None


def append(path: Path, value: object) -> None:
    """One write of one line, so that writers do not mix. A torn last line is closed first. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        line = (b"\n" if torn else b"") + canonical_json(value).encode() + b"\n"
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)
