"""Lossless self-speculative decoding of a batch of prompts, from checked arguments to tokens and statistics."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import torch

from specattn_codegen.errors import SpecError
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.generation import Generation
from specattn_runtime.decoding.session import LanguageModel, Progress, Session, open_session, require_servable
from specattn_runtime.decoding.turn import Turn
from specattn_runtime.kernels_protocol import AttentionKernels


def generate(
    model: LanguageModel,
    kernels: AttentionKernels | Sequence[AttentionKernels],
    prompts: Sequence[Sequence[int]],
    spec: DecodeSpec,
    *,
    clock: Callable[[], float] = time.perf_counter,
    watch: Callable[[Session, Sequence[Progress]], None] | None = None,
) -> Generation:
    """Continuations of `prompts` (token ids), all in one batch.

    Greedy ones are token for token those of dense decoding by the same kernels; sampled ones have its distribution, and
    prompt i the seed `spec.sampling.seed + i`. watch is called after every step, with what it gave.
    Raises SpecError, before any work, for prompts that are empty, outside the vocabulary or too long for the model.
    """
    _require_prompts(model, prompts, spec)
    session = _session(model, kernels, spec, [len(prompt) + spec.max_new_tokens - 1 for prompt in prompts], clock)
    stopwatch, seed = session.decoder.stopwatch, spec.sampling.seed
    for index, prompt in enumerate(prompts):
        own = dataclasses.replace(spec.sampling, seed=seed + index)
        session.add_request(prompt, dataclasses.replace(spec, sampling=own))
    prefill_seconds = None
    while session.has_work:
        progress = session.step()
        if prefill_seconds is None:
            prefill_seconds = stopwatch.restart()
        if watch is not None:
            watch(session, progress)
    return Generation(
        requests=tuple(session.result(index) for index in range(len(prompts))),
        full_passes=session.rounds,
        selected_share=sum(session.shares) / len(session.shares) if session.shares else 1.0,
        prefill_seconds=prefill_seconds or 0.0,
        decode_seconds=stopwatch.elapsed,
        phases=dict(stopwatch.phases),
    )


@torch.inference_mode()
def warm_up(
    model: LanguageModel,
    kernels: AttentionKernels | Sequence[AttentionKernels],
    prompts: Sequence[Sequence[int]],
    spec: DecodeSpec,
) -> None:
    """Runs rounds with and without drafts at the lengths `generate` starts and ends with, so that it builds no kernel.

    No prefill: what the cache holds makes no difference to which kernels a round needs.
    """
    _require_prompts(model, prompts, spec)
    draft_len = min(spec.draft_len, spec.max_new_tokens - 1)
    starts = [max(0, len(prompt) - draft_len - 1) for prompt in prompts]
    ends = [len(prompt) + spec.max_new_tokens - draft_len - 1 for prompt in prompts]
    for lengths in (starts, ends):
        session = _session(model, kernels, spec, [length + draft_len + 1 for length in lengths], time.perf_counter)
        decoder = session.decoder
        session.cache.extend(lengths)
        joining = Turn(tokens=(0,) * (draft_len + 1), joins=True, policy=spec.policy)
        _, view = decoder.round([joining] * len(prompts), None)
        policies = (spec.policy, None) if spec.refresh_interval > 1 else (spec.policy,)
        for drafts, policy in itertools.product((draft_len if spec.preset.drafts else 0, 0), policies):
            decoder.rewind(lengths)
            decoder.round([Turn(tokens=(0,), draft_len=drafts, policy=policy)] * len(prompts), view)


def _session(
    model: LanguageModel,
    kernels: AttentionKernels | Sequence[AttentionKernels],
    spec: DecodeSpec,
    capacities: Sequence[int],
    clock: Callable[[], float],
) -> Session:
    """A session whose cache holds `capacities[b]` keys of each request."""
    pages = sum(-(-capacity // spec.page_size) for capacity in capacities)
    return open_session(model, kernels, spec, max_requests=len(capacities), num_pages=max(1, pages), clock=clock)


def _require_prompts(model: LanguageModel, prompts: Sequence[Sequence[int]], spec: DecodeSpec) -> None:
    if not prompts:
        raise SpecError("prompts: give at least one")
    for index, prompt in enumerate(prompts):
        require_servable(model, prompt, spec, f"prompt {index}")
