"""Other engines' KV caches and tables as the kernels take them, and back. Caches are views; only tables are made anew.

The kernels read k_cache, v_cache [num_pages, page_size, Hkv, D] with any strides, page_table [B, max_pages] int32 and
kv_lens [B] int32. vLLM's block_table_tensor, seq_lens and query_start_loc are page_table, kv_lens and cu_q as they are,
and Rows.slots are its slot_mapping.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.spec import require_choice

VllmLayout = Literal["packed", "kv-first", "blocks-first"]
FlashInferLayout = Literal["NHD", "HND"]


class CacheView(NamedTuple):
    """k_cache [num_pages, page_size, Hkv, D] and v_cache [num_pages, page_size, Hkv, Dv] of one layer."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor


class PageList(NamedTuple):
    """FlashInfer's page tables: indptr [B + 1], indices [total pages] and last_page_len [B], int32. A request has
    indices[indptr[b] : indptr[b + 1]], all full but the last, which holds last_page_len[b] keys."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


class PageTable(NamedTuple):
    """page_table [B, max_pages] int32, 0 past a request's pages, and kv_lens [B] int32."""

    page_table: torch.Tensor
    kv_lens: torch.Tensor


def vllm_cache(kv_cache: torch.Tensor, layout: VllmLayout, *, head_dim: int | None = None) -> CacheView:
    """One layer's cache of vLLM.

    packed        [num_blocks, Hkv, block_size, D + Dv], since vllm-project/vllm#44455; head_dim is D where Dv differs
    kv-first      [2, num_blocks, block_size, Hkv, D]
    blocks-first  [num_blocks, 2, block_size, Hkv, D]
    """
    require_choice("layout", layout, get_args(VllmLayout))
    if layout != "packed":
        axis = 0 if layout == "kv-first" else 1
        _require_axes(kv_cache, 5, "kv_cache", pair=axis)
        return CacheView(*kv_cache.unbind(axis))
    _require_axes(kv_cache, 4, "kv_cache")
    both = kv_cache.shape[3]
    if head_dim is None and both % 2:
        raise SpecError(f"kv_cache packs {both} values a key: give head_dim, as K and V cannot share an odd number")
    head_dim = both // 2 if head_dim is None else head_dim
    if not 0 < head_dim < both:
        raise SpecError(f"head_dim={head_dim}: must leave some of the {both} values a key to V")
    keys, values = kv_cache.transpose(1, 2).split([head_dim, both - head_dim], dim=3)
    return CacheView(keys, values)


def sglang_cache(k_buffer: torch.Tensor, v_buffer: torch.Tensor, *, page_size: int = 1) -> CacheView:
    """One layer's buffers of SGLang, [num_slots, Hkv, D] each: a page a token, or pages of `page_size` tokens that its
    allocator keeps together."""
    for name, buffer in (("k_buffer", k_buffer), ("v_buffer", v_buffer)):
        _require_axes(buffer, 3, name)
        if page_size < 1 or buffer.shape[0] % page_size:
            raise SpecError(f"page_size={page_size}: must divide the {buffer.shape[0]} slots of {name}")
    keys, values = (buffer.unflatten(0, (-1, page_size)) for buffer in (k_buffer, v_buffer))
    return CacheView(keys, values)


def sglang_page_table(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, *, max_kv: int, page_size: int = 1
) -> torch.Tensor:
    """req_to_token [max_reqs, max_context], a token's slot, and req_pool_indices [B] -> page_table
    [B, ceil(max_kv / page_size)] int32. max_kv bounds the batch's keys. kv_lens are SGLang's seq_lens."""
    if not 1 <= max_kv <= req_to_token.shape[1]:
        raise SpecError(f"max_kv={max_kv}: must be 1 .. {req_to_token.shape[1]}, the tokens req_to_token has room for")
    first_slots = req_to_token[req_pool_indices.long(), :max_kv:page_size]
    return torch.div(first_slots, page_size, rounding_mode="floor").int()


def flashinfer_cache(
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], layout: FlashInferLayout = "NHD"
) -> CacheView:
    """One layer's cache of FlashInfer: [num_pages, 2, page_size, Hkv, D] (NHD) or [num_pages, 2, Hkv, page_size, D]
    (HND), or K and V apart without the axis of two."""
    require_choice("layout", layout, get_args(FlashInferLayout))
    if isinstance(kv_cache, torch.Tensor):
        _require_axes(kv_cache, 5, "kv_cache", pair=1)
        keys, values = kv_cache.unbind(1)
    else:
        keys, values = kv_cache
        _require_axes(keys, 4, "k_cache")
        _require_axes(values, 4, "v_cache")
    return CacheView(keys, values) if layout == "NHD" else CacheView(keys.transpose(1, 2), values.transpose(1, 2))


def page_table_of(pages: PageList, *, page_size: int, max_pages: int | None = None) -> PageTable:
    """FlashInfer's triple as a rectangular table. max_pages bounds a request's pages; None looks, waiting for a GPU."""
    counts = pages.indptr.diff()
    if max_pages is None:
        max_pages = max(1, int(counts.max())) if len(counts) else 1
    columns = torch.arange(max_pages, device=counts.device)
    held = columns < counts[:, None]
    places = torch.where(held, pages.indptr[:-1, None] + columns, 0).long()
    entries = pages.indices[places] if len(pages.indices) else places
    lengths = torch.where(counts > 0, (counts - 1) * page_size + pages.last_page_len, 0)
    return PageTable(torch.where(held, entries, 0).int(), lengths.int())


def page_list_of(page_table: torch.Tensor, kv_lens: torch.Tensor, *, page_size: int) -> PageList:
    """A rectangular table as FlashInfer's triple. A request without keys has no pages and a last_page_len of 0."""
    lengths = kv_lens.clamp_min(0)
    counts = torch.div(lengths + page_size - 1, page_size, rounding_mode="floor")
    held = torch.arange(page_table.shape[1], device=page_table.device) < counts[:, None]
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    last = torch.where(lengths > 0, (lengths - 1) % page_size + 1, 0)
    return PageList(indptr.int(), page_table[held].int(), last.int())


def _require_axes(tensor: torch.Tensor, axes: int, name: str, *, pair: int | None = None) -> None:
    """As many axes as the layout has, with K and V side by side in axis `pair`."""
    if tensor.dim() != axes or (pair is not None and tensor.shape[pair] != 2):
        where = "" if pair is None else f" with 2, for K and V, in axis {pair}"
        raise SpecError(f"{name} has shape {tuple(tensor.shape)}: this layout has {axes} axes{where}; name its layout")
