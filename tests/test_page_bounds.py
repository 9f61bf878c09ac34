"""Page bounds are those of the keys a request has, after whatever happened to its pages; no key scores above them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_codegen import HeadConfig, SpecError
from specattn_runtime.cache.paged_cache import PagedCache

HEADS = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=3)
PAGE = 4


def require_exact_bounds(cache: PagedCache, request: int) -> None:
    """Every page of a request against the keys it holds, in both layers."""
    assert cache.bounds is not None
    for number, page in enumerate(cache.pages(request)):
        count = min(PAGE, cache.lengths[request] - number * PAGE)
        for layer in range(2):
            held = cache.keys[layer, page, :count]
            assert torch.equal(cache.bounds.low[layer, page], held.amin(dim=0))
            assert torch.equal(cache.bounds.high[layer, page], held.amax(dim=0))


def append(cache: PagedCache, request: int, count: int, generator: torch.Generator) -> None:
    rows = cache.extend([count * (other == request) for other in range(len(cache.lengths))])
    for layer in range(2):
        keys = torch.randn(count, 2, 3, dtype=torch.float64, generator=generator)
        cache.write(layer, rows.slots, keys, keys)


STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "rewind", "free", "fork"]), st.integers(0, 2), st.integers(1, 9)), max_size=25
)


@settings(deadline=None, max_examples=60)
@given(STEPS)
def test_bounds_are_exact_whenever_keys_were_just_written(steps: list[tuple[str, int, int]]) -> None:
    cache = PagedCache(HEADS, layers=2, num_pages=40, page_size=PAGE, batch=3, dtype=torch.float64, page_bounds=True)
    generator = torch.Generator().manual_seed(0)
    for name, request, count in steps:
        if name == "append" and cache.lengths[request] + count <= 40:
            append(cache, request, count, generator)
            require_exact_bounds(cache, request)
        elif name == "rewind":
            cache.rewind(request, max(0, cache.lengths[request] - count))
        elif name == "free":
            cache.free(request)
        elif name == "fork" and not cache.lengths[request]:
            cache.fork((request + 1) % 3, request)
    for request in range(3):
        append(cache, request, 1, generator)
        require_exact_bounds(cache, request)


def test_a_rewound_key_leaves_no_trace_in_the_bounds() -> None:
    cache = PagedCache(HEADS, layers=1, num_pages=2, page_size=PAGE, batch=1, dtype=torch.float64, page_bounds=True)
    for values in ([1.0, 2.0], [9.0], [3.0]):
        if values == [3.0]:
            cache.rewind(0, 2)
        rows = cache.extend([len(values)])
        keys = torch.tensor(values, dtype=torch.float64)[:, None, None].expand(-1, 2, 3)
        cache.write(0, rows.slots, keys, keys)
    assert cache.bounds is not None
    assert cache.bounds.high[0, cache.pages(0)[0]].unique().tolist() == [3.0]


def test_a_pages_score_is_the_most_any_query_of_the_group_could_give_a_key_between_the_bounds() -> None:
    cache = PagedCache(HEADS, layers=2, num_pages=9, page_size=PAGE, batch=2, dtype=torch.float64, page_bounds=True)
    generator = torch.Generator().manual_seed(1)
    for request, count in ((0, 14), (1, 7)):
        append(cache, request, count, generator)
    q = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    assert cache.bounds is not None
    found = cache.bounds.of(cache.page_table[:, :4]).scores(1, q)
    for request in range(2):
        for number, page in enumerate(cache.pages(request)):
            low, high = (
                cache.bounds.low[1, page].repeat_interleave(2, 0),
                cache.bounds.high[1, page].repeat_interleave(2, 0),
            )
            wanted = torch.maximum(q[request] * low, q[request] * high).sum(dim=1).view(2, 2).amax(dim=1)
            assert found[request, :, number].tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
            count = min(PAGE, cache.lengths[request] - number * PAGE)
            keys = cache.keys[1, page, :count].repeat_interleave(2, 1)  # [count, Hq, D]
            products = (q[request] * keys).sum(dim=2).view(count, 2, 2).amax(dim=(0, 2))
            assert bool((products <= found[request, :, number] + 1e-5).all())


def test_growing_keeps_bounds_and_adds_empty_pages() -> None:
    cache = PagedCache(HEADS, layers=2, num_pages=2, page_size=PAGE, batch=1, dtype=torch.float64, page_bounds=True)
    generator = torch.Generator().manual_seed(2)
    append(cache, 0, 7, generator)
    with pytest.raises(SpecError, match="the KV cache is full"):
        cache.extend([2])
    cache.grow(3)
    append(cache, 0, 9, generator)
    require_exact_bounds(cache, 0)
    assert (cache.num_pages, cache.free_pages) == (5, 1)
