"""The three operations the decode loop drives, as it uses them; shapes and meaning are those of the kernel contract."""

from __future__ import annotations

from typing import Protocol

import torch

from specattn_codegen.heads import HeadConfig
from specattn_codegen.policy import Policy
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_codegen.spec import ScoreSpec


class AttentionKernels(Protocol):
    """q [total_q, Hq, D]; caches [num_pages, page_size, Hkv, D]; the rest [B, max_pages], [B] and [B + 1] int32."""

    @property
    def heads(self) -> HeadConfig: ...

    def verify_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        *,
        max_q: int,
        max_kv: int | None = None,
        score: ScoreSpec | None = None,
        lse_ref: torch.Tensor | None = None,
        out: VerifyOutput | None = None,
    ) -> VerifyOutput:
        """Causal attention of each request's last rows over its whole cache, with scores of its prefix keys; in `out`,
        or in tensors of its own."""
        ...

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
        """The critical keys of each score row, in blocks; the first `sink` and last `recent` always among them."""
        ...

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
        max_q: int,
        max_kv: int | None = None,
    ) -> SparseOutput:
        """Causal attention over the selected keys below tail_start and every key from there on."""
        ...
