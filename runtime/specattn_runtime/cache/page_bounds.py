"""The least and greatest key of every page, and what a query can score in it at most (Quest, arXiv 2406.10774)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


class PageBounds:
    """low, high [layers, num_pages, Hkv, D]: over the keys a page holds, for every dimension apart. Views of one tensor
    in which the pages of a head lie together and a page's two bounds side by side, as products read them.

    A page's bounds cover its first keys, as many as its owner has: `cover` sets them anew before keys are added behind
    those that remain, so that what a rewind took back leaves no trace.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        """keys [layers, num_pages, page_size, Hkv, D]: the pool, which is read again where keys were taken back."""
        self._keys = keys
        layers, pages, _, heads, head_dim = keys.shape
        self._both = keys.new_empty(layers, heads, pages, 2 * head_dim)
        self.high, self.low = self._both.transpose(1, 2).split(head_dim, dim=-1)
        self.low.fill_(math.inf)
        self.high.fill_(-math.inf)

    def grow(self, keys: torch.Tensor) -> None:
        """The pool has moved and has more pages, which are empty."""
        bigger = PageBounds(keys)
        bigger.low[:, : self.low.shape[1]], bigger.high[:, : self.high.shape[1]] = self.low, self.high
        self._keys, self._both, self.low, self.high = keys, bigger._both, bigger.low, bigger.high

    def cover(self, kept: Mapping[int, int]) -> None:
        """Sets the bounds of each page to those of its first `kept[page]` keys, in every layer."""
        if not kept:
            return
        pages = torch.tensor(list(kept), device=self._keys.device)
        held = self._keys[:, pages]  # [layers, pages, page_size, Hkv, D]
        counts = torch.tensor(list(kept.values()), device=held.device)
        gone = (torch.arange(held.shape[2], device=held.device) >= counts[:, None])[:, :, None, None]
        self.low[:, pages] = held.masked_fill(gone, math.inf).amin(dim=2)
        self.high[:, pages] = held.masked_fill(gone, -math.inf).amax(dim=2)

    def clear(self, pages: Sequence[int]) -> None:
        """The pages are empty."""
        self.low[:, list(pages)], self.high[:, list(pages)] = math.inf, -math.inf

    def add(self, layer: int, pages: torch.Tensor, keys: torch.Tensor) -> None:
        """keys [N, Hkv, D] were written to pages [N] of a layer."""
        places = pages[:, None, None].expand_as(keys)
        self.low[layer].scatter_reduce_(0, places, keys, "amin")
        self.high[layer].scatter_reduce_(0, places, keys, "amax")

    def of(self, page_table: torch.Tensor) -> RequestBounds:
        """A copy of the bounds that pages [B, P] of some requests have now, side by side."""
        return RequestBounds(self._both[:, :, page_table.long()].float())


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """bounds [layers, Hkv, B, P, 2 * D] float32: the greatest of every dimension and then the least. Columns past a
    request's pages may hold anything."""

    bounds: torch.Tensor

    def scores(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q [B, Hq, D] -> [B, Hkv, P] float32: no key of a page has a larger product with any query of the head's
        group."""
        bounds = self.bounds[layer]
        grouped = q.float().unflatten(1, (len(bounds), -1)).transpose(0, 1)
        signed = torch.cat([grouped.clamp_min(0.0), grouped.clamp_max(0.0)], dim=-1)  # [Hkv, B, group, 2 * D]
        return (signed @ bounds.transpose(2, 3)).amax(dim=2).transpose(0, 1).contiguous()
