"""Torch's own attention over contiguous caches, in the layouts people have; copies and masks are made outside the
timing. Each peer gives [Hq, rows, Dv] for every request, in its own layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from specattn_bench.timing import Launch, in_turn, turns
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof.problems import AttentionProblem

PLAIN = "SDPA, K/V repeated"  # what a model's repeat_kv leaves
WITH_SCORES = "matmuls, with scores"


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseInputs:
    """What peers read: q [B, Hq, rows, D]; k, v [B, Hkv, N, D] contiguous; mask [rows, N], 0 or -inf, None for one row.

    All requests have the same rows and keys.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    group: int
    scale: float

    @property
    def packed_q(self) -> torch.Tensor:
        """The query heads of a group as rows of their KV head: [B, Hkv, group * rows, D]."""
        batch, _, rows, dim = self.q.shape
        return self.q.reshape(batch, self.k.shape[1], self.group * rows, dim)

    @property
    def packed_mask(self) -> torch.Tensor | None:
        return None if self.mask is None else self.mask.repeat(self.group, 1)


def dense_inputs(heads: HeadConfig, problem: AttentionProblem) -> DenseInputs:
    batch, keys = problem.kv_lens.shape[0], int(problem.kv_lens[0])
    rows = problem.q.shape[0] // batch
    pages = problem.page_table[:, : -(-keys // problem.k_cache.shape[1])].long()
    k, v = (
        cache[pages].flatten(1, 2)[:, :keys].transpose(1, 2).contiguous()
        for cache in (problem.k_cache, problem.v_cache)
    )
    hidden = torch.ones(rows, keys, dtype=torch.bool, device=k.device).triu(keys - rows + 1)
    mask = torch.zeros_like(hidden, dtype=k.dtype).masked_fill(hidden, float("-inf")) if rows > 1 else None
    q = problem.q.view(batch, rows, heads.num_q_heads, heads.head_dim).transpose(1, 2).contiguous()
    return DenseInputs(q=q, k=k, v=v, mask=mask, group=heads.group, scale=heads.scale)


def sdpa_packed(inputs: DenseInputs) -> Launch:
    q, mask = inputs.packed_q, inputs.packed_mask
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, inputs.k, inputs.v, attn_mask=mask, scale=inputs.scale
    )


def sdpa_gqa(inputs: DenseInputs) -> Launch:
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, attn_mask=inputs.mask, scale=inputs.scale, enable_gqa=True
    )


def sdpa_repeated(inputs: DenseInputs) -> Launch:
    k, v = (cache.repeat_interleave(inputs.group, dim=1) for cache in (inputs.k, inputs.v))
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        inputs.q, k, v, attn_mask=inputs.mask, scale=inputs.scale
    )


def _weights(inputs: DenseInputs, scaled_q: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax weights [B, Hkv, group * rows, N] float32."""
    logits = torch.matmul(scaled_q, inputs.k.transpose(-1, -2))
    return torch.softmax(logits if mask is None else logits + mask, dim=-1, dtype=torch.float32)


def matmuls_packed(inputs: DenseInputs) -> Launch:
    scaled_q, mask = inputs.packed_q * inputs.scale, inputs.packed_mask
    return lambda: torch.matmul(_weights(inputs, scaled_q, mask).to(scaled_q.dtype), inputs.v)


def matmuls_with_scores(inputs: DenseInputs) -> Launch:
    """The scores all-kv_head, which torch's fused attention cannot give: [B, Hkv, N] besides the output."""
    scaled_q, mask = inputs.packed_q * inputs.scale, inputs.packed_mask

    def launch() -> tuple[torch.Tensor, torch.Tensor]:
        weights = _weights(inputs, scaled_q, mask)
        return torch.matmul(weights.to(scaled_q.dtype), inputs.v), weights.mean(dim=2)

    return launch


PEERS: dict[str, Callable[[DenseInputs], Launch]] = {
    "SDPA, group as rows": sdpa_packed,
    "SDPA, enable_gqa": sdpa_gqa,
    PLAIN: sdpa_repeated,
    "matmuls, group as rows": matmuls_packed,
    WITH_SCORES: matmuls_with_scores,
}


def peer_launches(heads: HeadConfig, problem: AttentionProblem, arch: Arch) -> dict[str, Callable[[], None]]:
    """Every peer over copies of the data, enough of them that a call's data is in no cache."""
    first = dense_inputs(heads, problem)
    count, turn = turns(first.k.nbytes + first.v.nbytes, arch)
    copies = [first, *(replace(first, k=first.k.clone(), v=first.v.clone()) for _ in range(count - 1))]
    return {name: in_turn([make(inputs) for inputs in copies], turn) for name, make in PEERS.items()}
