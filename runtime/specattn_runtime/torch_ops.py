"""The operations as torch operators (`torch.ops.specattn.*`), opaque to torch.compile, with fake implementations.

They are functional: every result is a new tensor, and score columns past a request's prefix are 0. What the heads
cannot be read from (scale, softcap, window) comes as numbers: softcap 0 and window 0 mean none, max_kv -1 means what
the page table holds.
"""

from __future__ import annotations

import functools

import torch

from specattn_codegen import build, cpu_info, gpu_detect, space
from specattn_codegen.calls import select_call
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import Kernel
from specattn_codegen.policy import TopK
from specattn_codegen.render import render
from specattn_codegen.results import Selection, VerifyOutput
from specattn_codegen.spec import KernelSpec, ScoreSpec
from specattn_runtime.dispatch import Kernels, load_kernels


@functools.cache
def _kernels(heads: HeadConfig, device: torch.device, dtype: torch.dtype, page_size: int) -> Kernels:
    return load_kernels(heads, device=device, dtype=dtype, page_size=page_size, keep_scratch=False)


def _kernels_of(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> Kernels:
    if q.dim() != 3 or k_cache.dim() != 4 or v_cache.dim() != 4:
        raise SpecError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}: must be "
            "[total_q, Hq, D], [pages, page_size, Hkv, D] and [pages, page_size, Hkv, Dv]"
        )
    heads = HeadConfig(
        num_q_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim=q.shape[2],
        v_head_dim=v_cache.shape[3],
        scale=scale,
        softcap=softcap or None,
        window=window or None,
        sinks=sinks is not None,
    )
    return _kernels(heads, q.device, q.dtype, k_cache.shape[1])


def _score_shape(
    score_heads: str, k_cache: torch.Tensor, page_table: torch.Tensor, kv_lens: torch.Tensor, max_kv: int
) -> tuple[int, int, int]:
    columns = page_table.shape[1] * k_cache.shape[1] if max_kv < 0 else max_kv
    return kv_lens.shape[0], 1 if score_heads == "layer" else k_cache.shape[2], columns


@torch.library.custom_op("specattn::verify_attention", mutates_args=())
def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    score_rows: str = "",
    score_heads: str = "kv_head",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse and scores; scores is empty where score_rows is ""."""
    kernels = _kernels_of(q, k_cache, v_cache, sinks, scale, softcap, window)
    score = ScoreSpec(rows=score_rows, heads=score_heads) if score_rows else None  # pyright: ignore[reportArgumentType]
    shape = _score_shape(score_heads, k_cache, page_table, kv_lens, max_kv) if score else (0,)
    out = VerifyOutput(
        q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]),
        q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32),
        q.new_zeros(shape, dtype=torch.float32),
    )
    kernels.verify_attention(
        *(q, k_cache, v_cache, page_table, kv_lens, cu_q),
        max_q=max_q,
        max_kv=None if max_kv < 0 else max_kv,
        score=score,
        sinks=sinks,
        out=out,
    )
    return out.out, out.lse, q.new_zeros(0, dtype=torch.float32) if out.scores is None else out.scores


@verify_attention.register_fake
def _(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    score_rows: str = "",
    score_heads: str = "kv_head",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = _score_shape(score_heads, k_cache, page_table, kv_lens, max_kv) if score_rows else (0,)
    return (
        q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]),
        q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32),
        q.new_empty(shape, dtype=torch.float32),
    )


@torch.library.custom_op("specattn::sparse_attention", mutates_args=())
def sparse_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tail_start: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out and lse."""
    kernels = _kernels_of(q, k_cache, v_cache, sinks, scale, softcap, window)
    result = kernels.sparse_attention(
        *(q, k_cache, v_cache, page_table, kv_lens, cu_q),
        Selection(indices, counts),
        tail_start,
        max_q=max_q,
        max_kv=None if max_kv < 0 else max_kv,
        sinks=sinks,
    )
    return result.out, result.lse


@sparse_attention.register_fake
def _(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tail_start: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]),
        q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32),
    )


@functools.cache
def _selector(device_type: str) -> Kernel:
    """Scores carry no heads to look a pack up by, so the operator runs the safe default plan."""
    spec = KernelSpec(op="select_kv", heads=HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=1), selection="layer")
    arch = cpu_info.detect(measure=False) if device_type == "cpu" else gpu_detect.local()
    plan = space.default_plan(spec, arch, space.backends_for(arch)[0])
    return build.load(render(spec, plan, build.target_for(plan, arch)))


@torch.library.custom_op("specattn::select_topk", mutates_args=())
def select_topk(
    scores: torch.Tensor, prefix_lens: torch.Tensor, k: int, sink: int = 0, recent: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns indices [B, S, K], K = min(N, max(k, sink + recent)), and counts [B, S]."""
    call = select_call(scores, prefix_lens, TopK(k=k), sink=sink, recent=recent)
    kernel = _selector(scores.device.type)
    kernel.launch(call, torch.empty(kernel.workspace_bytes(call), dtype=torch.uint8, device=scores.device))
    return call.indices, call.counts


@select_topk.register_fake
def _(
    scores: torch.Tensor, prefix_lens: torch.Tensor, k: int, sink: int = 0, recent: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows, columns = scores.shape
    width = min(columns, max(k, sink + recent))
    return (
        torch.empty(batch, rows, width, dtype=torch.int32, device=scores.device),
        torch.empty(batch, rows, dtype=torch.int32, device=scores.device),
    )
