"""A pack's file: how much of one is believed at all, schema versions and their migrations, digest, unknown fields.

Knows JSON types only; pack.py makes objects of them. Fits of the cost model are believed by the same rules.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from specattn_codegen.digest import digest
from specattn_codegen.errors import PackError

SCHEMA_VERSION = 2
LICENCE = "Apache-2.0"  # of packs that name none: those of schema 1, and those this project's tuner makes

LARGEST_FILE = 32 * 2**20  # bytes; a thousand times what one HeadConfig's winners take
DEEPEST = 16  # levels of nesting; a pack has 6
LARGEST_NUMBER = 2**63
LONGEST_TEXT = 1000  # characters

LINE = 160  # characters that a value may take with its indentation before it is broken up

Plain = dict[str, object]


def printable(text: object) -> str:
    """Without what a terminal would obey: a file's name may be anything, too."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def one_line(error: Exception) -> str:
    """An error's text as one printable line, whatever a file put into it."""
    return printable(" ".join(str(error).split()))[:300]


def read_plain(path: Path) -> Plain:
    """A pack as JSON types of today's schema. Raises PackError in one line, and OSError for a file nobody can read."""
    return read_checked(path, "pack", _current)


def read_checked(path: Path, kind: str, check: Callable[[Plain], Plain]) -> Plain:
    """What `check`, which raises PackError, makes of a file's JSON object. Raises PackError in one line, and OSError.

    A folder, a pipe or a device is never opened.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise PackError(f"{path}: not a regular file")
    if status.st_size > LARGEST_FILE:
        raise PackError(f"{path}: {status.st_size} bytes; a {kind} has at most {LARGEST_FILE}")
    try:
        raw = msgspec.json.decode(path.read_bytes())
        if not isinstance(raw, dict):
            raise PackError("not a JSON object")
        return check(raw)
    except (ValueError, RecursionError, PackError) as error:
        raise PackError(f"{path}: not a {kind}, {one_line(error)}") from error


def _current(raw: Plain) -> Plain:
    version = raw.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= SCHEMA_VERSION:
        raise PackError(
            f"schema_version {str(version)[:20]} where this version reads 1 to {SCHEMA_VERSION}; "
            "update specattn-codegen, or tune again"
        )
    if version >= 2:
        require_own_digest(raw, "tune again")
    else:
        _require_tame(raw, DEEPEST)
    while version < SCHEMA_VERSION:
        raw = _MIGRATIONS[version](raw)
        version += 1
    return raw


def require_own_digest(raw: Plain, remedy: str) -> None:
    """Refuses an object that its writer did not leave so, and one that is not tame."""
    _require_tame(raw, DEEPEST)
    if raw.get("digest") != digest_of(raw):
        raise PackError(f"its digest is not that of its contents: edited by hand or damaged; {remedy}")


def _require_tame(value: object, depth: int) -> None:
    """Refuses what no pack holds and what could hurt those who print it or calculate with it."""
    if depth < 0:
        raise PackError(f"nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        for key, item in value.items():
            _require_tame(key, depth)
            _require_tame(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _require_tame(item, depth - 1)
    elif isinstance(value, str):
        if len(value) > LONGEST_TEXT or not value.isprintable():
            raise PackError(f"a text of {len(value)} characters is too long or not printable")
    elif isinstance(value, (int, float)) and not abs(value) < LARGEST_NUMBER:  # nor is NaN
        raise PackError(f"a number is not below {LARGEST_NUMBER}")


def _from_1(raw: Plain) -> Plain:
    """Schema 2 added a licence, a digest, what is covered, and the digest of the space an entry was found in."""
    return {**raw, "schema_version": 2, "licence": LICENCE}


_MIGRATIONS: dict[int, Callable[[Plain], Plain]] = {1: _from_1}


def digest_of(plain: Plain) -> str:
    """Of everything in a file but the digest itself."""
    return digest({name: value for name, value in plain.items() if name != "digest"})


def to_text(plain: Plain) -> str:
    """Sorted and indented, with its own digest."""
    return _indented({**plain, "digest": digest_of(plain)}, "") + "\n"


def write_whole(path: Path, text: str) -> None:
    """All or nothing; the folder is made where there is none. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def _indented(value: object, indent: str) -> str:
    """JSON in which a list or an object that has room on a line stands on it, or else each of its items does."""
    whole = json.dumps(value, sort_keys=True, allow_nan=False)
    if len(indent) + len(whole) <= LINE or not isinstance(value, (dict, list)):
        return whole
    deeper = indent + "  "
    if isinstance(value, dict):
        items = [f"{json.dumps(name)}: {_indented(value[name], deeper)}" for name in sorted(value)]
        return "{\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _indented(item, deeper) for item in value) + f"\n{indent}]"


def unknown_part(raw: object, known: object) -> object:
    """What `raw` has and `known` has not: fields of a version to come, nested as they were. None for nothing.

    Lists are compared item by item where they are equally long; their unknown parts are kept by position.
    """
    if isinstance(raw, dict) and isinstance(known, dict):
        own = {name: value for name, value in raw.items() if name not in known}
        deeper = {name: unknown_part(raw[name], known[name]) for name in raw if name in known}
        return own | {name: part for name, part in deeper.items() if part is not None} or None
    if isinstance(raw, list) and isinstance(known, list) and len(raw) == len(known):
        parts = {str(i): unknown_part(*pair) for i, pair in enumerate(zip(raw, known, strict=True))}
        return {position: part for position, part in parts.items() if part is not None} or None
    return None


def with_unknown(known: object, unknown: object) -> object:
    """The inverse of unknown_part: a known value with its unknown part put back."""
    if isinstance(known, dict) and isinstance(unknown, dict):
        merged = {name: with_unknown(known[name], part) for name, part in unknown.items() if name in known}
        return {**known, **{name: part for name, part in unknown.items() if name not in known}, **merged}
    if isinstance(known, list) and isinstance(unknown, dict):
        return [with_unknown(item, unknown.get(str(position))) for position, item in enumerate(known)]
    return known
