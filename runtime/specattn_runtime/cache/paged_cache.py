"""The paged KV cache of a batch: which pages each request holds, and where its next rows lie. Knows no attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import huge_pages
from specattn_runtime.cache.page_bounds import PageBounds
from specattn_runtime.cache.rows import Rows, ragged_rows


class PagedCache:
    """Keys and values of every layer, [layers, num_pages, page_size, Hkv, D] each, shared by the requests of a batch.

    A page is held by one request, by several that share a prefix, or by none. Only a page held once is written: a
    request that adds keys to a shared one gets its own copy first. Lengths live on the host, because the host decides
    how far a request goes; the page table and the pools live on the device.
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
        page_bounds: bool = False,
    ) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size), ("batch", batch), ("layers", layers)):
            if value < 1:
                raise SpecError(f"{name}={value}: must be at least 1")
        self.page_size, self.num_pages = page_size, num_pages
        # Zeroed, so that the part of a page no request has written yet holds finite numbers.
        pool = (layers, num_pages, page_size, heads.num_kv_heads)
        self.keys, self.values = (
            huge_pages.advise(torch.zeros(*pool, dim, dtype=dtype, device=device))
            for dim in (heads.head_dim, heads.v_head_dim)
        )
        self.bounds = PageBounds(self.keys) if page_bounds else None
        self.page_table = torch.zeros(batch, num_pages, dtype=torch.int32, device=device)
        self.lengths = [0] * batch
        self._held: list[list[int]] = [[] for _ in range(batch)]
        self._holders = [0] * num_pages  # requests that hold each page
        self._bounded = [0] * num_pages  # keys of each page that its bounds cover
        self._free = list(reversed(range(num_pages)))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages(self, request: int) -> tuple[int, ...]:
        """The pages of a request, in the order of its text."""
        return tuple(self._held[request])

    def pages_for(self, length: int) -> int:
        """Pages that hold `length` keys."""
        return -(-length // self.page_size)

    def extend(self, counts: Sequence[int]) -> Rows:
        """Makes each request `counts[b]` keys longer and says where they lie. Raises SpecError when out of pages."""
        starts = list(self.lengths)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self._require_pages(ends)
        growing = [request for request, count in enumerate(counts) if count]
        for request in growing:
            if starts[request] % self.page_size:
                self._own_last_page(request)
        self._bound_again(growing)
        for request in growing:
            self._resize(request, ends[request])
        return ragged_rows(starts, counts, self.page_table, self.page_size)

    def rewind(self, request: int, length: int) -> None:
        """Forgets every key at and past `length`; pages that nobody else holds go back to the free list."""
        if not 0 <= length <= self.lengths[request]:
            raise SpecError(f"length={length}: request {request} can be rewound to 0 .. {self.lengths[request]} keys")
        self._resize(request, length)

    def free(self, request: int) -> None:
        """Forgets a request's keys altogether; its row stays in the batch as padding of length 0."""
        self.rewind(request, 0)

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """Gives an empty request the first `length` keys of another, by default all, without copying any of them."""
        length = self.lengths[source] if length is None else length
        if not 0 <= length <= self.lengths[source]:
            raise SpecError(f"length={length}: request {source} has 0 .. {self.lengths[source]} keys to share")
        if not length:
            return
        if self.lengths[target]:
            raise SpecError(f"request {target} has {self.lengths[target]} keys: free it before it shares another's")
        pages = self._held[source][: self.pages_for(length)]
        self._hold(target, pages)
        self.lengths[target] = length

    def grow(self, num_pages: int) -> None:
        """Adds empty pages. Pools and page table move: views of them taken before no longer follow."""
        if num_pages < 1:
            raise SpecError(f"num_pages={num_pages}: must add at least 1 page")
        self.keys, self.values = (_grown(pool, num_pages) for pool in (self.keys, self.values))
        if self.bounds is not None:
            self.bounds.grow(self.keys)
        self.page_table = torch.nn.functional.pad(self.page_table, (0, num_pages))
        self._free = [*reversed(range(self.num_pages, self.num_pages + num_pages)), *self._free]
        self._holders += [0] * num_pages
        self._bounded += [0] * num_pages
        self.num_pages += num_pages

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values [N, Hkv, D] into the flat slots [N] of one layer, over whatever was there."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)
        if self.bounds is not None:
            self.bounds.add(layer, slots // self.page_size, keys)

    def _require_pages(self, ends: Sequence[int]) -> None:
        needed = sum(max(0, self.pages_for(end) - len(held)) for end, held in zip(ends, self._held, strict=True))
        needed += self._copies(ends)
        if needed > self.free_pages:
            raise SpecError(
                f"num_pages={self.num_pages}: the KV cache is full, {needed} more pages of {self.page_size} keys are "
                f"needed and {self.free_pages} are free; use more pages, fewer requests or shorter texts"
            )

    def _copies(self, ends: Sequence[int]) -> int:
        """Shared pages that requests will write to: all holders but the last one to do so need a copy."""
        holders: dict[int, int] = {}
        copies = 0
        for request, end in enumerate(ends):
            if end > self.lengths[request] and self.lengths[request] % self.page_size:
                page = self._held[request][-1]
                left = holders.setdefault(page, self._holders[page])
                copies += left > 1
                holders[page] = left - 1
        return copies

    def _own_last_page(self, request: int) -> None:
        shared = self._held[request][-1]
        if self._holders[shared] == 1:
            return
        own = self._free.pop()
        self.keys[:, own], self.values[:, own] = self.keys[:, shared], self.values[:, shared]
        self._bounded[own] = -1  # its bounds are those of whoever had the page before
        self._release([self._held[request].pop()])
        self._hold(request, [own])

    def _bound_again(self, requests: Sequence[int]) -> None:
        """Bounds of the pages that these requests are about to add to cover just the keys they have in them."""
        if self.bounds is None:
            return
        last = {
            self._held[request][-1]: self.lengths[request] % self.page_size
            for request in requests
            if self._held[request]
        }
        stale = {page: kept for page, kept in last.items() if kept and self._bounded[page] != kept}
        self.bounds.cover(stale)
        for page, kept in stale.items():
            self._bounded[page] = kept

    def _resize(self, request: int, length: int) -> None:
        held = self._held[request]
        kept, grows = self.pages_for(length), length > self.lengths[request]
        self._release(held[kept:][::-1])
        del held[kept:]
        fresh = [self._free.pop() for _ in range(kept - len(held))]
        if self.bounds is not None and grows:
            self.bounds.clear(fresh)
            first = self.lengths[request] // self.page_size
            for number in range(first, kept):
                page = (held + fresh)[number]
                self._bounded[page] = min(self.page_size, length - number * self.page_size)
        self._hold(request, fresh)
        self.lengths[request] = length

    def _hold(self, request: int, pages: Sequence[int]) -> None:
        """Puts pages at the end of a request's."""
        if not pages:
            return
        held = self._held[request]
        self.page_table[request, len(held) : len(held) + len(pages)] = torch.tensor(pages, dtype=torch.int32)
        held.extend(pages)
        for page in pages:
            self._holders[page] += 1

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)


def _grown(pool: torch.Tensor, num_pages: int) -> torch.Tensor:
    """[layers, pages, ...] with empty pages after its own."""
    layers, before, *page = pool.shape
    grown = huge_pages.advise(pool.new_zeros(layers, before + num_pages, *page))
    grown[:, :before] = pool
    return grown
