"""Which tuned sizes may serve a call. Only sizes bucket, by the rule written here as data; structure never does."""

from __future__ import annotations

import functools
import math

from specattn_codegen.spec import Op, Workload

# The sizes an operation's best plan depends on. A selection reads every score whatever it keeps and treats its rows,
# few or all layers' at once, alike; a sparse read touches its budget whatever the cache holds.
SIZES: dict[Op, tuple[str, ...]] = {
    "verify_attention": ("batch", "q_len", "kv_len"),
    "select_kv": ("kv_len",),
    "sparse_attention": ("batch", "q_len", "budget"),
    "mixed_attention": ("batch", "q_len", "kv_len"),
}

# Farthest a tuned workload may lie from the asked one: the sum over the sizes of |log2(ratio)|. Four means a factor of
# 16 in all, the gap between the default workloads and everything between them.
FARTHEST = 4.0


@functools.lru_cache(maxsize=4096)  # asked four times a launch
def bucket(size: int) -> int:
    """The power of two nearest to a size on a logarithmic scale; sizes below one count as one."""
    return 1 << round(math.log2(max(size, 1)))


def sizes(op: Op, workload: Workload) -> tuple[int, ...]:
    """The sizes that matter, in the order of SIZES."""
    return tuple(getattr(workload, name) for name in SIZES[op])


def buckets(op: Op, workload: Workload) -> tuple[int, ...]:
    """Two workloads with equal buckets share one tuned entry."""
    return tuple(bucket(size) for size in sizes(op, workload))


def distance(op: Op, first: Workload, second: Workload) -> float:
    """Octaves between two workloads, summed over the sizes that matter."""
    pairs = zip(sizes(op, first), sizes(op, second), strict=True)
    return sum(abs(math.log2(max(one, 1) / max(other, 1))) for one, other in pairs)
