"""One round of self-speculative decoding: draft with few keys, verify with all, select anew, accept, rewind.

Knows how a round goes, not when a request ends or what is measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specattn_codegen.policy import Policy
from specattn_codegen.results import Selection
from specattn_codegen.spec import ScoreSpec
from specattn_runtime.acceptance import accept_greedy
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.llama import Llama
from specattn_runtime.paged_cache import PagedCache, Rows
from specattn_runtime.phases import Draft, Prefill, Verify
from specattn_runtime.presets import Preset
from specattn_runtime.references import row_references
from specattn_runtime.stopwatch import Stopwatch

NOTHING = -1  # pads token rows where a request has fewer rows than the longest


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftView:
    """What drafts read: one selection a layer, of keys below tail_start [B] int32, and every key from there on.

    least_lse [layers, B, Hq], of each request's verified rows; None where the preset uses no references.
    """

    selections: tuple[Selection, ...]
    tail_start: torch.Tensor
    least_lse: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """Each token and its drafts, padded where a request has fewer drafts than the most.

    tokens      [B, 1 + drafts] int64
    references  [layers, B, 1 + drafts, Hq], see row_references; None where the preset uses none
    """

    tokens: torch.Tensor
    references: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The full model's word on some rows, padded where a request has fewer rows than the longest.

    targets  [B, rows] int64: its choice after each row
    margins  [B, rows]: by how much the best logit beats the second
    view     what the next drafts read; None in a run without drafts
    """

    targets: torch.Tensor
    margins: torch.Tensor
    view: DraftView | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """What a round gave one request: tokens and their margins, out of `drafted` drafts; empty for an ended request."""

    tokens: list[int]
    margins: list[float]
    drafted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The parts that decode a batch. Its requests' lengths are the cache's; nothing else is kept between rounds."""

    model: Llama
    kernels: AttentionKernels
    cache: PagedCache
    preset: Preset
    policy: Policy
    stopwatch: Stopwatch

    def prefill(self, prompts: Sequence[Sequence[int]], verified_rows: int) -> Verified:
        """Dense attention for all but the last `verified_rows` tokens of each prompt, verification for those.

        So the first round already has a selection, and a dense run computes the very same numbers up to here.
        """
        tails = []
        for request, prompt in enumerate(prompts):
            split = max(0, len(prompt) - verified_rows)
            tails.append(list(prompt[split:]))
            if split:
                rows = self.cache.extend([split if other == request else 0 for other in range(len(prompts))])
                tokens = torch.tensor(prompt[:split], device=self.model.device)
                self.model.forward(tokens, rows.positions, Prefill(cache=self.cache, rows=rows))
        width = max(len(tail) for tail in tails)
        tokens = self._token_rows([tail + [NOTHING] * (width - len(tail)) for tail in tails])
        return self.verify(tokens, [len(tail) for tail in tails], self.preset.score)

    def round(
        self, newest: Sequence[int], draft_lens: Sequence[int], alive: Sequence[bool], view: DraftView | None
    ) -> tuple[list[Emitted], DraftView | None]:
        """Emits 1 to draft_lens[b] + 1 tokens of every living request, and the view for the next round.

        `newest` are the requests' last emitted tokens, which are not cached yet. With all draft lengths 0 a round is
        one dense step.
        """
        prefixes = list(self.cache.lengths)
        with self.stopwatch.phase("draft"):
            drafted = Drafted(tokens=self._token_rows([[token] for token in newest]))
            if view is not None:
                drafted = self.draft(drafted.tokens, draft_lens, view)
            self.rewind(prefixes)
        counts = [length + 1 if living else 0 for length, living in zip(draft_lens, alive, strict=True)]
        score = self.preset.score if self.preset.drafts else None
        verified = self.verify(drafted.tokens, counts, score, drafted.references)
        drafts = drafted.tokens[:, 1:]
        accepted = accept_greedy(drafts, verified.targets, torch.tensor(draft_lens, device=drafts.device))
        kept = [some + 1 if living else 0 for some, living in zip(accepted.tolist(), alive, strict=True)]
        self.rewind([prefix + count for prefix, count in zip(prefixes, kept, strict=True)])
        choices = zip(kept, verified.targets.tolist(), verified.margins.tolist(), draft_lens, strict=True)
        emitted = [Emitted(tokens=row[:n], margins=margins[:n], drafted=length) for n, row, margins, length in choices]
        return emitted, verified.view

    def draft(self, newest: torch.Tensor, draft_lens: Sequence[int], view: DraftView) -> Drafted:
        """newest [B, 1] -> each request's token and its drafts, whose keys stay in the cache."""
        tokens = torch.nn.functional.pad(newest, (0, max(draft_lens)), value=NOTHING)
        lses: list[torch.Tensor] = []  # of each step [layers, B, Hq], NaN for requests it did not run
        for step in range(max(draft_lens)):
            rows = self.cache.extend([int(step < length) for length in draft_lens])
            attention = Draft(
                kernels=self.kernels,
                cache=self.cache,
                rows=rows,
                selections=view.selections,
                tail_start=view.tail_start,
            )
            hidden = self.model.forward(tokens[rows.requests, step], rows.positions, attention)
            tokens[rows.requests, step + 1] = self.model.logits(hidden).argmax(dim=1)
            if view.least_lse is not None:
                lses.append(torch.full_like(view.least_lse, math.nan))
                lses[-1][:, rows.requests] = torch.stack(attention.lses)
        references = None if view.least_lse is None else row_references(lses, view.least_lse)
        return Drafted(tokens=tokens, references=references)

    def verify(
        self,
        tokens: torch.Tensor,
        counts: Sequence[int],
        score: ScoreSpec | None,
        references: torch.Tensor | None = None,
    ) -> Verified:
        """The first counts[b] of tokens [B, N] over the whole cache; overwrites provisional keys in their slots.

        references [layers, B, N, Hq], for a score normalised by them; without any it is the exact score.
        """
        if score is not None and references is None:
            score = dataclasses.replace(score, normaliser="exact")
        with self.stopwatch.phase("verify"):
            rows = self.cache.extend(counts)
            attention = Verify(
                kernels=self.kernels,
                cache=self.cache,
                rows=rows,
                score=score,
                references=None if references is None else references[:, rows.requests, rows.offsets],
            )
            hidden = self.model.forward(tokens[rows.requests, rows.offsets], rows.positions, attention)
            logits = self.model.logits(hidden)
            best = logits.topk(2, dim=1).values.double()
            targets = torch.full((len(counts), rows.max_q), NOTHING, device=logits.device)
            targets[rows.requests, rows.offsets] = logits.argmax(dim=1)
            margins = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
            margins[rows.requests, rows.offsets] = best[:, 0] - best[:, 1]
        with self.stopwatch.phase("select"):
            view = self.select(attention, rows) if self.preset.drafts else None
        return Verified(targets=targets, margins=margins, view=view)

    def select(self, verified: Verify, rows: Rows) -> DraftView:
        """The keys the next drafts read, of all layers in one call; without scores, every layer keeps the newest."""
        batch, scores = len(rows.prefix_lens), verified.scores
        if not scores:
            # Ranking keys by position is exact in float32 up to 2^24 keys.
            scores = [torch.arange(rows.max_kv, dtype=torch.float32, device=self.model.device).repeat(batch, 1, 1)]
        chosen = self.kernels.select_kv(
            torch.cat(scores),
            rows.prefix_lens.repeat(len(scores)),
            self.policy,
            sink=self.preset.sink,
            recent=self.preset.recent,
        )
        per_layer = [
            Selection(indices, counts, chosen.block)
            for indices, counts in zip(chosen.indices.split(batch), chosen.counts.split(batch), strict=True)
        ]
        repeats = self.model.config.num_layers // len(per_layer)
        return DraftView(
            selections=tuple(per_layer * repeats),
            tail_start=rows.prefix_lens,
            least_lse=self._least_lse(verified, rows) if self.preset.uses_references else None,
        )

    def _least_lse(self, verified: Verify, rows: Rows) -> torch.Tensor:
        """[layers, B, Hq] over each request's rows; infinite for a request without any."""
        lses = torch.stack(verified.lses)  # [layers, total_q, Hq]
        padded = lses.new_full((len(lses), len(rows.prefix_lens), rows.max_q, lses.shape[2]), math.inf)
        padded[:, rows.requests, rows.offsets] = lses
        return padded.amin(dim=2)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Cuts every request's keys back to its length."""
        for request, length in enumerate(lengths):
            self.cache.rewind(request, length)

    def _token_rows(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)
