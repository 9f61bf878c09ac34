"""Rounds of every preset and dense steps, in turns with whatever else continues the same cached prompts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from specattn_bench.throughput_models import PAGE_SIZE, SEED, Prompts
from specattn_codegen.errors import SpecError
from specattn_codegen.spec import Dtype
from specattn_runtime.cache.paged_cache import PagedCache
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.draft_length import expected_tokens
from specattn_runtime.decoding.draft_view import DraftView
from specattn_runtime.decoding.generation import RequestResult
from specattn_runtime.decoding.request import Request
from specattn_runtime.decoding.round import Decoder, Drafted, Turns, Verified
from specattn_runtime.decoding.stopwatch import Stopwatch
from specattn_runtime.decoding.turn import Emitted
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.model.llama import Llama

ROUNDS = 6  # of a preset, before the next one has its turn
LEAST_TURNS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A batch of prompts of `context` tokens each."""

    model: str
    heads: str
    dtype: Dtype
    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.dtype}, {self.batch} x {self.context}"

    def facts(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("model", "heads", "dtype", "batch", "context")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A round, or a step of one token a request. tokens: emitted, a request; phases: its seconds by phase."""

    seconds: float
    tokens: float
    phases: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """One turn of a contender: its steps, what kind of text each request continued, and what it got, its first token
    included."""

    steps: list[Step]
    kinds: list[str]
    results: list[RequestResult]


class Contender(Protocol):
    @property
    def name(self) -> str: ...

    def play(self, chosen: Sequence[int], steps: int | None = None) -> Played:
        """Continues the prompts of these numbers, by a turn's steps or by fewer."""
        ...


class PromptCache:
    """A cache that holds prompts but for their last rows, which join the first round."""

    def __init__(self, llama: Llama, prompts: Prompts, batch: int, room: int, *, page_bounds: bool) -> None:
        """room: tokens that requests may add to their prompts."""
        pages = batch * -(-(len(prompts.tokens[0]) + room) // PAGE_SIZE)
        self.cache = PagedCache(
            llama.heads,
            layers=llama.num_layers,
            num_pages=pages,
            page_size=PAGE_SIZE,
            batch=batch,
            dtype=llama.dtype,
            page_bounds=page_bounds,
        )
        self._prompts, self._held = prompts, [-1] * batch

    def hold(self, chosen: Sequence[int], joined: int) -> None:
        """The beginnings of the prompts chosen for each place, without their last `joined` tokens."""
        length = len(self._prompts.tokens[0])
        if list(chosen) != self._held:
            for place in range(len(chosen)):
                self.cache.free(place)
            rows = self.cache.extend([length] * len(chosen))
            for layer in range(len(self.cache.keys)):
                keys, values = (
                    torch.cat([part[prompt][layer] for prompt in chosen])
                    for part in (self._prompts.keys, self._prompts.values)
                )
                self.cache.write(layer, rows.slots, keys, values)
            self._held = list(chosen)
        for place in range(len(chosen)):
            self.cache.rewind(place, length - joined)


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Each draft whose predecessors hold does so at `rate`, whatever it says."""

    rate: float
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    def held(self, drafts: int) -> int:
        holds = torch.rand(drafts, generator=self.generator) < self.rate
        return int(holds.long().cumprod(dim=0).sum())


def law_of(accepted: float, draft_len: int) -> Law:
    """The law under which `accepted` of draft_len drafts hold on average. Raises SpecError where none does."""
    if not 0.0 <= accepted <= draft_len:
        raise SpecError(f"--accepted {accepted:g}: must be 0 to {draft_len}, the drafts of a round; see --draft-len")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, draft_len) - 1 < accepted else (low, middle)
    return Law(rate=1.0 if accepted == draft_len else (low + high) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenAcceptance(Decoder):
    """Does a round's whole work, and then lets as many drafts hold as a law says, not as many as did."""

    law: Law

    def accept(self, turns: Turns, drafted: Drafted, verified: Verified) -> list[Emitted | None]:
        found = Decoder.accept(self, turns, drafted, verified)
        return [given and self._instead(given, row) for given, row in zip(found, drafted.tokens.tolist(), strict=True)]

    def _instead(self, given: Emitted, row: list[int]) -> Emitted:
        held = self.law.held(given.drafted)
        tokens = [*row[1 : 1 + held], given.tokens[-1]]
        return Emitted(tokens=tokens, margins=[0.0] * len(tokens), drafted=given.drafted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """One preset's rounds, or dense steps, as a session runs them."""

    name: str
    decoder: Decoder
    spec: DecodeSpec
    prompts: Prompts
    held: PromptCache
    steps: int

    @torch.inference_mode()
    def play(self, chosen: Sequence[int], steps: int | None = None) -> Played:
        requests = [Request(tuple(self.prompts.tokens[prompt]), self.spec) for prompt in chosen]
        self.held.hold(chosen, requests[0].joined_rows)
        _, view = self._step(requests, None)
        found: list[Step] = []
        for _ in range(self.steps if steps is None else steps):
            step, view = self._step(requests, view)
            found.append(step)
        kinds = [self.prompts.kinds[prompt] for prompt in chosen]
        return Played(steps=found, kinds=kinds, results=[request.result() for request in requests])

    def _step(self, requests: Sequence[Request], view: DraftView | None) -> tuple[Step, DraftView | None]:
        self.decoder.stopwatch.restart()
        started = time.perf_counter()
        turns = [request.turn(request.longest_draft) for request in requests]
        emitted, view = self.decoder.round(turns, view)
        given = [request.take(each) for request, each in zip(requests, emitted, strict=True) if each]
        seconds = time.perf_counter() - started
        tokens = sum(map(len, given)) / len(given)
        return Step(seconds=seconds, tokens=tokens, phases=dict(self.decoder.stopwatch.phases)), view


def decodings(
    llama: Llama, kernels: AttentionKernels, prompts: Prompts, specs: Sequence[DecodeSpec], batch: int, law: Law | None
) -> list[Decoding]:
    """One for each spec; those that need no bounds of pages share a cache."""
    room = specs[0].max_new_tokens
    caches: dict[bool, PromptCache] = {}
    found: list[Decoding] = []
    for spec in specs:
        bounded = spec.preset.uses_page_bounds and spec.preset.drafts
        if bounded not in caches:
            caches[bounded] = PromptCache(llama, prompts, batch, room, page_bounds=bounded)
        held = caches[bounded]
        parts: dict[str, Any] = {
            "model": llama,
            "kernels": (kernels,) * llama.num_layers,
            "cache": held.cache,
            "preset": spec.preset,
            "stopwatch": Stopwatch(),
        }
        drafts = spec.preset.drafts
        decoder = GivenAcceptance(**parts, law=law) if law and drafts else Decoder(**parts)
        found.append(
            Decoding(
                name=spec.preset.name,
                decoder=decoder,
                spec=spec,
                prompts=prompts,
                held=held,
                steps=ROUNDS if drafts else spec.max_new_tokens // 2,
            )
        )
    return found


def play_in_turns(
    contenders: Sequence[Contender],
    prompts: int,
    batch: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[Played]]:
    """Every contender's turns, by its name. A batch smaller than the prompts takes others of them at each turn.

    seconds: for all contenders together, and more where LEAST_TURNS turns of each take longer."""
    for contender in contenders:
        contender.play(_chosen(0, prompts, batch), 1)
    played: dict[str, list[Played]] = {contender.name: [] for contender in contenders}
    end = clock() + seconds
    for turn in itertools.count():
        if turn >= LEAST_TURNS and clock() >= end:
            return played
        for contender in contenders:
            played[contender.name].append(contender.play(_chosen(turn, prompts, batch)))
    raise AssertionError("turns do not end by themselves")


def _chosen(turn: int, prompts: int, batch: int) -> list[int]:
    first = turn * batch % prompts if batch < prompts else 0
    return [(first + place) % prompts for place in range(batch)]
