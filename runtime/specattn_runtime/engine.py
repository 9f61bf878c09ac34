"""Lossless self-speculative decoding of a batch of prompts, from checked arguments to tokens and statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from specattn_codegen.errors import SpecError
from specattn_runtime.decode_spec import DecodeSpec
from specattn_runtime.generation import Generation, RequestResult
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.llama import Llama
from specattn_runtime.paged_cache import PagedCache
from specattn_runtime.round import Decoder, DraftView, Emitted
from specattn_runtime.stopwatch import Stopwatch


@torch.inference_mode()
def generate(
    model: Llama,
    kernels: AttentionKernels,
    prompts: Sequence[Sequence[int]],
    spec: DecodeSpec,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Generation:
    """Greedy continuations of `prompts` (token ids), token for token those of dense decoding by the same kernels.

    Raises SpecError, before any work, for prompts that are empty, outside the vocabulary or too long for the model.
    """
    _require_servable(model, prompts, spec)
    decoder = _decoder(model, kernels, spec, [len(prompt) + spec.max_new_tokens for prompt in prompts], clock)
    return _decode(decoder, prompts, spec)


@torch.inference_mode()
def warm_up(model: Llama, kernels: AttentionKernels, prompts: Sequence[Sequence[int]], spec: DecodeSpec) -> None:
    """Runs rounds with and without drafts at the lengths `generate` starts and ends with, so that it builds no kernel.

    No prefill: what the cache holds makes no difference to which kernels a round needs.
    """
    _require_servable(model, prompts, spec)
    draft_len = min(spec.draft_len, spec.max_new_tokens - 1)
    starts = [max(0, len(prompt) - draft_len - 1) for prompt in prompts]
    ends = [len(prompt) + spec.max_new_tokens - draft_len - 1 for prompt in prompts]
    for lengths in (starts, ends):
        decoder = _decoder(model, kernels, spec, [length + draft_len + 1 for length in lengths], time.perf_counter)
        decoder.cache.extend(lengths)
        rows = [draft_len + 1] * len(prompts)
        tokens = torch.zeros(len(prompts), draft_len + 1, dtype=torch.int64, device=model.device)
        view = decoder.verify(tokens, rows, spec.preset.score).view
        for drafts in (draft_len if spec.preset.drafts else 0, 0):
            decoder.rewind(lengths)
            decoder.round([0] * len(prompts), [drafts] * len(prompts), [True] * len(prompts), view)


def _decoder(
    model: Llama, kernels: AttentionKernels, spec: DecodeSpec, capacities: Sequence[int], clock: Callable[[], float]
) -> Decoder:
    """A decoder with an empty cache that holds `capacities[b]` keys of each request."""
    cache = PagedCache(
        model.config.heads,
        layers=model.config.num_layers,
        num_pages=sum(-(-capacity // spec.page_size) for capacity in capacities),
        page_size=spec.page_size,
        batch=len(capacities),
        dtype=model.dtype,
        device=model.device,
    )
    return Decoder(
        model=model,
        kernels=kernels,
        cache=cache,
        preset=spec.preset,
        policy=spec.policy,
        stopwatch=Stopwatch(clock),
    )


@dataclass(slots=True)
class _Request:
    """A request's progress."""

    spec: DecodeSpec
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, tokens: Sequence[int], margins: Sequence[float]) -> None:
        """Appends emitted tokens, up to and with the first stop token."""
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self.spec.stop_tokens), None)
        self.tokens += tokens[:stop]
        self.margins += margins[:stop]
        self.ended = stop is not None or len(self.tokens) >= self.spec.max_new_tokens

    def take_round(self, emitted: Emitted) -> None:
        self.take(emitted.tokens, emitted.margins)
        self.accepted.append(len(emitted.tokens) - 1)
        self.drafted.append(emitted.drafted)

    def draft_len(self) -> int:
        """A round emits one token more than it accepts, and none past the limit."""
        if self.ended or not self.spec.preset.drafts:
            return 0
        return min(self.spec.draft_len, self.spec.max_new_tokens - len(self.tokens) - 1)

    def result(self) -> RequestResult:
        return RequestResult(
            tokens=tuple(self.tokens),
            margins=tuple(self.margins),
            accepted=tuple(self.accepted),
            drafted=tuple(self.drafted),
        )


def _decode(decoder: Decoder, prompts: Sequence[Sequence[int]], spec: DecodeSpec) -> Generation:
    stopwatch = decoder.stopwatch
    requests = [_Request(spec) for _ in prompts]
    verified = decoder.prefill(prompts, spec.draft_len + 1)
    rows = zip(requests, prompts, verified.targets.tolist(), verified.margins.tolist(), strict=True)
    for request, prompt, targets, margins in rows:
        last = min(len(prompt), spec.draft_len + 1) - 1
        request.take([targets[last]], [margins[last]])
    prefill_seconds, full_passes, shares, view = stopwatch.restart(), 1, list[float](), verified.view
    while not all(request.ended for request in requests):
        for index, request in enumerate(requests):
            if request.ended:
                decoder.cache.free(index)
        if view is not None:
            shares.append(_selected_share(view))
        newest = [request.tokens[-1] for request in requests]
        draft_lens = [request.draft_len() for request in requests]
        emitted, view = decoder.round(newest, draft_lens, [not request.ended for request in requests], view)
        full_passes += 1
        for request, given in zip(requests, emitted, strict=True):
            if not request.ended:
                request.take_round(given)
    return Generation(
        requests=tuple(request.result() for request in requests),
        full_passes=full_passes,
        selected_share=sum(shares) / len(shares) if shares else 1.0,
        prefill_seconds=prefill_seconds,
        decode_seconds=stopwatch.elapsed,
        phases=dict(stopwatch.phases),
    )


def _selected_share(view: DraftView) -> float:
    """Selected keys over prefix keys, mean over layers, heads and requests."""
    selected = torch.stack([selection.counts.float().mean() for selection in view.selections]).mean()
    return (selected / view.tail_start.float().mean().clamp_min(1.0)).item()


def _require_servable(model: Llama, prompts: Sequence[Sequence[int]], spec: DecodeSpec) -> None:
    limit, vocab_size = model.config.max_positions, model.config.vocab_size
    if not prompts:
        raise SpecError("prompts: give at least one")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise SpecError(f"prompt {index}: empty; give at least one token to continue from")
        if len(prompt) + spec.max_new_tokens > limit:
            raise SpecError(
                f"prompt {index}: {len(prompt)} tokens and {spec.max_new_tokens} new ones exceed the model's {limit} "
                "positions; shorten the prompt or ask for fewer"
            )
        wild = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wild is not None:
            raise SpecError(f"prompt {index}: token {wild} is outside the model's vocabulary of {vocab_size}")
