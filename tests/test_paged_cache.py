"""The paged cache: pages are never lost, shared ones never written, and what a request wrote is what it finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_codegen import HeadConfig, SpecError
from specattn_runtime.cache.paged_cache import PagedCache

HEADS = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=3)


def paged_cache(*, num_pages: int, page_size: int, batch: int) -> PagedCache:
    return PagedCache(
        HEADS, layers=2, num_pages=num_pages, page_size=page_size, batch=batch, dtype=torch.float64, device="cpu"
    )


def logical_keys(cache: PagedCache, layer: int, request: int) -> torch.Tensor:
    """A request's keys in the order of its text, found through its page table [length, Hkv, D]."""
    pages = cache.page_table[request, : len(cache.pages(request))].long()
    return cache.keys[layer][pages].flatten(0, 1)[: cache.lengths[request]]


def writes_to_shared_page(cache: PagedCache, request: int) -> bool:
    """Whether the request's next key goes to a page that another request has too."""
    others = {page for other in range(3) if other != request for page in cache.pages(other)}
    return cache.lengths[request] % cache.page_size != 0 and cache.pages(request)[-1] in others


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(0, 2), st.integers(0, 9)),
        st.tuples(st.just("rewind"), st.integers(0, 2), st.integers(0, 9)),
        st.tuples(st.sampled_from(["free", "grow"]), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("fork"), st.integers(0, 2), st.integers(0, 9)),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=60)
