"""The bucket rule."""

from __future__ import annotations

import pytest

from specattn_codegen import buckets
from specattn_codegen.spec import OPS, Workload


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 1), (1, 1), (3, 4), (5, 4), (6, 8), (7, 8), (4096, 4096), (5793, 8192)]
)
def test_bucket_is_the_nearest_power_of_two(size: int, expected: int) -> None:
    assert buckets.bucket(size) == expected


def test_draft_lengths_of_five_to_seven_share_a_bucket() -> None:
    first, second = (Workload(batch=1, q_len=q_len, kv_len=4096) for q_len in (6, 8))
    assert buckets.buckets("verify_attention", first) == buckets.buckets("verify_attention", second)


def test_distance_counts_octaves_of_the_sizes_that_matter() -> None:
    near = Workload(batch=2, q_len=1, kv_len=8192, budget=512)
    far = Workload(batch=8, q_len=1, kv_len=2048, budget=1024)
    assert buckets.distance("verify_attention", near, far) == 4.0  # batch 4x, keys 4x
    assert buckets.distance("sparse_attention", near, far) == 3.0  # batch 4x, budget 2x
    assert buckets.distance("select_kv", near, far) == 2.0  # keys 4x; its rows, few or many, are treated alike
    for op in OPS:
        assert buckets.distance(op, near, near) == 0.0
        assert buckets.distance(op, near, far) == buckets.distance(op, far, near)
