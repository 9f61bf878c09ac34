"""The decode loop's operations computed by the float64 oracle: slow, and the yardstick for losslessness."""

from __future__ import annotations

import torch

from specattn_codegen.heads import HeadConfig
from specattn_codegen.policy import Policy
from specattn_codegen.proof import reference
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_codegen.spec import ScoreSpec


class ReferenceKernels:
    """Takes any dtype, computes in float64, returns out in the dtype of q and lse and scores in float32."""

    def __init__(self, heads: HeadConfig) -> None:
        self.heads = heads

    def verify_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        *,
        max_q: int,  # noqa: ARG002 - bounds a kernel's grid; the oracle has none
        max_kv: int | None = None,
        score: ScoreSpec | None = None,
        lse_ref: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        out: VerifyOutput | None = None,  # noqa: ARG002 - the oracle makes its own
    ) -> VerifyOutput:
        found = reference.verify_attention(
            *(q, k_cache, v_cache, page_table, kv_lens, cu_q),
            heads=self.heads,
            score=score,
            max_kv=max_kv,
            sinks=sinks,
            lse_ref=lse_ref,
        )
        scores = None if found.scores is None else found.scores.float()
        histogram = reference.count_scores(scores) if scores is not None and score and score.histogram else None
        return VerifyOutput(found.out.to(q.dtype), found.lse.float(), scores, histogram)

    def select_kv(
        self,
        scores: torch.Tensor,
        prefix_lens: torch.Tensor,
        policy: Policy,
        *,
        sink: int = 0,
        recent: int = 0,
        block: int = 1,
    ) -> Selection:
        return reference.select_kv(scores, prefix_lens, policy, sink=sink, recent=recent, block=block)

    def sparse_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        selection: Selection,
        tail_start: torch.Tensor,
        *,
        max_q: int,  # noqa: ARG002
        max_kv: int | None = None,  # noqa: ARG002
        sinks: torch.Tensor | None = None,
    ) -> SparseOutput:
        out, lse = reference.sparse_attention(
            q, k_cache, v_cache, page_table, kv_lens, cu_q, selection, tail_start, heads=self.heads, sinks=sinks
        )
        return SparseOutput(out.to(q.dtype), lse.float())
