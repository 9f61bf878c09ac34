"""Gathering the selected keys with torch's own operations, then torch's attention, in the layouts people keep a cache
in. Indices, masks and layouts are made outside the timing. Each peer gives [1, Hkv, group * rows, Dv]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from specattn_bench.sparse_series import Case
from specattn_bench.timing import Launch
from specattn_codegen.heads import HeadConfig
from specattn_codegen.proof.problems import AttentionProblem

Tensors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """One request's keys in every layout that a peer reads.

    heads_first  K and V [Hkv, N, D]
    keys_first   K and V [N, Hkv, D], as they come out of a projection
    together     [N, Hkv, D + Dv], a key's K and V side by side
    """

    heads_first: Tensors
    keys_first: Tensors
    together: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """What a peer attends to: the selection's blocks, and those that the tail touches.

    q       [1, Hkv, group * rows, D], the query heads of a group as rows of their KV head
    blocks  [Hkv, M] places in blocks of `block` keys; equal rows where heads share them
    mask    [group * rows, M * block] of 0 and -inf, None where every row sees every key
    """

    q: torch.Tensor
    blocks: torch.Tensor
    block: int
    mask: torch.Tensor | None
    scale: float
    per_head: bool

    @property
    def keys(self) -> torch.Tensor:
        """The blocks' keys one by one, [Hkv, M * block]."""
        return (self.blocks[..., None] * self.block + torch.arange(self.block)).flatten(1)


