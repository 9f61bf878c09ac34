"""One request from its prompt to its last token. Knows no batch, no cache and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.draft_length import acceptance_rate
from specattn_runtime.decoding.generation import RequestResult
from specattn_runtime.decoding.turn import Emitted, Turn

RECENT_ROUNDS = 16  # whose drafts tell how good the next ones are


@dataclass(slots=True)
class Request:
    """A request's progress. Its random numbers are its own, so that its text does not depend on its neighbours."""

    prompt: tuple[int, ...]
    spec: DecodeSpec
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    ended: bool = False
    stale: int = 0  # rounds since its drafts' keys were selected
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.spec.sampling.seed)

    @property
    def joined_rows(self) -> int:
        """Tokens at the end of the prompt that join a round; those before are only prefilled."""
        return min(len(self.prompt), self.spec.draft_len + 1)

    @property
    def most_keys(self) -> int:
        """Keys in the cache at its end: all but the last token's."""
        return len(self.prompt) + self.spec.max_new_tokens - 1

    @property
    def longest_draft(self) -> int:
        """Drafts its next round may make: a round emits one token more than it accepts, and none past the limit."""
        if not self.tokens or not self.spec.preset.drafts:
            return 0
        return min(self.spec.draft_len, self.spec.max_new_tokens - len(self.tokens) - 1)

    @property
    def acceptance_rate(self) -> float:
        return acceptance_rate(self.accepted[-RECENT_ROUNDS:], self.drafted[-RECENT_ROUNDS:])

    def turn(self, draft_len: int) -> Turn:
        """Its part in the next round, with at most longest_draft drafts."""
        refreshes = not self.tokens or self.stale + 1 >= self.spec.refresh_interval
        self.stale = 0 if refreshes else self.stale + 1
        count = 0 if self.spec.sampling.greedy else 2 * draft_len + 1
        return Turn(
            tokens=(self.tokens[-1],) if self.tokens else self.prompt[-self.joined_rows :],
            draft_len=draft_len,
            joins=not self.tokens,
            policy=self.spec.policy if refreshes else None,
            sampling=self.spec.sampling,
            uniforms=tuple(torch.rand(count, dtype=torch.float64, generator=self.generator).tolist()),
        )

    def take(self, emitted: Emitted) -> tuple[int, ...]:
        """Appends what a round emitted, up to and with the first stop token; returns what it appended."""
        if self.tokens:
            self.accepted.append(len(emitted.tokens) - 1)
            self.drafted.append(emitted.drafted)
        given = emitted.tokens[: _first_stop(emitted.tokens, self.spec.stop_tokens)]
        self.tokens += given
        self.margins += emitted.margins[: len(given)]
        self.ended = self.tokens[-1] in self.spec.stop_tokens or len(self.tokens) >= self.spec.max_new_tokens
        return tuple(given)

    def result(self) -> RequestResult:
        return RequestResult(
            tokens=tuple(self.tokens),
            margins=tuple(self.margins),
            accepted=tuple(self.accepted),
            drafted=tuple(self.drafted),
        )


def _first_stop(tokens: Sequence[int], stop_tokens: frozenset[int]) -> int | None:
    """Tokens up to and with the first stop token; None for all."""
    return next((i + 1 for i, token in enumerate(tokens) if token in stop_tokens), None)
