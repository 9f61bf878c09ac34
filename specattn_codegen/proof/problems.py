"""Inputs for checking and timing kernels, from a seed: paged, ragged and poisoned wherever a kernel must not look.

Unused cache slots hold NaN, page-table entries past a length hold wild numbers, and score columns past a prefix
hold NaN, so that a kernel which follows or reads any of them gives itself away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.spec import KernelSpec, Workload

Layout = Literal["nhd", "hnd", "interleaved"]
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """Inputs of verify_attention, sparse_attention and mixed_attention, in which every other request drafts; shapes as
    in kernel.AttentionCall."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    cu_q: torch.Tensor
    max_q: int
    max_kv: int
    sinks: torch.Tensor | None
    indices: torch.Tensor | None
    counts: torch.Tensor | None
    tail_start: torch.Tensor
    block: int = 1
    slots: torch.Tensor | None = None
    mode: torch.Tensor | None = None
    lse_ref: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


def _empty_cache(pages: int, page_size: int, heads: int, dim: int, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN-filled K and V views [pages, page_size, heads, dim] over the asked memory layout."""
    if layout == "nhd":
        pool = torch.full((2, pages, page_size, heads, dim), math.nan)
        return pool[0], pool[1]
    if layout == "hnd":
        pool = torch.full((2, pages, heads, page_size, dim), math.nan)
        return pool[0].transpose(1, 2), pool[1].transpose(1, 2)
    if layout == "interleaved":
        pool = torch.full((pages, page_size, heads, 2 * dim), math.nan)
        return pool[..., :dim], pool[..., dim:]
    raise SpecError(f"layout={layout!r}: must be one of nhd, hnd, interleaved")


def _page_table(kv_lens: Sequence[int], page_size: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Distinct, shuffled pages for every request; wild entries past each length."""
    needed = [-(-max(0, length) // page_size) for length in kv_lens]
    total = sum(needed) + 3
    order = torch.randperm(total, generator=generator)
    table = torch.full((len(kv_lens), max([1, *needed]) + 1), 2**31 - 1, dtype=torch.int32)
    table[:, 1::2] = -1
    taken = 0
    for request, count in enumerate(needed):
        table[request, :count] = order[taken : taken + count].int()
        taken += count
    return table, total


def _selection(
    spec: KernelSpec, tails: Sequence[int], budget: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ascending selections out of `tails` indices, one per selection row, -1 padded."""
    indices = torch.full((len(tails), spec.selection_heads, max(1, budget)), -1, dtype=torch.int32)
    counts = torch.zeros(len(tails), spec.selection_heads, dtype=torch.int32)
    for request, tail in enumerate(tails):
        for row in range(spec.selection_heads):
            count = min(budget, max(0, tail))
            picked = torch.randperm(max(0, tail), generator=generator)[:count].sort().values
            indices[request, row, :count] = picked.int()
            counts[request, row] = count
    return indices, counts


def attention_problem(
    spec: KernelSpec,
    *,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    page_size: int,
    seed: int,
    budget: int = 0,
    block: int = 1,
    layout: Layout = "nhd",
    magnitude: float = 1.0,
) -> AttentionProblem:
    """A ragged problem on the CPU. `kv_lens` count the rows' own keys; `magnitude` scales q, so that softmax peaks;
    `budget` counts selected indices, of `block` keys each."""
    generator = torch.Generator().manual_seed(seed)
    heads, dtype, cache_dtype = spec.heads, TORCH_DTYPES[spec.dtype], TORCH_DTYPES[spec.cache_dtype]
    table, pages = _page_table(kv_lens, page_size, generator)
    dim = max(heads.head_dim, heads.v_head_dim)
    k_cache, v_cache = _empty_cache(pages, page_size, heads.num_kv_heads, dim, layout)
    for request, length in enumerate(kv_lens):
        for position in range(0, max(0, length), page_size):
            page, used = int(table[request, position // page_size]), min(page_size, length - position)
            k_cache[page, :used] = torch.randn(used, heads.num_kv_heads, dim, generator=generator)
            v_cache[page, :used] = torch.randn(used, heads.num_kv_heads, dim, generator=generator)
    total_q = sum(q_lens)
    q = torch.randn(total_q, heads.num_q_heads, heads.head_dim, generator=generator) * magnitude
    tails = [length - rows for rows, length in zip(q_lens, kv_lens, strict=True)]
    indices, counts = (
        _selection(spec, [-(-tail // block) for tail in tails], budget, generator) if spec.selection else (None, None)
    )
    return AttentionProblem(
        q=q.to(dtype),
        k_cache=_same_layout(k_cache, cache_dtype)[..., : heads.head_dim],
        v_cache=_same_layout(v_cache, cache_dtype)[..., : heads.v_head_dim],
        page_table=table,
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
        cu_q=torch.tensor([0, *q_lens]).cumsum(0).int(),
        max_q=max([1, *q_lens]),
        max_kv=table.shape[1] * page_size,
        sinks=torch.randn(heads.num_q_heads, generator=generator) if heads.sinks else None,
        indices=indices,
        counts=counts,
        tail_start=torch.tensor([max(0, tail) for tail in tails], dtype=torch.int32),
        block=block,
        mode=torch.arange(len(q_lens), dtype=torch.int32) % 2 if spec.op == "mixed_attention" else None,
        lse_ref=_references(spec, q_lens, kv_lens, generator),
        k_scale=torch.rand(heads.num_kv_heads, generator=generator) + 0.5 if spec.is_float8 else None,
        v_scale=torch.rand(1, generator=generator) + 0.5 if spec.is_float8 else None,
    )


def _references(
    spec: KernelSpec, q_lens: Sequence[int], kv_lens: Sequence[int], generator: torch.Generator
) -> torch.Tensor | None:
    """References off by a few units either way, and here and there none at all: infinite or NaN."""
    if spec.score is None or spec.score.normaliser != "reference":
        return None
    keys = torch.tensor(kv_lens).clamp_min(1).repeat_interleave(torch.tensor(q_lens))
    noise = 2.0 * torch.randn(len(keys), spec.heads.num_q_heads, generator=generator)
    references = keys.log()[:, None] + noise
    for start, wild in enumerate((math.nan, math.inf, -math.inf)):
        references.view(-1)[5 + start :: 29] = wild
    return references


def _same_layout(cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts the dtype and keeps the strides."""
    converted = torch.empty_strided(cache.shape, cache.stride(), dtype=dtype)
    converted.copy_(cache)
    return converted


def workload_problem(spec: KernelSpec, workload: Workload, *, page_size: int, seed: int) -> AttentionProblem:
    """Every request as long as the workload says; for checking a candidate at its own size."""
    return attention_problem(
        spec,
        q_lens=[workload.q_len] * workload.batch,
        kv_lens=[workload.kv_len] * workload.batch,
        page_size=page_size,
        seed=seed,
        budget=workload.budget,
    )


def timing_problem(
    spec: KernelSpec, workload: Workload, *, page_size: int, seed: int, device: str, block: int = 1
) -> AttentionProblem:
    """As workload_problem, made on `device` and without poison, as gigabytes of keys take the host too long: for timing
    alone. Pages are shuffled all the same. The budget stays in keys where an index names a `block` of them."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, batch, q_len = spec.heads, workload.batch, workload.q_len
    pages = -(-workload.kv_len // page_size)
    slots = (batch * pages, page_size, heads.num_kv_heads)
    tail = workload.kv_len - q_len
    total_q = batch * q_len

    def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        drawn = torch.bfloat16 if dtype.itemsize == 1 else dtype  # 8-bit floats are not drawn, they are converted to
        return torch.randn(*shape, generator=generator, dtype=drawn, device=device).to(dtype)

    def integers(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    indices = counts = None
    if spec.selection:
        blocks = tail // block
        count = min(-(-workload.budget // block), blocks)
        indices = _ascending(batch, spec.selection_heads, count, blocks, generator)
        counts = torch.full(indices.shape[:2], count, dtype=torch.int32, device=device)
    cache_dtype = TORCH_DTYPES[spec.cache_dtype]
    has_reference = spec.score is not None and spec.score.normaliser == "reference"
    ones = torch.ones(heads.num_kv_heads, device=device) if spec.is_float8 else None
    return AttentionProblem(
        q=randn(total_q, heads.num_q_heads, heads.head_dim, dtype=TORCH_DTYPES[spec.dtype]),
        k_cache=randn(*slots, heads.head_dim, dtype=cache_dtype),
        v_cache=randn(*slots, heads.v_head_dim, dtype=cache_dtype),
        page_table=torch.randperm(batch * pages, generator=generator, device=device).int().view(batch, pages),
        kv_lens=integers([workload.kv_len] * batch),
        cu_q=integers(range(0, total_q + 1, q_len)),
        max_q=q_len,
        max_kv=workload.kv_len,
        sinks=randn(heads.num_q_heads, dtype=torch.float32) if heads.sinks else None,
        indices=indices,
        counts=counts,
        tail_start=integers([tail] * batch),
        block=block,
        mode=integers([request % 2 for request in range(batch)]) if spec.op == "mixed_attention" else None,
        # About what a row's log-sum-exp is: so many keys, logits of variance 1.
        lse_ref=torch.full((total_q, heads.num_q_heads), math.log(workload.kv_len) + 0.5, device=device)
        if has_reference
        else None,
        k_scale=ones,
        v_scale=ones,
    )


def _ascending(batch: int, rows: int, count: int, keys: int, generator: torch.Generator) -> torch.Tensor:
    """Random selections of `count` out of `keys` [batch, rows, max(1, count)] int32, ascending."""
    device = generator.device
    if not count:
        return torch.full((batch, rows, 1), -1, dtype=torch.int32, device=device)
    drawn = torch.rand(batch, rows, keys, generator=generator, device=device)
    return drawn.topk(count, dim=-1).indices.sort(dim=-1).values.int()


def random_scores(batch: int, score_rows: int, prefix_lens: Sequence[int], columns: int, seed: int) -> torch.Tensor:
    """Heavy-tailed attention-like scores [batch, score_rows, columns] float32 with NaN past each prefix."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.exp(3.0 * torch.randn(batch, score_rows, columns, generator=generator) - 8.0)
    for request, prefix in enumerate(prefix_lens):
        scores[request, :, max(0, prefix) :] = math.nan
    return scores
