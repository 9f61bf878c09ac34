"""FlashInfer over our pages, where it is installed; where it is not, or refuses, it says what stopped it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from specattn_bench.timing import Launch
from specattn_codegen.heads import HeadConfig
from specattn_codegen.proof.problems import AttentionProblem
from specattn_codegen.spec import Workload

SCRATCH_BYTES = 256 << 20  # what its wrappers ask for


def _flashinfer() -> ModuleType:
    """Raises ImportError. Imported when it is asked for, as it may be absent and compiles what it is asked for."""
    return importlib.import_module("flashinfer")


def makers(heads: HeadConfig, workload: Workload) -> dict[str, Callable[[AttentionProblem], Launch]]:
    """Its decoding kernels for one row, and those for several; the latter serve one row as well."""
    found: dict[str, Callable[[AttentionProblem], Launch]] = {
        "FlashInfer prefill": lambda problem: _prefill(heads, workload, problem)
    }
    if workload.q_len == 1:
        found["FlashInfer decode"] = lambda problem: _decode(heads, workload, problem)
    return found


def page_tables(problem: AttentionProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its page table: starts [B + 1], pages one request after the other, keys on each request's last page."""
    page_size = problem.k_cache.shape[1]
    counts = (problem.kv_lens + page_size - 1) // page_size
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    used = torch.arange(problem.page_table.shape[1], device=counts.device) < counts[:, None]
    return starts, problem.page_table[used].contiguous(), (problem.kv_lens - 1) % page_size + 1


def _decode(heads: HeadConfig, workload: Workload, problem: AttentionProblem) -> Launch:
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=problem.q.device)
    wrapper = _flashinfer().BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
    wrapper.plan(
        *page_tables(problem),
        heads.num_q_heads,
        heads.num_kv_heads,
        heads.head_dim,
        problem.k_cache.shape[1],
        q_data_type=problem.q.dtype,
        kv_data_type=problem.k_cache.dtype,
        sm_scale=heads.scale,
    )
    q = problem.q.view(workload.batch, heads.num_q_heads, heads.head_dim)
    return lambda: wrapper.run(q, (problem.k_cache, problem.v_cache))


def _prefill(heads: HeadConfig, workload: Workload, problem: AttentionProblem) -> Launch:
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=problem.q.device)
    wrapper = _flashinfer().BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD")
    wrapper.plan(
        problem.cu_q,
        *page_tables(problem),
        heads.num_q_heads,
        heads.num_kv_heads,
        heads.head_dim,
        problem.k_cache.shape[1],
        causal=workload.q_len > 1,
        sm_scale=heads.scale,
        q_data_type=problem.q.dtype,
        kv_data_type=problem.k_cache.dtype,
    )
    return lambda: wrapper.run(problem.q, (problem.k_cache, problem.v_cache))


def top_k(scores: torch.Tensor, count: int) -> Launch:
    """Its top-k with the translation of positions to pages, rows of scores [..., N] one beside the other."""
    transform = _flashinfer().top_k_page_table_transform
    rows = scores.flatten(0, -2)
    table = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device).expand(rows.shape).contiguous()
    lengths = torch.full((rows.shape[0],), rows.shape[1], dtype=torch.int32, device=rows.device)
    return lambda: transform(rows, table, lengths, count)
