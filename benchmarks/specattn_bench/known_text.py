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
from specattn_runtime.cache.paged_cache import PagedCache
from specattn_runtime.cache.rows import Rows
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.draft_view import DraftView
from specattn_runtime.decoding.phases import Draft, Prefill, Verify
from specattn_runtime.decoding.presets import PRESETS, Preset
from specattn_runtime.decoding.request import Request
from specattn_runtime.decoding.round import Decoder
from specattn_runtime.decoding.stopwatch import Stopwatch
from specattn_runtime.decoding.turn import Turn
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.model.llama import Attention, Llama

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
    drafts: list[torch.Tensor] = field(default_factory=list)  # of each step, one budget after the other [B, vocab]
    verified: list[torch.Tensor] = field(default_factory=list)  # of the last verification [B * rows, vocab]
    # Of every round. holding: chance that a draft holds, of each alone [budgets * B, drafts].
    holding: list[torch.Tensor] = field(default_factory=list)
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
        else:
            self.verified[:] = [found.softmax(dim=1)]
        rows = _rows_of(attention)
        return torch.nn.functional.one_hot(self.texts[rows.requests, positions + 1], found.shape[1]).to(found)

    def compare(self, draft_len: int) -> None:
        """The round's drafts with its verification, whose rows but the last of a request were drafted after."""
        drafted = torch.stack(self.drafts).unflatten(0, (-1, draft_len)).transpose(1, 2).flatten(0, 1)
        verified = self.verified[0].unflatten(0, (-1, draft_len + 1))[:, :-1]
        verified = verified.repeat(len(drafted) // len(verified), 1, 1)  # [budgets * B, drafts, vocab]
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
        self._layers, self._model, self._copies = model.config.num_layers, model, copies
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
        """The model, with how well its drafts and verifications agreed in every round, under one policy after the other
        for all passages: request c * passages + p is passage p under policy c. They draft one by one, and share the
        verification, which is the same for all of them.

        after_prompt is called once the prompts' ends are verified, which no draft precedes."""
        model, batch = self._text_llama(), len(self._contexts) // self._copies
        decoder = self._decoder(model, kernels, dataclasses.replace(preset, min_budget=0))
        absent = self._start(decoder, batch, draft_len + 1)
        texts = self._texts[:batch].tolist()
        views: list[DraftView | None] = [None] * len(policies)
        for number in range(rounds + 1):  # the first ends the prompts
            drafts = draft_len if number else 0
            begins = list(self._cache.lengths[:batch])
            tokens = [
                tuple(text[begin : begin + 1 if number else begin + draft_len + 1])
                for text, begin in zip(texts, begins, strict=True)
            ]
            turns = [[*_turns(tokens, drafts, policy), *absent] for policy in policies]
            views = _shared_round(decoder, turns, views)
            if number:
                model.compare(draft_len)
            else:
                after_prompt()
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


def _turns(tokens: Sequence[tuple[int, ...]], draft_len: int, policy: TopK) -> list[Turn]:
    return [Turn(tokens=given, draft_len=draft_len, joins=not draft_len, policy=policy) for given in tokens]


def _shared_round(
    decoder: Decoder, turns: Sequence[Sequence[Turn | None]], views: Sequence[DraftView | None]
) -> list[DraftView | None]:
    """A round of the same requests under several policies, turns and views of each -> the next views. One verification
    serves all, unless scores are normalised by what the drafts computed. Its keys all stay."""
    begins = list(decoder.cache.lengths)
    if decoder.preset.uses_references and len(turns) > 1:
        found: list[DraftView | None] = []
        for mine, view in zip(turns, views, strict=True):
            decoder.rewind(begins)
            found += _shared_round(decoder, [mine], [view])
        return found
    drafted = None
    for mine, view in zip(turns, views, strict=True):
        drafted = decoder.draft(mine, view)
        decoder.rewind(begins)
    assert drafted is not None
    verified = decoder.verify(turns[0], drafted)
    return [decoder.refresh(mine, verified, view) for mine, view in zip(turns, views, strict=True)]
