"""A round of self-speculative decoding that lives on the device: every length, token and selection is a tensor there.

So its parts, and all of it, can be captured in a CUDA graph and replayed with other requests in the same places. Knows
neither acceptance statistics nor time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.sizes import PAGE_SIZE, ModelSize
from specattn_codegen.policy import TopK
from specattn_codegen.results import Selection, VerifyOutput
from specattn_codegen.spec import ScoreSpec
from specattn_codegen.workloads import BUDGET
from specattn_runtime.decoding.acceptance import accept_greedy
from specattn_runtime.dispatch import Kernels
from specattn_runtime.model.linear import Linear
from specattn_runtime.model.llama import Layer, Llama
from specattn_runtime.model.llama_config import LlamaConfig
from specattn_runtime.model.rope import Rope

EMITTED = 2  # rounds' worth of slots past the prefix, so that a round may begin anywhere in the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """batch requests of at most kv_len keys; draft_len tokens a round; layers of the model that take part.

    caches  distinct caches of a layer that the layers take turns with; layers of them, where the memory holds so many
    """

    batch: int
    kv_len: int
    draft_len: int
    layers: int
    caches: int
    score: ScoreSpec


def drawn_llama(size: ModelSize, layers: int, positions: int, dtype: torch.dtype, device: str) -> Llama:
    """A model of that shape with weights drawn from a seed."""
    generator = torch.Generator(device).manual_seed(5)
    hidden, heads = size.hidden_size, size.heads

    def weights(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=dtype, device=device).mul_(columns**-0.5)

    ones = torch.ones(hidden, dtype=dtype, device=device)
    qkv_rows = (heads.num_q_heads + 2 * heads.num_kv_heads) * heads.head_dim
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=hidden,
        intermediate_size=size.intermediate_size,
        num_layers=layers,
        heads=heads,
        max_positions=positions,
        norm_eps=1e-5,
        rope=Rope(theta=500_000.0),
    )
    cos, signed_sin = config.rope.tables(heads.head_dim, positions, dtype)
    return Llama(
        config=config,
        embedding=weights(size.vocab_size, hidden),
        layers=tuple(
            Layer(
                attention_norm=ones,
                qkv=Linear(weight=weights(qkv_rows, hidden)),
                output=Linear(weight=weights(hidden, heads.num_q_heads * heads.head_dim)),
                mlp_norm=ones,
                gate_up=Linear(weight=weights(2 * size.intermediate_size, hidden)),
                down=Linear(weight=weights(hidden, size.intermediate_size)),
            )
            for _ in range(layers)
        ),
        norm=ones,
        head=weights(size.vocab_size, hidden),
        cos=cos.to(device),
        signed_sin=signed_sin.to(device),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Equally many rows of every request: positions, slots [B * count] int64; kv_lens [B], cu_q [B + 1] int32."""

    positions: torch.Tensor
    slots: torch.Tensor
    kv_lens: torch.Tensor
    cu_q: torch.Tensor
    count: int


