"""Python's own standard library as text, part of it held out. Knows files, words and functions; no model."""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Tests, other people's packages and tables that a program wrote.
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"})
HELD_OUT_SHARE = 1 / 12
END_OF_FILE = b"\0"
WORD = re.compile(rb"\b[a-z][a-z_]{3,11}\b")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts by their names, which are paths relative to the library."""

    names: tuple[str, ...]
    texts: tuple[bytes, ...]

    @cached_property
    def joined(self) -> bytes:
        return END_OF_FILE.join(self.texts)

    @cached_property
    def words(self) -> tuple[bytes, ...]:
        """Every lower-case word of 4 to 12 letters, once, sorted."""
        return tuple(sorted(set(WORD.findall(self.joined))))

    @cached_property
    def functions(self) -> tuple[bytes, ...]:
        """The sources of all functions and methods, or paragraphs where a text is no Python, shortest first."""
        found = {function for text in self.texts for function in functions_of(text) or text.split(b"\n\n")}
        return tuple(sorted(found, key=lambda source: (len(source), source)))

    def passage(self, rng: random.Random, length: int) -> bytes:
        """`length` bytes from anywhere."""
        start = rng.randrange(len(self.joined) - length)
        return self.joined[start : start + length]


def functions_of(text: bytes) -> list[bytes]:
    """Whole lines, from `def` to the last one. None of a file that another version of Python would parse."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    lines = text.splitlines(keepends=True)
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [b"".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]


def is_held_out(name: str) -> bool:
    """Decided by the name alone, so that it is the same file in every version of the library."""
    return hashlib.sha256(name.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def library() -> Path:
    """Where the running interpreter keeps its sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def names_in(folder: Path) -> list[str]:
    """Every source of a library that is worth reading, sorted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    return [name for name in names if not LEFT_OUT & set(name.split("/"))]


def read(folder: Path, names: Sequence[str]) -> Corpus:
    return Corpus(names=tuple(names), texts=tuple((folder / name).read_bytes() for name in names))
