"""A generated problem as a call, for what proves and times kernels."""

from __future__ import annotations

import torch

from specattn_codegen.calls.attention import cache_scale
from specattn_codegen.calls.outputs import has_histogram, score_shape_of
from specattn_codegen.kernel import AttentionCall
from specattn_codegen.proof.problems import AttentionProblem
from specattn_codegen.spec import HISTOGRAM_BINS, KernelSpec


def problem_call(spec: KernelSpec, problem: AttentionProblem) -> AttentionCall:
    """The call of a generated problem; its outputs start as NaN, so that an element nobody writes is seen."""
    p, heads = problem, spec.heads
    total_q, batch = p.q.shape[0], p.kv_lens.shape[0]
    nan = float("nan")
    score_shape = score_shape_of(spec, batch, p.max_kv, p.k_cache.shape[1])
    scores = p.q.new_full(score_shape, nan, dtype=torch.float32) if score_shape else None
    histogram = None
    if score_shape and has_histogram(spec):
        histogram = p.q.new_full((*score_shape[:2], HISTOGRAM_BINS), -1, dtype=torch.int32)
    return AttentionCall(
        q=p.q,
        k_cache=p.k_cache,
        v_cache=p.v_cache,
        page_table=p.page_table,
        kv_lens=p.kv_lens,
        cu_q=p.cu_q,
        max_q=p.max_q,
        max_kv=p.max_kv,
        sinks=p.sinks,
        out=p.q.new_full((total_q, heads.num_q_heads, heads.v_head_dim), nan),
        lse=p.q.new_full((total_q, heads.num_q_heads), nan, dtype=torch.float32),
        scores=scores,
        indices=p.indices,
        counts=p.counts,
        tail_start=p.tail_start if p.indices is not None else None,
        block=p.block,
        slots=p.slots,
        mode=p.mode,
        lse_ref=p.lse_ref,
        histogram=histogram,
        k_scale=cache_scale(spec, "k_scale", p.k_scale, p.q.device),
        v_scale=cache_scale(spec, "v_scale", p.v_scale, p.q.device),
    )
