"""A round of self-speculative decoding: draft with few keys, verify with all, accept, refresh what drafts read, rewind.

Each piece can be called alone, with a model, kernels and a cache of the caller's. Knows how a round goes, not when a
request joins or ends, nor what is measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.policy import TopK
from specattn_codegen.results import Selection
from specattn_codegen.spec import ScoreSpec
from specattn_runtime.cache.page_bounds import PageBounds, RequestBounds
from specattn_runtime.cache.rows import Rows
from specattn_runtime.decoding import key_choice
from specattn_runtime.decoding.acceptance import accept_greedy, accept_sampled
from specattn_runtime.decoding.draft_view import DraftView, merge_views
from specattn_runtime.decoding.phases import Draft, KeyValues, Prefill, Verify
from specattn_runtime.decoding.presets import Preset
from specattn_runtime.decoding.references import row_references
from specattn_runtime.decoding.sampling import draw, token_probabilities
from specattn_runtime.decoding.stopwatch import Stopwatch
from specattn_runtime.decoding.turn import Emitted, Turn
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.model.llama import Attention
from specattn_runtime.scratch import KeptScores

PREFILL_ROWS = 128  # of a prompt that go through the kernels at a time: their scratch grows with the rows
NOTHING = -1  # pads token rows where a request has fewer rows than the longest
Turns = Sequence[Turn | None]  # one a place in the batch; None where nobody is


class CausalModel(Protocol):
    """What a round needs of a model: rows of any mix of requests in, attention done by whoever calls."""

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """tokens, positions [N] int64 -> hidden states [N, hidden]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, hidden] -> next-token logits [N, vocab]."""
        ...


class KvCache(KeyValues, Protocol):
    """What a round needs of a cache: room for the next rows of a batch, and a way back."""

    @property
    def lengths(self) -> Sequence[int]:
        """Keys of each request [B]."""
        ...

    @property
    def page_size(self) -> int: ...

    @property
    def page_table(self) -> torch.Tensor:
        """[B, max_pages] int32."""
        ...

    @property
    def bounds(self) -> PageBounds | None:
        """Of every page, for a preset that ranks pages by them."""
        ...

    def extend(self, counts: Sequence[int]) -> Rows:
        """Makes each request `counts[b]` keys longer and says where they lie."""
        ...

    def rewind(self, request: int, length: int) -> None:
        """Forgets every key of a request at and past `length`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """Each newest token and its drafts, padded where a request has fewer drafts than the most.

    tokens         [B, 1 + drafts] int64
    probabilities  what each draft was drawn from [B, drafts, V]; None where every request is greedy
    references     [layers, B, 1 + drafts, Hq], see row_references; None where the preset uses none
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor | None = None
    references: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The full model's word on some rows, request after request: logits [total_q, V], each layer's lse [total_q, Hq]
    and, where they were asked for, scores [layers, B, S, max_kv], which the decoder's next verification writes over."""

    rows: Rows
    logits: torch.Tensor
    lses: Sequence[torch.Tensor]
    scores: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The parts that decode a batch. Its requests' lengths are the cache's; nothing else is kept between rounds but
    the memory that scores are in.

    kernels, one a layer: the same for all of them, or each layer's own with its window, scale or sinks.
    """

    model: CausalModel
    kernels: Sequence[AttentionKernels]
    cache: KvCache
    preset: Preset
    stopwatch: Stopwatch
    score_memory: KeptScores = field(default_factory=KeptScores, repr=False)

    def prefill(self, request: int, tokens: Sequence[int]) -> None:
        """Adds tokens to a request's cache and says nothing about what follows them. The end of a prompt joins a round
        instead, so that the first drafts already have a selection."""
        plain = self.cache.lengths[request] == 0 and all(Prefill.can_serve(each.heads) for each in self.kernels)
        most = max(1, len(tokens)) if plain else PREFILL_ROWS
        for begin in range(0, len(tokens), most):
            piece = tokens[begin : begin + most]
            rows = self.cache.extend([len(piece) * (other == request) for other in range(len(self.cache.lengths))])
            attention = (
                Prefill(kernels=self.kernels, cache=self.cache, rows=rows)
                if plain
                else Verify(kernels=self.kernels, cache=self.cache, rows=rows, score=None)
            )
            self.model.forward(torch.tensor(piece, device=self._device), rows.positions, attention)

    def round(self, turns: Turns, view: DraftView | None) -> tuple[list[Emitted | None], DraftView | None]:
        """Every turn's emitted tokens, 1 to draft_len + 1 of them, and the view for the next round.

        view, None before the first, is what the round before gave. A turn without drafts is one dense step.
        """
        prefixes = list(self.cache.lengths)
        with self.stopwatch.phase("draft"):
            drafted = self.draft(turns, view)
            self.rewind(prefixes)
        with self.stopwatch.phase("verify"):
            verified = self.verify(turns, drafted)
            emitted = self.accept(turns, drafted, verified)
        with self.stopwatch.phase("select"):
            view = self.refresh(turns, verified, view) if self.preset.drafts else None
        grown = zip(prefixes, turns, emitted, strict=True)
        self.rewind([prefix + _kept(turn, given) for prefix, turn, given in grown])
        return emitted, view

    def draft(self, turns: Turns, view: DraftView | None) -> Drafted:
        """Each turn's newest token and its drafts, whose keys stay in the cache until it is rewound."""
        newest = [[turn.tokens[-1] if turn else NOTHING] for turn in turns]
        tokens = torch.tensor(newest, device=self._device)
        steps = max((turn.draft_len for turn in turns if turn), default=0)
        if view is None or not steps:
            references = None if view is None or view.least_lse is None else row_references([], view.least_lse)
            return Drafted(tokens=tokens, references=references)
        tokens = torch.nn.functional.pad(tokens, (0, steps), value=NOTHING)
        probabilities: list[torch.Tensor] = []  # of each step [B, V]
        lses: list[torch.Tensor] = []  # of each step [layers, B, Hq], NaN for requests it did not run
        sampled = any(turn and not turn.sampling.greedy for turn in turns)
        bounds: RequestBounds | None = None
        for step in range(steps):
            drafting = [turn if turn and step < turn.draft_len else None for turn in turns]
            rows = self.cache.extend([int(turn is not None) for turn in drafting])
            if self.preset.uses_page_bounds and bounds is None:
                bounds = self._bounds(rows)
            logits, found_lses = self._draft_step(drafting, rows, tokens[:, step], view, bounds)
            if sampled:
                drawn, found = _draw_drafts([turn for turn in drafting if turn], step, logits)
                tokens[rows.requests, step + 1] = drawn
                probabilities.append(found.new_zeros(len(turns), found.shape[1]))
                probabilities[-1][rows.requests] = found
            else:
                tokens[rows.requests, step + 1] = logits.argmax(dim=1)
            if view.least_lse is not None:
                lses.append(torch.full_like(view.least_lse, math.nan))
                lses[-1][:, rows.requests] = found_lses
        return Drafted(
            tokens=tokens,
            probabilities=torch.stack(probabilities, dim=1) if probabilities else None,
            references=None if view.least_lse is None else row_references(lses, view.least_lse),
        )

    def _draft_step(
        self, drafting: Turns, rows: Rows, tokens: torch.Tensor, view: DraftView, bounds: RequestBounds | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token of tokens [B] for each turn: its row's logits [N, V] and every layer's lse [layers, N, Hq]."""
        attention = Draft(
            kernels=self.kernels,
            cache=self.cache,
            rows=rows,
            choose=self._choice(drafting, rows, view, bounds),
            tail_start=view.tail_start,
        )
        hidden = self.model.forward(tokens[rows.requests], rows.positions, attention)
        return self.model.logits(hidden), torch.stack(attention.lses)

    def verify(self, turns: Turns, drafted: Drafted) -> Verified:
        """Every turn's tokens and drafts over the whole cache; overwrites provisional keys in their slots.

        Scores where some turn selects anew: exact ones unless each of them has references.
        """
        score = self._score(turns, drafted)
        tokens = _verified_tokens(turns, drafted)
        rows = self.cache.extend([turn.rows if turn else 0 for turn in turns])
        references = None
        if score is not None and score.normaliser == "reference" and drafted.references is not None:
            references = drafted.references[:, rows.requests, rows.offsets]
        room = None if score is None else self._room(score, rows)
        attention = Verify(
            kernels=self.kernels, cache=self.cache, rows=rows, score=score, references=references, room=room
        )
        hidden = self.model.forward(tokens[rows.requests, rows.offsets], rows.positions, attention)
        return Verified(rows=rows, logits=self.model.logits(hidden), lses=tuple(attention.lses), scores=room)

    def _room(self, score: ScoreSpec, rows: Rows) -> torch.Tensor:
        """Where a verification's scores go."""
        score_rows = 1 if score.heads == "layer" else self.kernels[0].heads.num_kv_heads
        columns = score.columns(rows.max_kv, self.cache.page_size)
        return self.score_memory.lend((len(self.kernels), len(rows.counts), score_rows, columns), self._device)

    def accept(self, turns: Turns, drafted: Drafted, verified: Verified) -> list[Emitted | None]:
        """The drafts that hold and the token that follows them, for every turn."""
        drafts, logits = drafted.tokens[:, 1:], verified.logits
        draft_lens = torch.tensor([turn.draft_len if turn else 0 for turn in turns], device=self._device)
        # A turn's last draft_len + 1 rows: those whose next tokens its drafts are, and the last.
        first = verified.rows.cu_q[1:].long() - 1 - draft_lens
        places = first[:, None] + torch.arange(drafts.shape[1] + 1, device=self._device)
        places = places.clamp(0, len(logits) - 1)
        if any(turn and not turn.sampling.greedy for turn in turns):
            samplings = [turn.sampling for turn in turns if turn for _ in range(turn.rows)]
            wanted = token_probabilities(logits, samplings)[places]
            offered = wanted[:, :0] if drafted.probabilities is None else drafted.probabilities
            uniforms = _acceptance_uniforms(turns, drafts)
            counts, following = accept_sampled(drafts.clamp_min(0), offered, wanted, draft_lens, uniforms)
        else:
            targets = logits.argmax(dim=1)[places]
            counts = accept_greedy(drafts, targets, draft_lens)
            following = targets.gather(1, counts[:, None])[:, 0]
        best = logits.topk(2, dim=1).values.double()
        margins = (best[:, 0] - best[:, 1])[places].tolist()
        chosen = zip(turns, drafts.tolist(), counts.tolist(), following.tolist(), margins, strict=True)
        return [
            None
            if turn is None
            else Emitted(tokens=[*row[:count], last], margins=margin[: count + 1], drafted=turn.draft_len)
            for turn, row, count, last, margin in chosen
        ]

    def refresh(self, turns: Turns, verified: Verified, view: DraftView | None) -> DraftView:
        """What the next drafts read: keys selected anew for every turn with a policy, `view` for the others."""
        due = [turn is not None and turn.policy is not None for turn in turns]
        least_lse = least_lses(verified, view) if self.preset.uses_references else None
        if view is not None and not any(due):
            return dataclasses.replace(view, least_lse=least_lse)
        selections = () if self.preset.uses_page_bounds else self._select(turns, verified)
        fresh = DraftView(selections=selections, tail_start=verified.rows.prefix_lens, least_lse=least_lse)
        return fresh if view is None or all(due) else merge_views(view, fresh, due)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Cuts every request's keys back to its length."""
        for request, length in enumerate(lengths):
            self.cache.rewind(request, length)

    def _select(self, turns: Turns, verified: Verified) -> tuple[Selection, ...]:
        """One selection a layer, of all layers in one call. Keys ranked by position are the same in every layer."""
        rows, layers, device = verified.rows, len(self.kernels), self._device
        policies = [turn.policy if turn else None for turn in turns]
        if self.preset.ranking == "newest":
            scores = key_choice.newest_first(len(turns), rows.max_kv, device)
        elif self.preset.ranking == "random":
            scores = key_choice.at_random(layers, rows.prefix_lens, rows.max_kv)
        elif verified.scores is not None:
            scores = verified.scores.flatten(0, 1)
        else:
            raise TypeError(f"preset={self.preset.name}: selects from a verification that was asked for no scores")
        if self.preset.ahead:
            scores = key_choice.look_ahead(scores, len(turns), self.preset.ahead)
        if self.preset.recent_share:
            scores = key_choice.force_recents(scores, rows.prefixes, policies, self.preset.recent_share)
        chosen = self._chosen(scores, rows.prefix_lens, policies)
        per_layer = zip(chosen.indices.split(len(turns)), chosen.counts.split(len(turns)), strict=True)
        found = tuple(Selection(indices, counts, chosen.block) for indices, counts in per_layer)
        return found * (layers // len(found))

    def _bounds(self, rows: Rows) -> RequestBounds:
        """Of every request's pages, before the rows' keys are in them: drafts select keys of the prefix."""
        if self.cache.bounds is None:
            raise SpecError(
                f"preset={self.preset.name}: ranks pages by bounds that this cache does not keep; give it "
                "page_bounds=True, or a foreign cache PageBounds of its own"
            )
        return self.cache.bounds.of(rows.page_table[:, : -(-rows.max_kv // self.cache.page_size)])

    def _choice(
        self, turns: Turns, rows: Rows, view: DraftView, bounds: RequestBounds | None
    ) -> Callable[[int, torch.Tensor], Selection]:
        """Which keys a draft step reads: the view's, or the best pages for its own queries."""
        if bounds is None:
            return lambda layer, _: view.selections[layer]
        policies = [turn.policy if turn else None for turn in turns]

        def best_pages(layer: int, q: torch.Tensor) -> Selection:
            queries = q.new_zeros(len(turns), *q.shape[1:])
            queries[rows.requests] = q
            return self._chosen(bounds.scores(layer, queries), view.tail_start, policies, self.cache.page_size)

        return best_pages

    def _chosen(
        self, scores: torch.Tensor, prefix_lens: torch.Tensor, policies: Sequence[TopK | None], block: int = 1
    ) -> Selection:
        return key_choice.select_by_policy(
            self.kernels[0],
            scores,
            prefix_lens,
            policies,
            sink=self.preset.sink,
            recent=self.preset.recent,
            block=block,
        )

    def _score(self, turns: Turns, drafted: Drafted) -> ScoreSpec | None:
        """What verification emits: a dense run has scores only at the end of its prompts, as a speculative one has."""
        present = [turn for turn in turns if turn]
        wanted = any(turn.policy for turn in present) if self.preset.drafts else any(turn.joins for turn in present)
        if self.preset.score is None or not wanted:
            return None
        exact = drafted.references is None or any(turn.joins for turn in present)
        return dataclasses.replace(self.preset.score, normaliser="exact") if exact else self.preset.score

    @property
    def _device(self) -> torch.device:
        return self.cache.page_table.device


def least_lses(verified: Verified, view: DraftView | None) -> torch.Tensor:
    """[layers, B, Hq], the least over each request's rows; the view's, or infinite, for a request without any."""
    rows, lses = verified.rows, torch.stack(list(verified.lses))  # [layers, total_q, Hq]
    padded = lses.new_full((len(lses), len(rows.counts), rows.max_q, lses.shape[2]), math.inf)
    padded[:, rows.requests, rows.offsets] = lses
    least = padded.amin(dim=2)
    before = least if view is None or view.least_lse is None else view.least_lse
    return torch.where((rows.kv_lens > rows.prefix_lens)[:, None], least, before)


def _kept(turn: Turn | None, emitted: Emitted | None) -> int:
    """Rows whose keys stay: the turn's own and the drafts that held."""
    return len(turn.tokens) + len(emitted.tokens) - 1 if turn and emitted else 0


def _draw_drafts(turns: Sequence[Turn], step: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The drafts of one step [N] and what each was drawn from [N, V]."""
    found = token_probabilities(logits, [turn.sampling for turn in turns])
    uniforms = [turn.uniforms[step] if turn.uniforms else 0.0 for turn in turns]
    return draw(found, torch.tensor(uniforms, dtype=torch.float64, device=logits.device)), found


def _acceptance_uniforms(turns: Turns, drafts: torch.Tensor) -> torch.Tensor:
    """[B, k + 1] float64: one a draft, then the one that decides what follows. A greedy request needs none."""
    found = torch.zeros(drafts.shape[0], drafts.shape[1] + 1, dtype=torch.float64)
    for request, turn in enumerate(turns):
        if turn and turn.uniforms:
            given = torch.tensor(turn.uniforms[turn.draft_len :], dtype=torch.float64)
            found[request, : turn.draft_len], found[request, -1] = given[:-1], given[-1]
    return found.to(drafts.device)


def _verified_tokens(turns: Turns, drafted: Drafted) -> torch.Tensor:
    """[B, rows] int64: each turn's tokens and drafts, padded."""
    width = max(drafted.tokens.shape[1], *(len(turn.tokens) if turn else 0 for turn in turns))
    tokens = torch.nn.functional.pad(drafted.tokens, (0, width - drafted.tokens.shape[1]), value=NOTHING)
    for request, turn in enumerate(turns):
        if turn and turn.joins:
            tokens[request, : len(turn.tokens)] = torch.tensor(turn.tokens, device=tokens.device)
    return tokens
