"""The ragged rows of one forward pass and where they lie in a paged cache. Knows no cache: a page table is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a pass, request after request.

    requests, positions, offsets, slots [total_q] int64: a row's request, its position in the text, its number within
    the request's rows, its flat slot (page * page_size + slot in page). kv_lens, prefix_lens [B] int32: keys with and
    without the rows; cu_q [B + 1] int32; page_table [B, max_pages] int32, a view that later growth writes to.
    max_q and max_kv bound a request's rows and keys. prefixes and counts [B] are its keys without the rows and its
    rows as the host knows them.
    """

    requests: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    slots: torch.Tensor
    kv_lens: torch.Tensor
    prefix_lens: torch.Tensor
    cu_q: torch.Tensor
    page_table: torch.Tensor
    max_q: int
    max_kv: int
    prefixes: tuple[int, ...]
    counts: tuple[int, ...]


def ragged_rows(prefixes: Sequence[int], counts: Sequence[int], page_table: torch.Tensor, page_size: int) -> Rows:
    """Rows of `counts[b]` tokens after `prefixes[b]` cached ones each, in the pages of page_table [B, max_pages]."""
    device = page_table.device
    ends = [prefix + count for prefix, count in zip(prefixes, counts, strict=True)]
    located = torch.tensor(
        [
            (request, prefix + offset, offset)
            for request, (prefix, count) in enumerate(zip(prefixes, counts, strict=True))
            for offset in range(count)
        ],
        dtype=torch.int64,
    ).view(-1, 3)
    requests, positions, offsets = located.to(device).unbind(dim=1)
    pages = page_table[requests, positions // page_size].long()
    return Rows(
        requests=requests,
        positions=positions,
        offsets=offsets,
        slots=pages * page_size + positions % page_size,
        kv_lens=torch.tensor(ends, dtype=torch.int32, device=device),
        prefix_lens=torch.tensor(prefixes, dtype=torch.int32, device=device),
        cu_q=torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32),
        page_table=page_table,
        max_q=max(1, *counts),
        max_kv=max(1, *ends),
        prefixes=tuple(prefixes),
        counts=tuple(counts),
    )
