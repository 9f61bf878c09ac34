"""The passages that acceptance is measured on: ordinary text, and text whose continuation lies far back."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from specattn_bench.corpus import Corpus
from specattn_bench.episodes import KINDS, Episode
from specattn_codegen.errors import SpecError
from specattn_runtime.model.tokens import TokenCodec

PLAIN, LONG_RANGE = SETS = ("plain", "long-range")
# What a byte of an episode is: the first of an answer that lies far back, another of it, or none of one.
PLACES = ("start", "inside", "other")
# A prompt already has some of an episode's uses, so that it is clear what goes on: an eighth, and no more than this.
MOST_USED = 256
SAMPLE = 1 << 16
SPARE = 1.3  # bytes taken beyond what a mean token would need


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A prompt of about `context` tokens, and as many tokens after it as are decoded.

    places: what each of these is, one of PLACES; nothing where a token is more than a byte.
    """

    text_set: str
    kind: str
    context: int
    prompt: list[int]
    following: list[int]
    places: Sequence[str] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.prompt, self.following)).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Where passages come from."""

    corpus: Corpus
    codec: TokenCodec
    seed: int

    @property
    def bytes_a_token(self) -> float:
        sample = self.corpus.joined[:SAMPLE]
        return len(sample) / len(self.codec.encode(sample))

    def passages(self, text_set: str, context: int, decoded: int, count: int) -> list[Passage]:
        """`count` of one set, the kinds of episodes in turn. Raises SpecError where the text is too short."""
        make = self._plain if text_set == PLAIN else self._long_range
        found = [make(context, decoded, number) for number in range(count)]
        short = next((one for one in found if len(one.following) < decoded or len(one.prompt) < context // 2), None)
        if short is not None:
            raise SpecError(f"--text: too short for {context} tokens and {decoded} after them; give more text")
        return found

    def _plain(self, context: int, decoded: int, number: int) -> Passage:
        rng = random.Random(f"{self.seed} {PLAIN} {context} {number}")
        needed = math.ceil(SPARE * self.bytes_a_token * (context + decoded))
        if needed >= len(self.corpus.joined):
            raise SpecError(f"--text: {len(self.corpus.joined)} bytes, and a passage takes {needed}; give more text")
        tokens = self.codec.encode(self.corpus.passage(rng, needed))
        return Passage(
            text_set=PLAIN,
            kind=PLAIN,
            context=context,
            prompt=tokens[:context],
            following=tokens[context : context + decoded],
        )

    def _long_range(self, context: int, decoded: int, number: int) -> Passage:
        """An episode cut in two at `context`, so that both its definitions and its uses are there."""
        kind = list(KINDS)[number % len(KINDS)]
        rng = random.Random(f"{self.seed} {kind} {context} {number}")
        cut = round(self.bytes_a_token * context)
        reach = cut - min(MOST_USED, cut // 8)
        length = cut + math.ceil(SPARE * self.bytes_a_token * decoded)
        episode = KINDS[kind](rng, self.corpus, reach, length)
        text, following = episode.text, self.codec.encode(episode.text[cut:])
        return Passage(
            text_set=LONG_RANGE,
            kind=kind,
            context=context,
            prompt=self.codec.encode(text[:cut])[:context],
            following=following[:decoded],
            places=places(episode)[cut : cut + decoded] if len(following) == len(text) - cut else (),
        )


def places(episode: Episode) -> list[str]:
    """Of every byte."""
    found = [PLACES[2]] * len(episode.text)
    for answer in episode.answers:
        found[answer.start : answer.stop] = [PLACES[0], *[PLACES[1]] * (answer.stop - answer.start - 1)]
    return found


def require_room(passages: Sequence[Passage], max_positions: int) -> None:
    longest = max(len(one.prompt) + len(one.following) for one in passages)
    if longest > max_positions:
        raise SpecError(
            f"--context: with the tokens after it {longest} exceed the model's {max_positions} positions; use a "
            "smaller one or fewer --rounds"
        )
