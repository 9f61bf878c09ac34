"""select_kv: the keys with the largest scores, exactly, as ascending indices; ties go to the smaller index.

scores one row per request and KV head (8 of them), float32

One block walks one row. Scores become 32-bit integers of the same order; 4 passes of 8 bits find the smallest one
that is taken, and a last pass writes the indices at or above it. The first `sink` and the last `recent` keys are always
taken and count inside the budget. Budgets are computed on the device in integers, from lengths that are read there.
"""

import torch
import triton
import triton.language as tl

BLOCK_N = tl.constexpr(4096)  # scores of an iteration
RADIX_BITS = tl.constexpr(8)
RADIX_BINS = tl.constexpr(256)
PPM = tl.constexpr(1_000_000)


@triton.jit
def order_bits(scores):
    """Unsigned integers in the order of the scores: NaN is 0, below -inf; -0 equals +0."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    signed = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(is_nan, 0, signed.to(tl.uint32, bitcast=True) ^ 0x80000000)


@triton.jit
def read_tile(row_scores, start, prefix, sink, recent):
    """Positions and order of one tile's keys, which of them are forced, and which are free to be chosen."""
    positions = start + tl.arange(0, BLOCK_N)
    inside = positions < prefix
    chosen_by_place = (positions < sink) | (positions >= prefix - recent)
    order = order_bits(tl.load(row_scores + positions, mask=inside, other=0.0))
    return positions, order, inside & chosen_by_place, inside & (chosen_by_place == 0)


@triton.jit
def find_threshold(row_scores, scanned, prefix, sink, recent, needed):
    """Order of the needed-th largest free key among the first `scanned`, and how many equal to it are to be taken."""
    bins = tl.arange(0, RADIX_BINS)
    threshold = tl.full([], 0, tl.uint32)
    for digit_pass in tl.static_range(32 // RADIX_BITS):
        shift = 32 - RADIX_BITS * (digit_pass + 1)
        histogram = tl.zeros([RADIX_BINS], tl.int32)
        for start in tl.range(0, scanned, BLOCK_N):
            positions, order, forced, free = read_tile(row_scores, start, prefix, sink, recent)
            digits = order >> shift
            same_prefix = (digits >> RADIX_BITS) == ((threshold >> shift) >> RADIX_BITS)
            histogram += tl.histogram((digits & (RADIX_BINS - 1)).to(tl.int32), RADIX_BINS, mask=free & same_prefix)
        at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
        digit = tl.max(tl.where(at_least >= needed, bins, 0), 0)
        needed -= tl.sum(tl.where(bins > digit, histogram, 0), 0)
        threshold |= digit.to(tl.uint32) << shift
    return threshold, needed


# Nothing is specialised on: sizes, budgets and strides change from call to call.
@triton.jit(
    do_not_specialize=[
        "columns",
        "width",
        "stride_scores_request",
        "stride_scores_row",
        "stride_indices_request",
        "stride_indices_row",
        "stride_counts",
        "k",
        "ratio_ppm",
        "min_keys",
        "max_keys",
        "sink",
        "recent",
    ]
)
def select_rows(
    scores: "*fp32",  # [batch, 8, columns]
    prefix_lens: "*i32",  # [batch]
    indices: "*i32",  # [batch, 8, width]
    counts: "*i32",  # [batch, 8]
    columns: "i32",
    width: "i32",
    stride_scores_request: "i64",
    stride_scores_row: "i64",
    stride_indices_request: "i64",
    stride_indices_row: "i64",
    stride_counts: "i64",
    k: "i32",
    ratio_ppm: "i32",
    min_keys: "i32",
    max_keys: "i32",
    sink: "i32",
    recent: "i32",
):
    """One row of scores; programs are (score row, request)."""
    score_row = tl.program_id(0)
    request = tl.program_id(1)
    row_scores = scores + request * stride_scores_request + score_row * stride_scores_row
    row_indices = indices + request * stride_indices_request + score_row * stride_indices_row
    prefix = tl.maximum(tl.minimum(tl.load(prefix_lens + request), columns), 0)

    # A fixed k, or clamp(ceil(ratio * prefix), min, max); the product passes 2^31.
    share = (ratio_ppm.to(tl.int64) * prefix + (PPM - 1)) // PPM
    share = tl.minimum(tl.maximum(share, min_keys), max_keys).to(tl.int32)
    budget = tl.minimum(tl.where(k > 0, k, share), prefix)
    sink = tl.minimum(sink, prefix)
    recent = tl.minimum(recent, prefix - sink)

    # Where the budget covers the prefix there is nothing to search: threshold 0 takes every key.
    scanned = tl.where(budget < prefix, prefix, 0)
    needed = tl.maximum(budget - sink - recent, 0)
    threshold, ties_needed = find_threshold(row_scores, scanned, prefix, sink, recent, needed)

    taken = 0
    tied = 0
    for start in tl.range(0, prefix, BLOCK_N):
        positions, order, forced, free = read_tile(row_scores, start, prefix, sink, recent)
        tie = (free & (order == threshold)).to(tl.int32)
        tie_rank = tied + tl.cumsum(tie, 0) - tie
        above = forced | (free & (order > threshold))
        take = (above | ((tie > 0) & (tie_rank < ties_needed))).to(tl.int32)
        place = taken + tl.cumsum(take, 0) - take
        tl.store(row_indices + place, positions, mask=(take > 0) & (place < width))
        taken += tl.sum(take, 0)
        tied += tl.sum(tie, 0)
    tl.store(counts + request * stride_counts + score_row, tl.minimum(taken, width))
    for start in tl.range(taken, width, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        tl.store(row_indices + places, tl.full([BLOCK_N], -1, tl.int32), mask=places < width)


# The device functions and how each is launched and compiled: with their signatures, all that a cross-compiler needs.
KERNELS = {
    select_rows: {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False},
}


def launch(
    *,
    scores: torch.Tensor,
    prefix_lens: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    k: int,
    ratio_ppm: int,
    min_keys: int,
    max_keys: int,
    sink: int,
    recent: int,
) -> None:
    """Enqueues the kernel on the current stream. k is 0 where the budget is a ratio; needs no workspace."""
    batch, score_rows, columns = scores.shape
    select_rows[(score_rows, batch)](
        scores,
        prefix_lens,
        indices,
        counts,
        columns,
        indices.shape[2],
        scores.stride(0),
        scores.stride(1),
        indices.stride(0),
        indices.stride(1),
        counts.stride(0),
        k,
        ratio_ppm,
        min_keys,
        max_keys,
        sink,
        recent,
        **KERNELS[select_rows],
    )