class Round:
    """One round's buffers and its parts, none of which allocates what it keeps, synchronises or reads a tensor.

    lengths [B] int32  keys cached before the round: what the newest token's will follow
    newest [B] int64   the tokens emitted last, which are not cached yet
    tokens [B, 1 + draft_len] int64, targets of the same shape: what was drafted, and what the model says of it
    accepted [B] int64 drafts that hold
    """

    def __init__(self, model: Llama, kernels: Kernels, shape: Shape, policy: TopK = BUDGET) -> None:
        device, heads = model.device, model.config.heads
        self.model, self.kernels, self.shape, self.policy = model, kernels, shape, policy
        self.max_kv = shape.kv_len + EMITTED * (shape.draft_len + 1)
        pages = -(-self.max_kv // PAGE_SIZE)
        generator = torch.Generator(device).manual_seed(6)
        pool = (shape.batch * pages, PAGE_SIZE, heads.num_kv_heads)
        draw = functools.partial(torch.randn, generator=generator, dtype=model.dtype, device=device)
        self.keys = [draw(*pool, heads.head_dim) for _ in range(shape.caches)]
        self.values = [draw(*pool, heads.v_head_dim) for _ in range(shape.caches)]
        order = torch.randperm(shape.batch * pages, generator=generator, device=device)
        self.page_table = order.int().view(shape.batch, pages)
        self.lengths = torch.full((shape.batch,), shape.kv_len, dtype=torch.int32, device=device)
        self.newest = torch.arange(shape.batch, device=device) % model.config.vocab_size
        self.tokens = torch.zeros(shape.batch, shape.draft_len + 1, dtype=torch.int64, device=device)
        self.targets = torch.zeros_like(self.tokens)
        self.accepted = torch.zeros(shape.batch, dtype=torch.int64, device=device)
        score_rows = 1 if shape.score.heads == "layer" else heads.num_kv_heads
        width = policy.most_keys(self.max_kv)
        rows = (shape.layers, shape.batch, score_rows)
        self.scores = torch.zeros(*rows, self.max_kv, dtype=torch.float32, device=device)
        self.selection = Selection(
            torch.full((*rows, width), -1, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )
        # About what draft steps leave where the score is normalised by them.
        most_rows = shape.batch * (shape.draft_len + 1)
        self.references = torch.full((most_rows, heads.num_q_heads), 10.0, device=device)
        self._offsets = torch.arange(shape.draft_len + 1, device=device)
        self._starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
        self._draft_lens = torch.full((shape.batch,), shape.draft_len, device=device)

    def _rows(self, first: int, count: int) -> _Rows:
        """The rows `first` to `first + count` past the keys that are cached before the round."""
        positions = self.lengths.long()[:, None] + self._offsets[first : first + count]
        pages = self.page_table.long().gather(1, positions // PAGE_SIZE)
        return _Rows(
            positions=positions.flatten(),
            slots=(pages * PAGE_SIZE + positions % PAGE_SIZE).flatten(),
            kv_lens=self.lengths + (first + count),
            cu_q=self._starts * count,
            count=count,
        )

    def _cached(self, layer: int, rows: _Rows, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's caches with the rows' own keys and values written."""
        keys, values = self.keys[layer % self.shape.caches], self.values[layer % self.shape.caches]
        keys.flatten(0, 1).index_copy_(0, rows.slots, k)
        values.flatten(0, 1).index_copy_(0, rows.slots, v)
        return keys, values

    def _verified(
        self, rows: _Rows, score: ScoreSpec | None, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self._cached(layer, rows, k, v)
        out = None
        if score is not None:
            lse = q.new_empty(q.shape[:2], dtype=torch.float32)
            out = VerifyOutput(torch.empty_like(q), lse, self.scores[layer])
        uses_references = score is not None and score.normaliser == "reference"
        return self.kernels.verify_attention(
            q,
            keys,
            values,
            self.page_table,
            rows.kv_lens,
            rows.cu_q,
            max_q=rows.count,
            max_kv=self.max_kv,
            score=score,
            lse_ref=self.references if uses_references else None,
            out=out,
        ).out

    def _drafted(self, rows: _Rows, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self._cached(layer, rows, k, v)
        chosen = Selection(self.selection.indices[layer], self.selection.counts[layer])
        return self.kernels.sparse_attention(
            q,
            keys,
            values,
            self.page_table,
            rows.kv_lens,
            rows.cu_q,
            chosen,
            self.lengths,
            max_q=rows.count,
            max_kv=self.max_kv,
        ).out

    def draft_step(self, step: int) -> None:
        """One draft: the token at `step` gives the one after it, every layer reading its selection."""
        rows = self._rows(step, 1)
        attention = functools.partial(self._drafted, rows)
        hidden = self.model.forward(self.tokens[:, step], rows.positions, attention)
        self.tokens[:, step + 1] = self.model.logits(hidden).argmax(dim=1)

    def begin(self) -> None:
        self.tokens[:, 0] = self.newest

    def verify(self) -> None:
        """All of a round's tokens over the whole cache; scores of every layer, and how many drafts hold."""
        count = self.shape.draft_len + 1
        rows = self._rows(0, count)
        attention = functools.partial(self._verified, rows, self.shape.score)
        hidden = self.model.forward(self.tokens.flatten(), rows.positions, attention)
        self.targets.copy_(self.model.logits(hidden).argmax(dim=1).view(-1, count))
        self.accepted.copy_(accept_greedy(self.tokens[:, 1:], self.targets, self._draft_lens))

    def select(self) -> None:
        """The keys the next drafts read, of all layers in one launch."""
        self.kernels.select_kv(self.scores, self.lengths, self.policy, out=self.selection)

    def dense_step(self) -> None:
        """What decoding without drafts does for one token."""
        rows = self._rows(0, 1)
        hidden = self.model.forward(self.newest, rows.positions, functools.partial(self._verified, rows, None))
        self.targets[:, 0] = self.model.logits(hidden).argmax(dim=1)

    def whole(self) -> None:
        """Drafts, verification, acceptance, selection."""
        self.begin()
        for step in range(self.shape.draft_len):
            self.draft_step(step)
        self.verify()
        self.select()

    def place(self, lengths: Sequence[int], newest: Sequence[int]) -> None:
        """Puts requests of these lengths, at most kv_len, and newest tokens in the places of the batch."""
        self.lengths.copy_(torch.tensor(list(lengths), dtype=torch.int32))
        self.newest.copy_(torch.tensor(list(newest)))

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """Copies of everything a round leaves for the next one and for its caller."""
        left = (self.tokens, self.targets, self.accepted, self.scores, self.selection.indices, self.selection.counts)
        return tuple(tensor.clone() for tensor in itertools.chain(left, self.keys, self.values))

    def restore(self, state: Sequence[torch.Tensor]) -> None:
        left = (self.tokens, self.targets, self.accepted, self.scores, self.selection.indices, self.selection.counts)
        for tensor, kept in zip(itertools.chain(left, self.keys, self.values), state, strict=True):
            tensor.copy_(kept)
