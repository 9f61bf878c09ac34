"""Texts whose continuation lies far back: tables looked up, names used, functions repeated with edits."""

from __future__ import annotations

import bisect
import keyword
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from specattn_bench.corpus import Corpus

LETTERS = string.ascii_lowercase + string.digits
# Of the bytes before the first use, what definitions take; the rest is ordinary text.
DEFINED_SHARE = (0.2, 0.6)
IDENTIFIER = re.compile(rb"\b[a-z_]{4,}\b")
NOT_RENAMED = {name.encode() for name in (*keyword.kwlist, "self", "super", "print")}
ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """text[start:stop] stands at `source` already."""

    start: int
    stop: int
    source: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """Definitions and ordinary text, then from byte `uses` on what can only be known from the definitions."""

    text: bytes
    uses: int
    answers: tuple[Answer, ...]


@dataclass(slots=True)
class Writer:
    text: bytearray = field(default_factory=bytearray)
    answers: list[Answer] = field(default_factory=list)

    def say(self, said: bytes) -> int:
        """Where it stands."""
        start = len(self.text)
        self.text += said
        return start

    def recall(self, said: bytes, source: int) -> None:
        start = self.say(said)
        self.answers.append(Answer(start=start, stop=len(self.text), source=source))

    def episode(self, uses: int, length: int) -> Episode:
        """Cut to `length` bytes."""
        kept = tuple(answer for answer in self.answers if answer.stop <= length)
        return Episode(text=bytes(self.text[:length]), uses=uses, answers=kept)


Kind = Callable[[random.Random, Corpus, int, int], Episode]


def lookups(rng: random.Random, corpus: Corpus, reach: int, length: int) -> Episode:
    """A table and ordinary text, `reach` bytes, then the entries in another order, up to `length` bytes."""
    writer = Writer()
    table = _capitals(rng, corpus)
    room = round(reach * rng.uniform(*DEFINED_SHARE))
    writer.say(table + b" = {\n")
    entries: list[tuple[bytes, bytes, int]] = []
    while len(writer.text) < room or not entries:
        key, value = rng.choice(corpus.words), _value(rng)
        writer.say(b"    '" + key + b"': '")
        entries.append((key, value, writer.say(value)))
        writer.say(b"',\n")
    writer.say(b"}\n\n")
    uses = _fill(writer, rng, corpus, reach)
    for key, value, source in _shuffled_forever(rng, list({entry[0]: entry for entry in entries}.values())):
        if len(writer.text) >= length:
            break
        writer.say(b"\nassert " + table + b"['" + key + b"'] == '")
        writer.recall(value, source)
        writer.say(b"'")
    return writer.episode(uses, length)


def names(rng: random.Random, corpus: Corpus, reach: int, length: int) -> Episode:
    """Constants strewn over `reach` bytes of ordinary text, then each of them checked, up to `length` bytes."""
    writer = Writer()
    constants: list[tuple[bytes, bytes, int]] = []
    uses = 0
    spacing = rng.randint(40, 160)
    while len(writer.text) < reach or not constants:
        name, value = _capitals(rng, corpus), _value(rng)
        if len(writer.text) + len(name) + len(value) + 8 < reach or not constants:
            writer.say(b"\n" + name + b" = '")
            constants.append((name, value, writer.say(value)))
            writer.say(b"'\n")
        uses = _fill(writer, rng, corpus, min(reach, len(writer.text) + spacing))
    for name, value, source in _shuffled_forever(rng, constants):
        if len(writer.text) >= length:
            break
        writer.say(b"\ncheck(" + name + b", '")
        writer.recall(value, source)
        writer.say(b"')")
    return writer.episode(uses, length)


def repeats(rng: random.Random, corpus: Corpus, reach: int, length: int) -> Episode:
    """Functions and ordinary text, `reach` bytes, then the functions in another order, some of their names changed."""
    writer = Writer()
    room = round(reach * rng.uniform(*DEFINED_SHARE))
    functions: list[tuple[bytes, int]] = []
    while len(writer.text) < room:
        fitting = bisect.bisect_right(corpus.functions, room - len(writer.text), key=len)
        function = corpus.functions[rng.randrange(max(fitting, 1))]
        functions.append((function, writer.say(function)))
        writer.say(b"\n")
    uses = _fill(writer, rng, corpus, reach)
    for function, source in _shuffled_forever(rng, functions):
        if len(writer.text) >= length:
            break
        writer.say(b"\n")
        _repeat_edited(writer, rng, corpus, function, source)
    return writer.episode(uses, length)


KINDS: dict[str, Kind] = {"lookups": lookups, "names": names, "repeats": repeats}


def _repeat_edited(writer: Writer, rng: random.Random, corpus: Corpus, function: bytes, source: int) -> None:
    """The function with up to three of its names changed throughout."""
    known = sorted(set(IDENTIFIER.findall(function)) - NOT_RENAMED)
    renamed = {old: rng.choice(corpus.words) for old in rng.sample(known, min(len(known), rng.randint(0, 3)))}
    done = 0
    for found in IDENTIFIER.finditer(function):
        if found.group() in renamed:
            if done < found.start():
                writer.recall(function[done : found.start()], source + done)
            writer.say(renamed[found.group()])
            done = found.end()
    writer.recall(function[done:], source + done)


def _capitals(rng: random.Random, corpus: Corpus) -> bytes:
    return b"_".join(rng.sample(corpus.words, 2)).upper()


def _value(rng: random.Random) -> bytes:
    return "".join(rng.choices(LETTERS, k=rng.randint(4, 10))).encode()


def _fill(writer: Writer, rng: random.Random, corpus: Corpus, end: int) -> int:
    """Ordinary text up to byte `end`, where it is not reached yet. How far the text reaches then."""
    writer.say(corpus.passage(rng, max(0, end - len(writer.text))))
    return len(writer.text)


def _shuffled_forever(rng: random.Random, items: list[ItemT]) -> Iterator[ItemT]:
    """All of them in a new order, again and again."""
    while True:
        yield from rng.sample(items, len(items))
