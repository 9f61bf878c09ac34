"""Huge pages are advice: what they hold is the same, and the system is asked only for what lies wholly inside."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import huge_pages
from specattn_runtime.cache.paged_cache import PagedCache

SMAPS = Path("/proc/self/smaps")


def _flags(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


needs_linux = pytest.mark.skipif(
    not SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system does not show transparent huge pages",
)


@needs_linux
def test_the_cache_asks_for_huge_pages() -> None:
    heads = HeadConfig(num_q_heads=8, num_kv_heads=8, head_dim=128)
    cache = PagedCache(heads, layers=2, num_pages=256, page_size=16, batch=1, dtype=torch.float32)
    cache.grow(256)
    for pool in (cache.keys, cache.values):
        assert "hg" in _flags(pool.data_ptr() + pool.nbytes // 2)
        assert not pool.any()


@needs_linux
def test_a_tensor_smaller_than_a_huge_page_is_left_alone() -> None:
    memory = mmap.mmap(-1, 1 << 20)  # of its own: the heap may hold what another test asked huge pages for
    small = torch.frombuffer(memory, dtype=torch.float32)
    assert huge_pages.advise(small) is small
    assert "hg" not in _flags(small.data_ptr())


@pytest.mark.parametrize("count", [0, 1, 3 << 20])
def test_advice_changes_no_value(count: int) -> None:
    data = torch.arange(count, dtype=torch.float32)
    assert huge_pages.advise(data) is data
    assert torch.equal(data, torch.arange(count, dtype=torch.float32))
