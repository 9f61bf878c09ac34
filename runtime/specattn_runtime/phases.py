"""Attention in each phase of decoding. Every phase writes the rows' keys to the cache before it attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from specattn_codegen.results import Selection
from specattn_codegen.spec import ScoreSpec
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.paged_cache import PagedCache, Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Dense causal attention of one request's first rows, which have nothing before them."""

    cache: PagedCache
    rows: Rows

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self.rows.slots, k, v)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))  # [1, H, N, D]
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Attention over the whole cache; gathers each layer's scores [B, S, max_kv] when asked for them."""

    kernels: AttentionKernels
    cache: PagedCache
    rows: Rows
    score: ScoreSpec | None
    scores: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self.rows.slots, k, v)
        verified = self.kernels.verify_attention(
            q,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.rows.page_table,
            self.rows.kv_lens,
            self.rows.cu_q,
            max_q=self.rows.max_q,
            max_kv=self.rows.max_kv,
            score=self.score,
        )
        if verified.scores is not None:
            self.scores.append(verified.scores)
        return verified.out


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Attention over the layer's selected keys and every key from tail_start [B] on."""

    kernels: AttentionKernels
    cache: PagedCache
    rows: Rows
    selections: Sequence[Selection]
    tail_start: torch.Tensor

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self.rows.slots, k, v)
        return self.kernels.sparse_attention(
            q,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.rows.page_table,
            self.rows.kv_lens,
            self.rows.cu_q,
            self.selections[layer],
            self.tail_start,
            max_q=self.rows.max_q,
            max_kv=self.rows.max_kv,
        ).out
