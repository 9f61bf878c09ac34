"""The decode loop along text that is known beforehand: the text decides every token, whatever drafts would have said.

Every way to choose keys then verifies the very same rows, and only what the drafts read differs. From the same prompts
the model can go on by itself too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from specattn_codegen.policy import TopK
from specattn_runtime.decode_spec import DecodeSpec
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.llama import Attention, Llama
from specattn_runtime.paged_cache import PagedCache
from specattn_runtime.phases import Draft, Prefill, Verify
from specattn_runtime.presets import PRESETS, Preset
from specattn_runtime.request import Request
from specattn_runtime.round import Decoder
from specattn_runtime.rows import Rows
from specattn_runtime.stopwatch import Stopwatch
from specattn_runtime.turn import Turn

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """texts [B, T] int64, padded; contexts[b] tokens of each are the prompt, as many for all of them follow."""

    texts: torch.Tensor
    contexts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TextLlama(Llama):
    """Says what texts [B, T] say next, sure of it, and keeps how well its own drafts and verifications agree."""

    texts: torch.Tensor
    rows: list[tuple[Attention, torch.Tensor]] = field(default_factory=list)
    drafts: list[torch.Tensor] = field(default_factory=list)
    holding: list[torch.Tensor] = field(default_factory=list)  # chance that a draft holds, of each alone [B, drafts]
    accepted: list[torch.Tensor] = field(default_factory=list)
    matched: list[torch.Tensor] = field(default_factory=list)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        self.rows[:] = [(attention, positions)]
        return super().forward(tokens, positions, attention)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found = super().logits(hidden)
        ((attention, positions),) = self.rows
        if isinstance(attention, Draft):
            self.drafts.append(found.softmax(dim=1))
        elif self.drafts:
            self._compare(found)
        rows = _rows_of(attention)
        return torch.nn.functional.one_hot(self.texts[rows.requests, positions + 1], found.shape[1]).to(found)

    def _compare(self, found: torch.Tensor) -> None:
        """found [B * rows, vocab], every request having as many rows; those but the last were drafted after."""
        drafted = torch.stack(self.drafts, dim=1)  # [B, drafts, vocab]
        verified = found.softmax(dim=1).view(len(drafted), -1, found.shape[1])[:, :-1]
        self.holding.append(torch.minimum(drafted, verified).sum(dim=2))
        self.accepted.append(self.holding[-1].cumprod(dim=1).sum(dim=1))
        agrees = drafted.argmax(dim=2) == verified.argmax(dim=2)
        self.matched.append(agrees.double().cumprod(dim=1).sum(dim=1))
        self.drafts.clear()


def _rows_of(attention: Attention) -> Rows:
    if not isinstance(attention, (Draft, Prefill, Verify)):
        raise TypeError(f"{attention}: not a phase of decoding")
    return attention.rows


class KnownText:
    """A model at the end of every passage's prompt, of which each passage may have several copies that share its keys:
    copy c of passage p is request c * passages + p. Every run starts there."""

    def __init__(
        self,
        model: Llama,
        kernels: AttentionKernels,
        passages: Passages,
        *,
        draft_lens: Sequence[int],
        copies: int = 1,
        page_bounds: bool = False,
    ) -> None:
        """draft_lens: of any run to come. page_bounds: for presets that rank pages by them."""
        self._layers, self._model = model.config.num_layers, model
        self._texts, self._contexts = passages.texts.repeat(copies, 1), passages.contexts * copies
        width, batch = passages.texts.shape[1], len(passages.contexts)
        prompts = [row[:length] for row, length in zip(passages.texts.tolist(), passages.contexts, strict=True)]
        # A copy has keys of its own from where a run starts, in at most two pages more than those fill.
        own = width - max(passages.contexts) + max(draft_lens) + 1
        pages = sum(-(-context // PAGE_SIZE) for context in passages.contexts)
        pages += len(self._contexts) * (-(-own // PAGE_SIZE) + 2)
        self._cache = PagedCache(
            model.config.heads,
            layers=self._layers,
            num_pages=pages,
            page_size=PAGE_SIZE,
            batch=len(self._contexts),
            dtype=model.dtype,
            page_bounds=page_bounds,
        )
        decoder = self._decoder(self._text_llama(), kernels, PRESETS["dense"])
        for request, prompt in enumerate(prompts):
            decoder.prefill(request, prompt[: -min(draft_lens) - 1])
        for request in range(batch, len(self._contexts)):
            self._cache.fork(request % batch, request)

    @torch.inference_mode()
    def run(
        self,
        kernels: AttentionKernels,
        preset: Preset,
        policies: Sequence[TopK],
        *,
        draft_len: int,
        rounds: int,
        after_prompt: Callable[[], None] = lambda: None,
    ) -> TextLlama:
        """The model, with how well its drafts and verifications agreed in every round. policies: of the first requests,
        which alone run. after_prompt is called once the prompts' ends are verified, which no draft precedes."""
        model, rows = self._text_llama(), draft_len + 1
        decoder = self._decoder(model, kernels, dataclasses.replace(preset, min_budget=0))
        absent = self._start(decoder, len(policies), rows)
        texts = self._texts.tolist()
        ends = [
            Turn(tokens=tuple(text[context - rows : context]), joins=True, policy=policy)
            for text, context, policy in zip(texts, self._contexts, policies, strict=False)
        ]
        _, view = decoder.round([*ends, *absent], None)
        after_prompt()
        for _ in range(rounds):
            turns = [
                Turn(tokens=(text[length],), draft_len=draft_len, policy=policy)
                for text, length, policy in zip(texts, self._cache.lengths, policies, strict=False)
            ]
            _, view = decoder.round([*turns, *absent], view)
        return model

    @torch.inference_mode()
    def generate(self, kernels: AttentionKernels, specs: Sequence[DecodeSpec], *, rounds: int) -> list[Request]:
        """What the model itself says after the first prompts, one a spec, in as many rounds with all their drafts.
        specs: of one preset and draft length, with room for what the rounds emit."""
        decoder = self._decoder(self._model, kernels, specs[0].preset)
        absent = self._start(decoder, len(specs), specs[0].draft_len + 1)
        prompts = (row[:context] for row, context in zip(self._texts.tolist(), self._contexts, strict=True))
        requests = [Request(tuple(prompt), spec) for prompt, spec in zip(prompts, specs, strict=False)]
        view = None
        for _ in range(rounds + 1):  # the first ends the prompts
            turns = [request.turn(request.longest_draft) for request in requests]
            emitted, view = decoder.round([*turns, *absent], view)
            for request, given in zip(requests, emitted, strict=False):
                assert given is not None
                request.take(given)
        return requests

    def _start(self, decoder: Decoder, running: int, rows: int) -> list[None]:
        """The first requests back to where their prompts lack `rows` tokens; the turns of those that do not run."""
        decoder.rewind([context - rows for context in self._contexts[:running]])
        return [None] * (len(self._contexts) - running)

    def _text_llama(self) -> TextLlama:
        weights = {part.name: getattr(self._model, part.name) for part in dataclasses.fields(Llama)}
        return TextLlama(**weights, texts=self._texts)

    def _decoder(self, model: Llama, kernels: AttentionKernels, preset: Preset) -> Decoder:
        return Decoder(
            model=model,
            kernels=(kernels,) * self._layers,
            cache=self._cache,
            preset=preset,
            stopwatch=Stopwatch(),
        )
