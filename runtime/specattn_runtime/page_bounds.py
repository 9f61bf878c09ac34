"""The least and greatest key of every page, and what a query can score in it at most (Quest, arXiv 2406.10774)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch


class PageBounds:
    """low, high [layers, num_pages, Hkv, D]: over the keys a page holds, for every dimension apart.

    A page's bounds cover its first keys, as many as its owner has: `cover` sets them anew before keys are added behind
    those that remain, so that what a rewind took back leaves no trace.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        """keys [layers, num_pages, page_size, Hkv, D]: the pool, which is read again where keys were taken back."""
        self._keys = keys
        self.low = torch.full_like(keys[:, :, 0], math.inf)
        self.high = torch.full_like(self.low, -math.inf)

    def grow(self, keys: torch.Tensor) -> None:
        """The pool has moved and has more pages, which are empty."""
        bigger = PageBounds(keys)
        bigger.low[:, : self.low.shape[1]], bigger.high[:, : self.high.shape[1]] = self.low, self.high
        self._keys, self.low, self.high = keys, bigger.low, bigger.high

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

    def scores(self, layer: int, q: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        """q [B, Hq, D] and page_table [B, P] -> [B, Hkv, P] float32: no key of a page has a larger product with any
        query of the head's group. Columns past a request's keys may hold anything."""
        pages = page_table.long()
        low, high = self.low[layer][pages].float(), self.high[layer][pages].float()  # [B, P, Hkv, D]
        grouped = q.float().unflatten(1, (low.shape[2], -1))
        most = torch.einsum("bhgd,bphd->bhgp", grouped.clamp_min(0.0), high)
        most += torch.einsum("bhgd,bphd->bhgp", grouped.clamp_max(0.0), low)
        return most.amax(dim=2)
