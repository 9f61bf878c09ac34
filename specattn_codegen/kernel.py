"""Calls and kernels: the arguments of one launch after they have been checked, and the object that takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from specattn_codegen.plan import Plan
from specattn_codegen.policy import Policy, selection_width
from specattn_codegen.results import Selection
from specattn_codegen.spec import KernelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """Arguments of verify_attention, sparse_attention and mixed_attention, checked.

    q [total_q, Hq, D]; k_cache, v_cache [num_pages, page_size, Hkv, D]; page_table [B, max_pages] int32;
    kv_lens [B] int32; cu_q [B + 1] int32; sinks [Hq] float32 or None; k_scale, v_scale [Hkv] float32 of an 8-bit
    cache, at any stride, or None; lse_ref [total_q, Hq] float32 where scores are normalised by a reference. max_q
    bounds a request's rows and max_kv its keys; both shape the grid. Outputs are written in place: out
    [total_q, Hq, Dv], lse [total_q, Hq] float32, scores [B, S, columns] float32 and histogram [B, S, HISTOGRAM_BINS]
    int32 where the spec has them. Sparse attention also has indices [B, S, K], counts [B, S] and tail_start [B], all
    int32; an index names `block` keys. slots, int32 or int64 at the strides of indices, say where the cache holds those
    blocks; without them the page table does. Mixed attention has those and mode [B] int32: 0 verifies, 1 drafts.
    workspace is uint8 of at least `Kernel.workspace_bytes(call)`, its contents arbitrary.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    cu_q: torch.Tensor
    max_q: int
    max_kv: int
    sinks: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor
    scores: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    tail_start: torch.Tensor | None = None
    block: int = 1
    slots: torch.Tensor | None = None
    mode: torch.Tensor | None = None
    lse_ref: torch.Tensor | None = None
    histogram: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        return self.kv_lens.shape[0]

    @property
    def device(self) -> torch.device:
        return self.q.device


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectCall:
    """Arguments of select_kv, checked: scores [B, S, N] float32, a column for `block` keys, and prefix_lens [B] int32.

    Outputs are written in place: indices [B, S, K] int32, counts [B, S] int32 and, where page_table [B, max_pages]
    int32 with its page_size is given, slots [B, S, K] int32 or int64. prefix_lens, sink and recent count keys.
    `union` neighbouring score rows give one output row, so that outputs have S / union of them.
    thresholds [B, S] float32, at any strides, belong to a Threshold of a tensor; histogram [B, S, HISTOGRAM_BINS] int32
    counts the row's scores where verification left it. Scores, indices, counts, slots, thresholds and histogram may all
    have a leading layer axis.
    """

    scores: torch.Tensor
    prefix_lens: torch.Tensor
    policy: Policy
    sink: int
    recent: int
    indices: torch.Tensor
    counts: torch.Tensor
    block: int = 1
    thresholds: torch.Tensor | None = None
    histogram: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    page_size: int = 1
    slots: torch.Tensor | None = None
    union: int = 1

    @property
    def device(self) -> torch.device:
        return self.scores.device

    @property
    def selection(self) -> Selection:
        return Selection(self.indices, self.counts, self.block, self.slots)

    @property
    def slots_per_page(self) -> int:
        """Indices of a page; a slot is the place in the cache of `block` keys."""
        return self.page_size // self.block

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, requests, score rows and score columns."""
        batch, rows, columns = self.scores.shape[-3:]
        return self.scores.shape[0] if self.scores.dim() == 4 else 1, batch, rows, columns

    @property
    def row_width(self) -> int:
        """Columns that hold what one score row selects."""
        return selection_width(self.policy, self.scores.shape[-1] * self.block, self.sink, self.recent, self.block)


Call = AttentionCall | SelectCall


class Kernel(Protocol):
    """One built kernel. Launching neither allocates nor synchronises; everything it writes is in the call."""

    @property
    def spec(self) -> KernelSpec: ...

    @property
    def plan(self) -> Plan: ...

    def workspace_bytes(self, call: Call) -> int: ...

    def launch(self, call: Call, workspace: torch.Tensor) -> None: ...
