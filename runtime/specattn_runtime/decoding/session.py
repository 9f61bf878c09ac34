"""Requests that come and go: who is in the batch, who waits for a place, and what each has got so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_runtime.cache.paged_cache import PagedCache
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.draft_length import RoundTiming, best_draft_lens, fit_costs
from specattn_runtime.decoding.draft_view import DraftView
from specattn_runtime.decoding.generation import RequestResult
from specattn_runtime.decoding.request import RECENT_ROUNDS, Request
from specattn_runtime.decoding.round import CausalModel, Decoder
from specattn_runtime.decoding.stopwatch import Stopwatch
from specattn_runtime.decoding.turn import Turn
from specattn_runtime.dispatch import DTYPE_NAMES, Kernels
from specattn_runtime.kernels_protocol import AttentionKernels


class LanguageModel(CausalModel, Protocol):
    """A model and what a session must know of it to serve it. heads are those of every layer's keys and values."""

    @property
    def heads(self) -> HeadConfig: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What one step gave one request; `ended` with its last tokens."""

    request: int
    tokens: tuple[int, ...]
    ended: bool


@dataclass(slots=True, kw_only=True)
class Session:
    """A batch of changing requests over one paged cache.

    A request waits while the batch or the cache is full, first come first served, and joins at the start of a step.
    Whoever is in has pages for the longest text it may get, so that nobody is ever thrown out. No two requests need
    have anything in common but the preset.

    share_prefixes  a prompt that begins like a text in the batch uses that text's pages instead of its own. Saves time
                    and memory; the rounding of its keys then depends on who else is there
    rounds          passes over the whole cache
    shares          selected keys over prefix keys, a round with drafts to come
    """

    model: LanguageModel
    decoder: Decoder
    cache: PagedCache
    spec: DecodeSpec
    places: list[int | None]
    share_prefixes: bool = False
    rounds: int = 0
    shares: list[float] = field(default_factory=list)
    _requests: list[Request] = field(default_factory=list)
    _waiting: deque[int] = field(default_factory=deque)
    _timings: deque[RoundTiming] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS))
    _view: DraftView | None = None

    def add_request(self, prompt: Sequence[int], spec: DecodeSpec | None = None) -> int:
        """Queues a prompt of token ids; returns the request's number.

        spec, by default the session's, may differ from it in everything but preset, page size and adaptive. Raises
        SpecError for what could never be served.
        """
        spec = self.spec if spec is None else spec
        require_servable(self.model, prompt, spec, f"prompt {len(self._requests)}")
        if (spec.preset, spec.page_size) != (self.spec.preset, self.spec.page_size):
            raise SpecError(
                f"preset={spec.preset.name}, page_size={spec.page_size}: one session has one of each, "
                f"{self.spec.preset.name} and {self.spec.page_size}; open another session"
            )
        request = Request(tuple(prompt), spec)
        if self._pages(request) > self.cache.num_pages:
            raise SpecError(
                f"prompt {len(self._requests)}: {len(prompt)} tokens and {spec.max_new_tokens} new ones need "
                f"{self._pages(request)} pages of {self.cache.page_size} keys and the whole KV cache has "
                f"{self.cache.num_pages}; use more pages, a shorter prompt or fewer new tokens"
            )
        self._requests.append(request)
        self._waiting.append(len(self._requests) - 1)
        return len(self._requests) - 1

    @property
    def waiting(self) -> tuple[int, ...]:
        """Requests without a place, the next to get one first."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[int, ...]:
        return tuple(number for number in self.places if number is not None)

    @property
    def total(self) -> int:
        """Requests so far, ended ones included; they are numbered from 0."""
        return len(self._requests)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """One round for everybody in the batch, those that join it now included."""
        self._admit()
        lengths = self._draft_lens()
        turns = [None if number is None else self._requests[number].turn(lengths[number]) for number in self.places]
        progress = [each for group in self._groups(turns) for each in self._round(group)]
        if self._view is not None and self.running:
            self.shares.append(self._selected_share(self._view))
        return progress

    def _groups(self, turns: Sequence[Turn | None]) -> list[list[Turn | None]]:
        """Turns that share a pass. Prompts that join have no references to be scored by, and would take the others'
        with them: they go first, so that nobody's scores depend on who else is there."""
        sides = (True, False) if self.spec.preset.uses_references else (None,)
        groups = [[turn if turn and side in (None, turn.joins) else None for turn in turns] for side in sides]
        return [group for group in groups if any(group)]

    def _draft_lens(self) -> dict[int, int]:
        """Drafts of every running request's next round, by the request's number."""
        running = [self._requests[number] for number in self.running]
        longest = [request.longest_draft for request in running]
        if self.spec.adaptive and self._timings:
            rates = [request.acceptance_rate for request in running]
            longest = best_draft_lens(fit_costs(self._timings), rates, longest)
        return dict(zip(self.running, longest, strict=True))

    def _round(self, turns: Sequence[Turn | None]) -> list[Progress]:
        phases, before = self.decoder.stopwatch.phases, dict(self.decoder.stopwatch.phases)
        emitted, self._view = self.decoder.round(turns, self._view)
        self.rounds += 1
        present = [turn for turn in turns if turn]
        if not any(turn.joins for turn in present):
            spent = {name: seconds - before.get(name, 0.0) for name, seconds in phases.items()}
            timing = RoundTiming(
                steps=max(turn.draft_len for turn in present),
                rows=sum(turn.rows for turn in present),
                draft_seconds=spent["draft"],
                verify_seconds=spent["verify"] + spent["select"],
            )
            self._timings.append(timing)
        progress = []
        for place, given in enumerate(emitted):
            if given is not None:
                number = self._at(place)
                tokens = self._requests[number].take(given)
                progress.append(Progress(request=number, tokens=tokens, ended=self._requests[number].ended))
                if self._requests[number].ended:
                    self._leave(place)
        return progress

    def cancel(self, request: int) -> None:
        """Ends a request that has not ended yet; it keeps the tokens it has."""
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self.places:
            self._leave(self.places.index(request))
        self._requests[request].ended = True

    def result(self, request: int) -> RequestResult:
        """What a request has got, now or in the end."""
        return self._requests[request].result()

    def _selected_share(self, view: DraftView) -> float:
        """Selected keys over prefix keys; of pages, which each draft step selects for itself, their budgets'."""
        if view.selections:
            return view.selected_share
        held = [
            (self._requests[number].spec.policy.budget(prefix), prefix)
            for number, prefix in zip(self.places, view.tail_start.tolist(), strict=True)
            if number is not None
        ]
        selected = sum(min(self.cache.pages_for(budget) * self.cache.page_size, prefix) for budget, prefix in held)
        return selected / max(1, sum(prefix for _, prefix in held))

    def _admit(self) -> None:
        """Gives places to those who wait, in their order, and prefills their prompts up to what joins the round."""
        for place in [place for place, number in enumerate(self.places) if number is None]:
            if not self._waiting:
                return
            request = self._requests[self._waiting[0]]
            prefilled = request.prompt[: len(request.prompt) - request.joined_rows]
            source, shared = self._longest_shared(prefilled)
            if self._pages(request) - shared // self.cache.page_size > self._unpromised_pages():
                return
            self.places[place] = self._waiting.popleft()
            self.cache.fork(source, place, shared)
            self.decoder.prefill(place, prefilled[shared:])

    def _longest_shared(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The place whose cached text has the most tokens at its start in common with a prompt, and how many."""
        found = [(0, 0)]
        for place, number in enumerate(self.places if self.share_prefixes else []):
            if number is not None:
                request = self._requests[number]
                cached = [*request.prompt, *request.tokens][: self.cache.lengths[place]]
                pairs = enumerate(zip(cached, prompt, strict=False))
                parted = next((index for index, (one, other) in pairs if one != other), min(len(cached), len(prompt)))
                found.append((place, parted))
        return max(found, key=lambda pair: pair[1])

    def _unpromised_pages(self) -> int:
        """Free pages that nobody in the batch may come to need, to grow or to have a shared page to itself."""
        promised = sum(
            self._pages(self._requests[number]) - len(self.cache.pages(place)) + self.share_prefixes
            for place, number in enumerate(self.places)
            if number is not None
        )
        return self.cache.free_pages - promised

    def _pages(self, request: Request) -> int:
        return self.cache.pages_for(request.most_keys)

    def _at(self, place: int) -> int:
        number = self.places[place]
        assert number is not None
        return number

    def _leave(self, place: int) -> None:
        self.cache.free(place)
        self.places[place] = None


def open_session(
    model: LanguageModel,
    kernels: AttentionKernels | Sequence[AttentionKernels],
    spec: DecodeSpec,
    *,
    max_requests: int,
    num_pages: int,
    share_prefixes: bool = False,
    clock: Callable[[], float] | None = None,
) -> Session:
    """A session without requests, over a new cache.

    kernels         for every layer, or one set a layer, all for the model's dtype and device and spec.page_size
    max_requests    in the batch at a time; more wait
    num_pages       of the cache, shared by all
    share_prefixes  see Session
    """
    if max_requests < 1:
        raise SpecError(f"max_requests={max_requests}: must be at least 1")
    per_layer = tuple(kernels) if isinstance(kernels, Sequence) else (kernels,) * model.num_layers
    if len(per_layer) != model.num_layers:
        raise SpecError(f"kernels: {len(per_layer)} sets for {model.num_layers} layers; give one, or one a layer")
    for each in per_layer:
        if isinstance(each, Kernels):
            _require_loaded_for(each, model, spec)
    cache = PagedCache(
        model.heads,
        layers=model.num_layers,
        num_pages=num_pages,
        page_size=spec.page_size,
        batch=max_requests,
        dtype=model.dtype,
        device=model.device,
        page_bounds=spec.preset.uses_page_bounds and spec.preset.drafts,
    )
    decoder = Decoder(
        model=model,
        kernels=per_layer,
        cache=cache,
        preset=spec.preset,
        stopwatch=Stopwatch() if clock is None else Stopwatch(clock),
    )
    places: list[int | None] = [None] * max_requests
    return Session(model=model, decoder=decoder, cache=cache, spec=spec, places=places, share_prefixes=share_prefixes)


def _require_loaded_for(kernels: Kernels, model: LanguageModel, spec: DecodeSpec) -> None:
    """Raises SpecError where kernels were loaded for something else than they are to serve."""
    loaded = {"dtype": kernels.dtype, "device": kernels.device.type, "page_size": kernels.page_size}
    wanted = {
        "dtype": DTYPE_NAMES.get(model.dtype, str(model.dtype)),
        "device": model.device.type,
        "page_size": spec.page_size,
    }
    for name in ("num_q_heads", "num_kv_heads", "head_dim", "v_head_dim"):
        loaded[name], wanted[name] = getattr(kernels.heads, name), getattr(model.heads, name)
    for name, value in wanted.items():
        if loaded[name] != value:
            raise SpecError(
                f"{name}={value}: the kernels were loaded for {name}={loaded[name]}; load_kernels for what the model "
                "and the DecodeSpec have"
            )


def require_servable(model: LanguageModel, prompt: Sequence[int], spec: DecodeSpec, name: str) -> None:
    """Raises SpecError, naming the prompt, where it is empty, outside the vocabulary or too long for the model."""
    if not prompt:
        raise SpecError(f"{name}: empty; give at least one token to continue from")
    if len(prompt) + spec.max_new_tokens > model.max_positions:
        raise SpecError(
            f"{name}: {len(prompt)} tokens and {spec.max_new_tokens} new ones exceed the model's "
            f"{model.max_positions} positions; shorten the prompt or ask for fewer"
        )
    wild = next((token for token in prompt if not 0 <= token < model.vocab_size), None)
    if wild is not None:
        raise SpecError(f"{name}: token {wild} is outside the model's vocabulary of {model.vocab_size}")
