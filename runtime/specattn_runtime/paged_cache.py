"""The paged KV cache of a batch: which pages each request owns, and where its next rows lie. Knows no attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The ragged rows of one forward pass, request after request, whose keys the cache has just made room for.

    requests, positions, offsets, slots [total_q] int64: a row's request, its position in the text, its number within
    the request's rows, its flat slot (page * page_size + slot in page). kv_lens, prefix_lens [B] int32: keys with and
    without the rows; cu_q [B + 1] int32; page_table [B, max_pages] int32, a view that later growth writes to.
    max_q and max_kv bound a request's rows and keys.
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


class PagedCache:
    """Keys and values of every layer, [layers, num_pages, page_size, Hkv, D] each, shared by the requests of a batch.

    A page belongs to one request or to the free list, never to both. Lengths live on the host, because the host
    decides how far a request goes; the page table and the pools live on the device.
    """

    def __init__(
        self,
        heads: HeadConfig,
        *,
        layers: int,
        num_pages: int,
        page_size: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size), ("batch", batch), ("layers", layers)):
            if value < 1:
                raise SpecError(f"{name}={value}: must be at least 1")
        self.page_size, self.num_pages = page_size, num_pages
        # Zeroed, so that the part of a page no request has written yet holds finite numbers.
        pool = (layers, num_pages, page_size, heads.num_kv_heads)
        self.keys = torch.zeros(*pool, heads.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*pool, heads.v_head_dim, dtype=dtype, device=device)
        self.page_table = torch.zeros(batch, num_pages, dtype=torch.int32, device=device)
        self.lengths = [0] * batch
        self._owned: list[list[int]] = [[] for _ in range(batch)]
        self._free = list(reversed(range(num_pages)))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages(self, request: int) -> tuple[int, ...]:
        """The pages of a request, in the order of its text."""
        return tuple(self._owned[request])

    def extend(self, counts: Sequence[int]) -> Rows:
        """Makes each request `counts[b]` keys longer and says where they lie. Raises SpecError when out of pages."""
        starts = list(self.lengths)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self._require_pages(ends)
        for request, end in enumerate(ends):
            self._resize(request, end)
        return self._rows(starts, ends)

    def rewind(self, request: int, length: int) -> None:
        """Forgets every key at and past `length`; pages that hold none of the others go back to the free list."""
        if not 0 <= length <= self.lengths[request]:
            raise SpecError(f"length={length}: request {request} can be rewound to 0 .. {self.lengths[request]} keys")
        self._resize(request, length)

    def free(self, request: int) -> None:
        """Forgets a request's keys altogether; its row stays in the batch as padding of length 0."""
        self.rewind(request, 0)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values [N, Hkv, D] into the flat slots [N] of one layer, over whatever was there."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _require_pages(self, ends: Sequence[int]) -> None:
        needed = sum(max(0, self._pages_for(end) - len(owned)) for end, owned in zip(ends, self._owned, strict=True))
        if needed > self.free_pages:
            raise SpecError(
                f"num_pages={self.num_pages}: the KV cache is full, {needed} more pages of {self.page_size} keys are "
                f"needed and {self.free_pages} are free; use more pages, fewer requests or shorter texts"
            )

    def _resize(self, request: int, length: int) -> None:
        owned = self._owned[request]
        while len(owned) > self._pages_for(length):
            self._free.append(owned.pop())
        grown = [self._free.pop() for _ in range(self._pages_for(length) - len(owned))]
        if grown:
            self.page_table[request, len(owned) : len(owned) + len(grown)] = torch.tensor(grown, dtype=torch.int32)
            owned.extend(grown)
        self.lengths[request] = length

    def _rows(self, starts: Sequence[int], ends: Sequence[int]) -> Rows:
        device = self.page_table.device
        spans = list(enumerate(zip(starts, ends, strict=True)))
        located = torch.tensor(
            [
                (request, position, position - start)
                for request, (start, end) in spans
                for position in range(start, end)
            ],
            dtype=torch.int64,
        ).view(-1, 3)
        requests, positions, offsets = located.to(device).unbind(dim=1)
        pages = self.page_table[requests, positions // self.page_size]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        return Rows(
            requests=requests,
            positions=positions,
            offsets=offsets,
            slots=pages * self.page_size + positions % self.page_size,
            kv_lens=torch.tensor(ends, dtype=torch.int32, device=device),
            prefix_lens=torch.tensor(starts, dtype=torch.int32, device=device),
            cu_q=torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32),
            page_table=self.page_table,
            max_q=max(1, *counts),
            max_kv=max(1, *ends),
        )
