"""Lossless self-speculative decoding of a batch of prompts, from checked arguments to tokens and statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from specattn_codegen.errors import SpecError
from specattn_runtime.generation import Generation, RequestResult
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.llama import Llama
from specattn_runtime.paged_cache import PagedCache
from specattn_runtime.presets import Preset
from specattn_runtime.round import Decoder, DraftView, Emitted
from specattn_runtime.stopwatch import Stopwatch


@dataclass(slots=True)
class _Request:
    """A request's progress."""

    limit: int
    stop_tokens: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, tokens: Sequence[int], margins: Sequence[float]) -> None:
        """Appends emitted tokens, up to and with the first stop token."""
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_tokens), None)
        self.tokens += tokens[:stop]
        self.margins += margins[:stop]
        self.ended = stop is not None or len(self.tokens) >= self.limit

    def take_round(self, emitted: Emitted) -> None:
        self.take(emitted.tokens, emitted.margins)
        self.accepted.append(len(emitted.tokens) - 1)
        self.drafted.append(emitted.drafted)

    def draft_len(self, wanted: int) -> int:
        """A round emits one token more than it accepts, and none past the limit."""
        return 0 if self.ended else min(wanted, self.limit - len(self.tokens) - 1)

    def result(self) -> RequestResult:
        return RequestResult(
            tokens=tuple(self.tokens),
            margins=tuple(self.margins),
            accepted=tuple(self.accepted),
            drafted=tuple(self.drafted),
        )


@torch.inference_mode()
def generate(
    model: Llama,
    kernels: AttentionKernels,
    prompts: Sequence[Sequence[int]],
    *,
    preset: Preset,
    draft_len: int,
    budget: float,
    max_new_tokens: int,
    page_size: int = 16,
    stop_tokens: frozenset[int] = frozenset(),
    clock: Callable[[], float] = time.perf_counter,
) -> Generation:
    """Greedy continuations of `prompts` (token ids), the same as dense decoding's, `draft_len` drafts a round.

    `budget` is the share of the prefix's keys that drafts read. Each request gets exactly `max_new_tokens` tokens, or
    ends with the first of `stop_tokens`. A preset without drafts decodes one token a pass and uses `draft_len` only to
    split the prefill as the speculative run does. Raises SpecError before any work for arguments that cannot be served.
    """
    _require_servable(model, prompts, draft_len, max_new_tokens)
    pages = sum(-(-(len(prompt) + max_new_tokens) // page_size) for prompt in prompts) if page_size > 0 else 1
    decoder = Decoder(
        model=model,
        kernels=kernels,
        cache=PagedCache(
            model.config.heads,
            layers=model.config.num_layers,
            num_pages=pages,
            page_size=page_size,
            batch=len(prompts),
            dtype=model.dtype,
            device=model.device,
        ),
        preset=preset,
        policy=preset.policy(budget),
        stopwatch=Stopwatch(clock),
    )
    return _decode(decoder, prompts, draft_len, [_Request(max_new_tokens, stop_tokens) for _ in prompts])


def _decode(decoder: Decoder, prompts: Sequence[Sequence[int]], draft_len: int, requests: list[_Request]) -> Generation:
    cache, stopwatch = decoder.cache, decoder.stopwatch
    verified = decoder.prefill(prompts, draft_len + 1)
    for request, prompt, tokens, margins in zip(
        requests, prompts, verified.targets.tolist(), verified.margins.tolist(), strict=True
    ):
        last = min(len(prompt), draft_len + 1) - 1
        request.take(tokens[last : last + 1], margins[last : last + 1])
    prefill_seconds, full_passes, shares, view = stopwatch.restart(), 1, list[float](), verified.view
    while not all(request.ended for request in requests):
        for index, request in enumerate(requests):
            if request.ended:
                cache.free(index)
        if view is not None:
            shares.append(_selected_share(view))
        wanted = 0 if view is None else draft_len
        alive = [not request.ended for request in requests]
        newest = [request.tokens[-1] for request in requests]
        emitted, view = decoder.round(newest, [request.draft_len(wanted) for request in requests], alive, view)
        full_passes += 1
        for request, round_ in zip(requests, emitted, strict=True):
            if not request.ended:
                request.take_round(round_)
    decode_seconds = stopwatch.elapsed
    phases = {name: stopwatch.phases.get(name, 0.0) for name in ("draft", "verify", "select")}
    return Generation(
        requests=tuple(request.result() for request in requests),
        full_passes=full_passes,
        selected_share=sum(shares) / len(shares) if shares else 1.0,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        phases={**phases, "other": decode_seconds - sum(phases.values())},
    )


def _selected_share(view: DraftView) -> float:
    """Selected keys over prefix keys, mean over layers, heads and requests."""
    selected = torch.stack([selection.counts.float().mean() for selection in view.selections]).mean()
    return (selected / view.tail_start.float().mean().clamp_min(1.0)).item()


def _require_servable(model: Llama, prompts: Sequence[Sequence[int]], draft_len: int, max_new_tokens: int) -> None:
    limit, vocab_size = model.config.max_positions, model.config.vocab_size
    if draft_len < 1:
        raise SpecError(f"draft_len={draft_len}: must be at least 1; use the preset dense to decode without drafts")
    if max_new_tokens < 1:
        raise SpecError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not prompts:
        raise SpecError("prompts: give at least one")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise SpecError(f"prompt {index}: empty; give at least one token to continue from")
        if len(prompt) + max_new_tokens > limit:
            raise SpecError(
                f"prompt {index}: {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's {limit} "
                f"positions; shorten the prompt to {max(0, limit - max_new_tokens)} tokens or ask for fewer"
            )
        wild = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wild is not None:
            raise SpecError(f"prompt {index}: token {wild} is outside the model's vocabulary of {vocab_size}")
