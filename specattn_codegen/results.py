"""What the operations return. Tensors only; no kernel and no plan."""

from __future__ import annotations

from typing import NamedTuple

import torch


class VerifyOutput(NamedTuple):
    """out [total_q, Hq, Dv]; lse [total_q, Hq] float32, natural log, sinks included; scores [B, S, max_prefix] float32.

    Score columns at and past a request's prefix are never written. Scores of pages have a column per page instead.
    histogram [B, S, HISTOGRAM_BINS] int32 counts the written scores by `bits >> 21` where the ScoreSpec asks for it.
    """

    out: torch.Tensor
    lse: torch.Tensor
    scores: torch.Tensor | None
    histogram: torch.Tensor | None = None


class SparseOutput(NamedTuple):
    """out [total_q, Hq, Dv]; lse [total_q, Hq] float32, natural log, sinks included."""

    out: torch.Tensor
    lse: torch.Tensor


class Selection(NamedTuple):
    """indices [B, S, K] int32, logical positions in blocks of `block` keys, ascending, -1 padded; counts [B, S] int32.

    slots [B, S, K] int32 or int64 are the same blocks' places in the paged cache, where they were asked for: attention
    then goes there, and not through the page table. All have a leading layer axis if the scores had one.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    block: int = 1
    slots: torch.Tensor | None = None
