"""The least an operation can take: the bytes it must move and the operations it must do, on any processor."""

from __future__ import annotations

from dataclasses import dataclass

from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import HISTOGRAM_BINS, KernelSpec, Workload

SCORE_BYTES = 4
INDEX_BYTES = 4
LSE_BYTES = 4
COUNT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """memory_bytes: every input read once, every output written once; operations: multiply and add count as two."""

    memory_bytes: int
    operations: int


def keys_read(spec: KernelSpec, workload: Workload) -> int:
    """Keys of one request and KV head that take part in the attention."""
    if spec.op == "sparse_attention":
        return min(workload.budget + workload.q_len, workload.kv_len)
    if spec.heads.window is None:
        return workload.kv_len
    return min(workload.kv_len, spec.heads.window + workload.q_len - 1)


def least_work(spec: KernelSpec, workload: Workload) -> Work:
    """What no implementation can avoid, with every key read once however many query heads share it."""
    heads, batch = spec.heads, workload.batch
    rows = batch * spec.selection_heads
    prefix = workload.kv_len - workload.q_len
    if spec.op == "select_kv":
        return Work(
            memory_bytes=rows * (prefix * SCORE_BYTES + (workload.budget + 1) * INDEX_BYTES), operations=rows * prefix
        )
    keys = keys_read(spec, workload)
    total_q = batch * workload.q_len * heads.num_q_heads
    moved = batch * keys * heads.num_kv_heads * (heads.head_dim + heads.v_head_dim) * spec.cache_bytes
    moved += total_q * ((heads.head_dim + heads.v_head_dim) * spec.dtype_bytes + LSE_BYTES)
    moved += rows * score_bytes(spec, prefix) + total_q * LSE_BYTES * _has_reference(spec)
    moved += rows * workload.budget * INDEX_BYTES if spec.selection else 0
    return Work(memory_bytes=moved, operations=2 * total_q * keys * (heads.head_dim + heads.v_head_dim))


def score_bytes(spec: KernelSpec, prefix: int) -> int:
    """Of one row of scores and its histogram. Where the page size is known only at run time its scores are left out."""
    if spec.score is None:
        return 0
    counts = HISTOGRAM_BINS * COUNT_BYTES if spec.score.histogram else 0
    if spec.score.by_page and not spec.page_size:
        return counts
    return spec.score.columns(prefix, spec.page_size) * SCORE_BYTES + counts


def _has_reference(spec: KernelSpec) -> bool:
    return spec.score is not None and spec.score.normaliser == "reference"


def floor_us(spec: KernelSpec, workload: Workload, arch: Arch) -> float:
    """The roofline (Williams, Waterman and Patterson, CACM 2009): no run beats its bytes or its operations."""
    work = least_work(spec, workload)
    tflops = arch.fp32_tflops if spec.dtype == "float32" else max(arch.bf16_tflops, arch.fp32_tflops)
    return max(work.memory_bytes / (arch.bandwidth_gbs * 1e3), work.operations / (tflops * 1e6))