@given(OPERATIONS, st.sampled_from([1, 3, 7]))
def test_whatever_happens_to_a_cache_every_page_and_every_key_is_kept(
    operations: list[tuple[str, int, int]], page_size: int
) -> None:
    cache = paged_cache(num_pages=12, page_size=page_size, batch=3)
    texts: list[list[float]] = [[], [], []]  # what each request's keys should be
    stamp = 0.0
    for name, request, count in operations:
        if name == "extend":
            pages_before = cache.free_pages
            try:
                rows = cache.extend([count if other == request else 0 for other in range(3)])
            except SpecError:
                assert cache.free_pages == pages_before
                pages = -(-(len(texts[request]) + count) // page_size) - len(cache.pages(request))
                assert pages + writes_to_shared_page(cache, request) > pages_before
                continue
            fresh = torch.arange(stamp + 1, stamp + 1 + count, dtype=torch.float64)
            cache.write(1, rows.slots, fresh[:, None, None].expand(-1, 2, 3), fresh[:, None, None].expand(-1, 2, 3))
            texts[request] += fresh.tolist()
            stamp += count
        elif name == "grow":
            cache.grow(1)
        elif name == "fork":
            source, length = (request + 1) % 3, min(count, len(texts[(request + 1) % 3]))
            if not texts[request]:
                cache.fork(source, request, length)
                texts[request] = texts[source][:length]
        else:
            kept = max(0, len(texts[request]) - count) if name == "rewind" else 0
            cache.rewind(request, kept)
            del texts[request][kept:]
        held = {page for other in range(3) for page in cache.pages(other)}
        assert len(held) + cache.free_pages == cache.num_pages
        for other in range(3):
            assert len(cache.pages(other)) == -(-cache.lengths[other] // page_size)
            assert logical_keys(cache, 1, other)[:, 0, 0].tolist() == texts[other]
    assert not cache.keys[0].any()  # the other layer was never written


def test_rows_of_a_ragged_batch() -> None:
    cache = paged_cache(num_pages=8, page_size=2, batch=3)
    cache.extend([3, 0, 1])
    rows = cache.extend([2, 0, 3])
    assert rows.requests.tolist() == [0, 0, 2, 2, 2]
    assert rows.positions.tolist() == [3, 4, 1, 2, 3]
    assert rows.offsets.tolist() == [0, 1, 0, 1, 2]
    assert rows.kv_lens.tolist() == [5, 0, 4]
    assert rows.prefix_lens.tolist() == [3, 0, 1]
    assert rows.cu_q.tolist() == [0, 2, 2, 5]
    assert (rows.max_q, rows.max_kv) == (3, 5)
    table = [cache.pages(0), cache.pages(1), cache.pages(2)]
    expected = [
        table[b][p // 2] * 2 + p % 2 for b, p in zip(rows.requests.tolist(), rows.positions.tolist(), strict=True)
    ]
    assert rows.slots.tolist() == expected


def test_a_rewound_cache_is_bitwise_a_fresh_one() -> None:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(23, 2, 3, dtype=torch.float64, generator=generator)
    wrong = torch.randn(9, 2, 3, dtype=torch.float64, generator=generator)
    rewound, fresh = (paged_cache(num_pages=5, page_size=5, batch=1) for _ in range(2))
    for start, end in ((0, 14), (14, 16), (16, 23)):
        provisional = rewound.extend([min(9, 25 - start)])
        rewound.write(0, provisional.slots, wrong[: len(provisional.slots)], wrong[: len(provisional.slots)])
        rewound.rewind(0, start)
        rows = rewound.extend([end - start])
        rewound.write(0, rows.slots, text[start:end], text[start:end])
    rows = fresh.extend([23])
    fresh.write(0, rows.slots, text, text)
    assert torch.equal(logical_keys(rewound, 0, 0), logical_keys(fresh, 0, 0))
    assert torch.equal(logical_keys(rewound, 0, 0), text)


def test_a_full_cache_says_so_and_stays_as_it_was() -> None:
    cache = paged_cache(num_pages=3, page_size=4, batch=2)
    cache.extend([8, 0])
    with pytest.raises(SpecError, match="num_pages=3: the KV cache is full, 2 more pages of 4 keys are needed and 1"):
        cache.extend([1, 1])
    assert (cache.lengths, cache.free_pages) == ([8, 0], 1)
    cache.free(0)
    cache.extend([4, 8])
    assert cache.free_pages == 0


@pytest.mark.parametrize("name", ["num_pages", "page_size", "batch"])
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name}=0"):
        paged_cache(**{"num_pages": 1, "page_size": 1, "batch": 1, name: 0})


@pytest.mark.parametrize("length", [-1, 6])
def test_rewinding_goes_backwards_only(length: int) -> None:
    cache = paged_cache(num_pages=3, page_size=4, batch=1)
    cache.extend([5])
    with pytest.raises(SpecError, match=f"length={length}"):
        cache.rewind(0, length)


def write_stamps(cache: PagedCache, counts: list[int], stamp: float) -> None:
    rows = cache.extend(counts)
    stamps = (stamp + rows.requests.double())[:, None, None].expand(-1, 2, 3)
    cache.write(0, rows.slots, stamps, stamps)


def test_a_fork_copies_no_page_until_it_must() -> None:
    cache = paged_cache(num_pages=6, page_size=4, batch=3)
    write_stamps(cache, [10, 0, 0], 10.0)
    cache.fork(0, 1)
    cache.fork(0, 2, 6)
    assert cache.free_pages == 3
    assert cache.pages(1) == cache.pages(0)
    assert cache.pages(2) == cache.pages(0)[:2]
    write_stamps(cache, [0, 1, 1], 20.0)  # each into the middle of a page of the first
    assert cache.free_pages == 1
    write_stamps(cache, [1, 0, 0], 30.0)  # which has its last page to itself by now
    assert cache.free_pages == 1
    assert [logical_keys(cache, 0, request)[:, 0, 0].tolist() for request in range(3)] == [
        [10.0] * 10 + [30.0],
        [10.0] * 10 + [21.0],
        [10.0] * 6 + [22.0],
    ]
    for request in range(3):
        cache.free(request)
    assert cache.free_pages == 6


def test_both_sharers_of_a_page_may_write_in_one_pass_and_the_last_needs_no_copy() -> None:
    cache = paged_cache(num_pages=2, page_size=4, batch=2)
    write_stamps(cache, [3, 0], 10.0)
    cache.fork(0, 1)
    write_stamps(cache, [1, 1], 20.0)
    assert [logical_keys(cache, 0, request)[:, 0, 0].tolist() for request in range(2)] == [
        [10.0, 10.0, 10.0, 20.0],
        [10.0, 10.0, 10.0, 21.0],
    ]


def test_a_copy_that_does_not_fit_is_refused() -> None:
    cache = paged_cache(num_pages=1, page_size=4, batch=2)
    write_stamps(cache, [3, 0], 10.0)
    cache.fork(0, 1)
    with pytest.raises(SpecError, match="1 more pages of 4 keys are needed and 0 are free"):
        cache.extend([0, 1])
    assert cache.lengths == [3, 3]


@pytest.mark.parametrize(
    ("source", "target", "length", "message"),
    [
        (0, 1, 4, "length=4: request 0 has 0 .. 3 keys to share"),
        (0, 1, -1, "length=-1"),
        (0, 0, 3, "request 0 has 3 keys: free it before it shares another's"),
    ],
)
def test_forks_that_make_no_sense(source: int, target: int, length: int, message: str) -> None:
    cache = paged_cache(num_pages=2, page_size=4, batch=2)
    cache.extend([3, 0])
    with pytest.raises(SpecError, match=message):
        cache.fork(source, target, length)


def test_a_cache_grows_by_whole_pages() -> None:
    with pytest.raises(SpecError, match="num_pages=0: must add at least 1 page"):
        paged_cache(num_pages=2, page_size=4, batch=2).grow(0)
