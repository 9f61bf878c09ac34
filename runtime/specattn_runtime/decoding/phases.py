"""Attention in each phase of decoding. Every phase writes the rows' keys to the cache before it attends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn import functional

from specattn_codegen.heads import HeadConfig
from specattn_codegen.results import Selection, VerifyOutput
from specattn_codegen.spec import HISTOGRAM_BINS, ScoreSpec
from specattn_runtime.cache.rows import Rows
from specattn_runtime.kernels_protocol import AttentionKernels


class KeyValues(Protocol):
    """Every layer's keys and values, by pages [num_pages, page_size, Hkv, D], and a way to add to them."""

    @property
    def keys(self) -> Sequence[torch.Tensor] | torch.Tensor: ...

    @property
    def values(self) -> Sequence[torch.Tensor] | torch.Tensor: ...

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values [N, Hkv, D] into the flat slots [N] of one layer, over whatever was there."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Dense causal attention of one request's first rows, which have nothing before them, by torch.

    kernels, one a layer, say what each layer's attention is.
    """

    kernels: Sequence[AttentionKernels]
    cache: KeyValues
    rows: Rows

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self.rows.slots, k, v)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))  # [1, H, N, D]
        scale = self.kernels[layer].heads.scale
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    @staticmethod
    def can_serve(heads: HeadConfig) -> bool:
        """Whether torch has this attention: windows, soft caps and sinks it has not."""
        return heads.window is None and heads.softcap is None and not heads.sinks


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Attention over the whole cache; gathers each layer's lse [total_q, Hq] and, if asked for, scores [B, S, max_kv].

    kernels, one a layer. references [layers, total_q, Hq] go with a score that is normalised by them. room
    [layers, B, S, max_kv] is where the scores go; without it every layer's are memory of their own.
    """

    kernels: Sequence[AttentionKernels]
    cache: KeyValues
    rows: Rows
    score: ScoreSpec | None
    references: torch.Tensor | None = None
    room: torch.Tensor | None = None
    scores: list[torch.Tensor] = field(default_factory=list)
    lses: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self.rows.slots, k, v)
        out = self._out(layer, q)
        verified = self.kernels[layer].verify_attention(
            q,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.rows.page_table,
            self.rows.kv_lens,
            self.rows.cu_q,
            max_q=self.rows.max_q,
            max_kv=self.rows.max_kv,
            score=self.score,
            lse_ref=None if self.references is None else self.references[layer],
            out=out,
        )
        self.lses.append(verified.lse)
        if verified.scores is not None:
            self.scores.append(_into(verified.scores, None if out is None else out.scores))
        return verified.out

    def _out(self, layer: int, q: torch.Tensor) -> VerifyOutput | None:
        """What a layer writes, where its scores have room."""
        if self.room is None or self.score is None:
            return None
        heads, room = self.kernels[layer].heads, self.room[layer]
        return VerifyOutput(
            q.new_empty(len(q), heads.num_q_heads, heads.v_head_dim),
            q.new_empty(len(q), heads.num_q_heads, dtype=torch.float32),
            room,
            q.new_empty(*room.shape[:2], HISTOGRAM_BINS, dtype=torch.int32) if self.score.histogram else None,
        )


def _into(scores: torch.Tensor, room: torch.Tensor | None) -> torch.Tensor:
    """The scores, in the room there is for them: kernels may have left it alone."""
    return scores if room is None or scores is room else room.copy_(scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Attention over the keys chosen for a layer and its rows' queries, and every key from tail_start [B] on; gathers
    each layer's lse. kernels, one a layer."""

    kernels: Sequence[AttentionKernels]
    cache: KeyValues
    rows: Rows
    choose: Callable[[int, torch.Tensor], Selection]
    tail_start: torch.Tensor
    lses: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self.rows.slots, k, v)
        attended = self.kernels[layer].sparse_attention(
            q,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.rows.page_table,
            self.rows.kv_lens,
            self.rows.cu_q,
            self.choose(layer, q),
            self.tail_start,
            max_q=self.rows.max_q,
            max_kv=self.rows.max_kv,
        )
        self.lses.append(attended.lse)
        return attended.out
