"""What an attention call writes: its shapes, allocated where the caller gives nothing and checked where it does."""

from __future__ import annotations

import torch

from specattn_codegen.calls.tensors import require
from specattn_codegen.errors import SpecError
from specattn_codegen.results import SparseOutput, VerifyOutput
from specattn_codegen.spec import HISTOGRAM_BINS, KernelSpec, require_type

ScoreShape = tuple[int, int, int]


def score_shape_of(spec: KernelSpec, batch: int, max_kv: int, page_size: int) -> ScoreShape | None:
    """[B, S, columns] of the scores a spec asks for."""
    return (batch, spec.score_rows, spec.score.columns(max_kv, page_size)) if spec.score else None


def has_histogram(spec: KernelSpec) -> bool:
    return spec.score is not None and spec.score.histogram


def allocate_outputs(spec: KernelSpec, q: torch.Tensor, score_shape: ScoreShape | None) -> VerifyOutput:
    heads = spec.heads
    return VerifyOutput(
        q.new_empty(q.shape[0], heads.num_q_heads, heads.v_head_dim),
        q.new_empty(q.shape[0], heads.num_q_heads, dtype=torch.float32),
        q.new_empty(score_shape, dtype=torch.float32) if score_shape else None,
        q.new_empty((*score_shape[:2], HISTOGRAM_BINS), dtype=torch.int32)
        if score_shape and has_histogram(spec)
        else None,
    )


def check_outputs(
    spec: KernelSpec, q: torch.Tensor, score_shape: ScoreShape | None, out: VerifyOutput | SparseOutput
) -> None:
    require_type("out", out, (VerifyOutput, SparseOutput), "an output as the call returns it, or None to allocate one")
    heads = spec.heads
    require(out.out, "out.out", (q.shape[0], heads.num_q_heads, heads.v_head_dim), q.dtype, q.device)
    require(out.lse, "out.lse", (q.shape[0], heads.num_q_heads), torch.float32, q.device)
    if not out.lse.is_contiguous():
        raise SpecError(f"out.lse has strides {out.lse.stride()}: must be contiguous")
    if score_shape:
        if not isinstance(out, VerifyOutput) or out.scores is None:
            raise SpecError("out.scores is None: this call asks for scores; give a tensor for them or leave out= out")
        require(out.scores, "out.scores", score_shape, torch.float32, q.device)
        if has_histogram(spec):
            if out.histogram is None:
                raise SpecError("out.histogram is None: this call asks for one; give a tensor or leave out= out")
            require(out.histogram, "out.histogram", (*score_shape[:2], HISTOGRAM_BINS), torch.int32, q.device)
            if not out.histogram.is_contiguous():
                raise SpecError(f"out.histogram has strides {out.histogram.stride()}: must be contiguous")