def caches_of(problem: AttentionProblem) -> Caches:
    keys = int(problem.kv_lens[0])
    pages = problem.page_table[0, : -(-keys // problem.k_cache.shape[1])].long()
    k, v = (cache[pages].flatten(0, 1)[:keys].contiguous() for cache in (problem.k_cache, problem.v_cache))
    return Caches(
        heads_first=(k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()),
        keys_first=(k, v),
        together=torch.cat([k, v], dim=-1),
    )


def gathering_of(case: Case, heads: HeadConfig, q: torch.Tensor, indices: torch.Tensor) -> Gathering:
    """q [rows, Hq, D] and a selection's indices [1, S, K], of blocks that end before the tail."""
    rows, dim = q.shape[0], q.shape[-1]
    tail = torch.arange(case.tail_start // case.block, case.keys // case.block)
    chosen = indices[0].long()
    blocks = torch.cat([chosen, tail.expand(chosen.shape[0], -1)], dim=1)
    positions = (tail[:, None] * case.block + torch.arange(case.block)).flatten()
    row_positions = torch.arange(case.tail_start, case.keys)[:, None]
    hidden = (positions < case.tail_start) | (positions > row_positions)
    mask = torch.zeros(rows, blocks.shape[1] * case.block, dtype=q.dtype)
    mask[:, -len(positions) :].masked_fill_(hidden, float("-inf"))
    packed = q.view(rows, heads.num_kv_heads, heads.group, dim).permute(1, 2, 0, 3)
    return Gathering(
        q=packed.reshape(1, heads.num_kv_heads, heads.group * rows, dim).contiguous(),
        blocks=blocks.expand(heads.num_kv_heads, -1),
        block=case.block,
        mask=mask.repeat(heads.group, 1) if bool(hidden.any()) else None,
        scale=heads.scale,
        per_head=case.selection == "per-head",
    )


Take = Callable[[torch.Tensor], torch.Tensor]  # of a layout's K, V or both: [Hkv, M * block, D]


def attend(gathering: Gathering, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """k, v [Hkv, M * block, D]."""
    return torch.nn.functional.scaled_dot_product_attention(
        gathering.q, k[None], v[None], attn_mask=gathering.mask, scale=gathering.scale
    )


def multiply(gathering: Gathering, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by products and a softmax."""
    logits = torch.matmul(gathering.q[0] * gathering.scale, k.transpose(1, 2))
    weights = torch.softmax(logits if gathering.mask is None else logits + gathering.mask, dim=-1)
    return torch.matmul(weights, v)[None]


def in_blocks(cache: torch.Tensor, block: int) -> torch.Tensor:
    """[Hkv, N, D] as [Hkv, N / block, block * D]."""
    return cache.view(cache.shape[0], cache.shape[1] // block, -1)


def take_by_gather(gathering: Gathering) -> Take:
    at = gathering.blocks[..., None]

    def take(cache: torch.Tensor) -> torch.Tensor:
        blocks = in_blocks(cache, gathering.block)
        return blocks.gather(1, at.expand(-1, -1, blocks.shape[2])).view(cache.shape[0], -1, cache.shape[2])

    return take


def take_by_index(gathering: Gathering) -> Take:
    heads, blocks = torch.arange(gathering.blocks.shape[0])[:, None], gathering.blocks.contiguous()
    return lambda cache: in_blocks(cache, gathering.block)[heads, blocks].view(cache.shape[0], -1, cache.shape[2])


def take_rows_of_heads(gathering: Gathering, keys: int) -> Take:
    """From heads first: a row is a head's block."""
    per_head = torch.arange(gathering.blocks.shape[0])[:, None] * (keys // gathering.block)
    rows = (gathering.blocks + per_head).flatten()

    def take(cache: torch.Tensor) -> torch.Tensor:
        chosen = in_blocks(cache, gathering.block).flatten(0, 1).index_select(0, rows)
        return chosen.view(cache.shape[0], -1, cache.shape[2])

    return take


def take_rows_of_keys(gathering: Gathering) -> Take:
    """From keys first: a row is a block of all heads where they share the selection, else one head's key."""
    heads = gathering.blocks.shape[0]
    if gathering.per_head:
        rows = (gathering.keys * heads + torch.arange(heads)[:, None]).flatten()
        return lambda cache: cache.flatten(0, 1).index_select(0, rows).view(heads, -1, cache.shape[2])
    blocks = gathering.blocks[0].contiguous()

    def take(cache: torch.Tensor) -> torch.Tensor:
        chosen = cache.view(cache.shape[0] // gathering.block, -1).index_select(0, blocks)
        return chosen.view(-1, heads, cache.shape[2]).transpose(0, 1)

    return take


def gathered(caches: Caches, gathering: Gathering) -> Launch:
    (k, v), take = caches.heads_first, take_by_gather(gathering)
    return lambda: attend(gathering, take(k), take(v))


def indexed(caches: Caches, gathering: Gathering) -> Launch:
    (k, v), take = caches.heads_first, take_by_index(gathering)
    return lambda: attend(gathering, take(k), take(v))


def selected_heads_first(caches: Caches, gathering: Gathering) -> Launch:
    (k, v), take = caches.heads_first, take_rows_of_heads(gathering, caches.keys_first[0].shape[0])
    return lambda: attend(gathering, take(k), take(v))


def selected_keys_first(caches: Caches, gathering: Gathering) -> Launch:
    (k, v), take = caches.keys_first, take_rows_of_keys(gathering)
    return lambda: attend(gathering, take(k), take(v))


def selected_together(caches: Caches, gathering: Gathering) -> Launch:
    take, dim = take_rows_of_keys(gathering), gathering.q.shape[-1]

    def launch() -> torch.Tensor:
        both = take(caches.together)
        return attend(gathering, both[..., :dim], both[..., dim:])

    return launch


def multiplied(caches: Caches, gathering: Gathering) -> Launch:
    (k, v), take = caches.heads_first, take_rows_of_heads(gathering, caches.keys_first[0].shape[0])
    return lambda: multiply(gathering, take(k), take(v))


PEERS: Mapping[str, Callable[[Caches, Gathering], Launch]] = {
    "gather, heads first, SDPA": gathered,
    "indexing, heads first, SDPA": indexed,
    "index_select, heads first, SDPA": selected_heads_first,
    "index_select, keys first, SDPA": selected_keys_first,
    "index_select, K and V side by side, SDPA": selected_together,
    "index_select, heads first, matmuls": multiplied,
}
