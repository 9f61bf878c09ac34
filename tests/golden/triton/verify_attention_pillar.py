"""verify_attention: the rows of every request over its whole paged KV cache, with the scores of its prefix keys.

heads  32 query heads on 8 KV heads (4 to a group), head_dim 128
cache  bfloat16, pages of 16 keys, any strides but a unit last one
scores mean attention weight over every row and the heads of a group

Row i of a request sits at position kv_len - q_len + i and sees the keys up to its own. A request's keys are split
between blocks for every number of rows: attend_splits writes partial results and merge_splits combines them.

score_keys then reads the keys once more, now that the rows' log-sum-exp is known, and averages their weights.

Grids come from bounds and lengths are read on the device, so a captured launch stays right for any batch within them.
"""

import torch
import triton
import triton.language as tl

NUM_Q_HEADS = tl.constexpr(32)
NUM_KV_HEADS = tl.constexpr(8)
GROUP = tl.constexpr(4)  # query heads that share a KV head
HEAD_DIM = tl.constexpr(128)
BLOCK_DIM = tl.constexpr(128)  # HEAD_DIM, padded to a power of two
V_HEAD_DIM = tl.constexpr(128)
BLOCK_V_DIM = tl.constexpr(128)
PAGE_SIZE = tl.constexpr(16)  # keys
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
LOGIT_SCALE = tl.constexpr(0.08838834764831843 * LOG2E.value)  # logits are kept in base 2

BLOCK_M = tl.constexpr(32)  # packed rows of a tile; row m is query row m // GROUP of head m % GROUP
BLOCK_N = tl.constexpr(64)  # keys of an iteration
MERGED_ROWS = tl.constexpr(4)  # packed rows that a block merges at a time, and
MERGED_AT_ONCE = tl.constexpr(8)  # partial results of theirs under way
CTAS_PER_SM = 2  # blocks the grid of splits aims at, per multiprocessor
ALIGNMENT = 256  # bytes; of every scratch array
SCORE_HEADS = tl.constexpr(4)  # query heads averaged into one score
SCORE_BLOCK_M = tl.constexpr(32)  # packed rows of a score tile
SCORE_BLOCK_N = tl.constexpr(64)  # keys of a score tile


@triton.jit
def keys_per_split(num_keys, num_splits):
    """Whole tiles and at least one, so that splits past a request's keys are empty."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_keys, num_splits), BLOCK_N), 1) * BLOCK_N


@triton.jit
def read_pages(table, start, end):
    """Pages of the keys of one tile; entries past the end are not followed."""
    keys = start + tl.arange(0, BLOCK_N)
    return tl.load(table + keys // PAGE_SIZE, mask=keys < end, other=0).to(tl.int64)


@triton.jit
def tile_logits(q, k):
    """Base-2 logits of a tile: q [M, D], k [D, N] -> [M, N] float32."""
    return tl.dot(q, k) * LOGIT_SCALE


@triton.jit
def fold_tile(acc, row_max, row_sum, logits, v):
    """One step of the online softmax: logits [M, N] and v [N, Dv] go into acc [M, Dv], row_max and row_sum [M]."""
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    # A row that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_max == NEG_INF, 0.0, new_max)
    weights = tl.exp2(logits - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
    return acc, new_max, row_sum


# Only cache and query strides are specialised on; what changes from call to call must not compile another variant.
@triton.jit(do_not_specialize=["stride_table", "total_q", "row_tiles", "num_splits"])
def attend_splits(
    q: "*bf16",  # [total_q, NUM_Q_HEADS, HEAD_DIM]
    k_cache: "*bf16",  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]
    v_cache: "*bf16",  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, V_HEAD_DIM]
    page_table: "*i32",  # [batch, max_pages]
    kv_lens: "*i32",  # [batch]
    cu_q: "*i32",  # [batch + 1]
    partial_out: "*fp32",  # [num_splits, total_q, NUM_Q_HEADS, V_HEAD_DIM]
    partial_lse: "*fp32",  # [num_splits, total_q, NUM_Q_HEADS], base 2
    stride_q_row: "i64",
    stride_q_head: "i64",
    stride_k_page: "i64",
    stride_k_slot: "i64",
    stride_k_head: "i64",
    stride_v_page: "i64",
    stride_v_slot: "i64",
    stride_v_head: "i64",
    stride_table: "i64",
    total_q: "i64",
    row_tiles: "i32",
    num_splits: "i32",
):
    """One tile of packed rows over one split of the keys; programs are (KV head x tile x request, split)."""
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tile = tl.program_id(0) // NUM_KV_HEADS % row_tiles
    request = tl.program_id(0) // (NUM_KV_HEADS * row_tiles)
    split = tl.program_id(1)
    first_row = tl.load(cu_q + request)
    q_len = tl.load(cu_q + request + 1) - first_row
    kv_len = tl.load(kv_lens + request)
    prefix = kv_len - q_len  # position of the first row
    if tile * BLOCK_M >= q_len * GROUP:
        return
    num_keys = tl.maximum(kv_len, 0)
    chunk = keys_per_split(num_keys, num_splits)
    begin = split * chunk
    end = tl.minimum(begin + chunk, kv_len)
    if begin >= end:
        return

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = packed // GROUP
    heads = kv_head * GROUP + packed % GROUP
    live = rows < q_len
    dims = tl.arange(0, BLOCK_DIM)
    q_offsets = (first_row + rows) * stride_q_row + heads * stride_q_head
    q_tile = tl.load(q + q_offsets[:, None] + dims[None, :], mask=live[:, None], other=0.0)
    positions = prefix + rows
    v_dims = tl.arange(0, BLOCK_V_DIM)
    table = page_table + request * stride_table
    k_head = k_cache + kv_head * stride_k_head
    v_head = v_cache + kv_head * stride_v_head
    acc = tl.zeros([BLOCK_M, BLOCK_V_DIM], tl.float32)
    row_max = tl.full([BLOCK_M], NEG_INF, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    pages = read_pages(table, begin, end)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        k_offsets = pages * stride_k_page + (keys % PAGE_SIZE) * stride_k_slot
        v_offsets = pages * stride_v_page + (keys % PAGE_SIZE) * stride_v_slot
        # Slots outside are read as zero: what lies there may be NaN, and 0 * NaN is NaN.
        k = tl.load(k_head + k_offsets[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(v_head + v_offsets[:, None] + v_dims[None, :], mask=inside[:, None], other=0.0)
        # Page numbers carried from the iteration before do not make the loads of keys and values indirect, and only
        # loads that are not get every stage of the pipeline.
        pages = read_pages(table, start + BLOCK_N, end)
        logits = tile_logits(q_tile, k)
        visible = keys[None, :] <= positions[:, None]
        logits = tl.where(visible, logits, NEG_INF)
        acc, row_max, row_sum = fold_tile(acc, row_max, row_sum, logits, v)

    row_sum = tl.where(row_sum > 0.0, row_sum, 1.0)  # a row that saw nothing: acc 0, maximum -inf
    acc = acc / row_sum[:, None]
    row_lse = row_max + tl.log2(row_sum)
    rows += first_row
    partial = (split * total_q + rows) * NUM_Q_HEADS + heads
    partial_rows = partial_out + partial[:, None] * V_HEAD_DIM + v_dims[None, :]
    tl.store(partial_rows, acc, mask=live[:, None])
    tl.store(partial_lse + partial, row_lse, mask=live)


@triton.jit
def merge_split(acc, row_max, row_sum, split_out, split_lse):
    """One split's result [M, Dv] and base-2 log-sum-exp [M] go into acc [M, Dv], row_max and row_sum [M]."""
    new_max = tl.maximum(row_max, split_lse)
    shift = tl.where(new_max == NEG_INF, 0.0, new_max)
    weight = tl.exp2(split_lse - shift)
    rescale = tl.exp2(row_max - shift)
    return acc * rescale[:, None] + split_out * weight[:, None], new_max, row_sum * rescale + weight


@triton.jit
def merge_partials(partial_out, partial_lse, partial, live, first_split, end_split, total_q):
    """Merges the partial results of splits one after the other, so that rounding knows neither grid nor layout."""
    v_dims = tl.arange(0, BLOCK_V_DIM)
    acc = tl.zeros([MERGED_ROWS, BLOCK_V_DIM], tl.float32)
    row_max = tl.full([MERGED_ROWS], NEG_INF, tl.float32)
    row_sum = tl.zeros([MERGED_ROWS], tl.float32)
    lse_of = partial_lse + partial
    out_of = partial_out + partial[:, None] * V_HEAD_DIM + v_dims[None, :]
    for first in tl.range(first_split, end_split, MERGED_AT_ONCE):
        for place in tl.static_range(MERGED_AT_ONCE):
            used = live & (first + place < end_split)
            distance = (first + place) * total_q * NUM_Q_HEADS
            split_out = tl.load(out_of + distance * V_HEAD_DIM, mask=used[:, None], other=0.0)
            split_lse = tl.load(lse_of + distance, mask=used, other=NEG_INF)
            acc, row_max, row_sum = merge_split(acc, row_max, row_sum, split_out, split_lse)
    return acc, row_max, row_sum


@triton.jit
def merge_rows(
    partial_out, partial_lse, out, lse, first_packed, kv_head, first_row, q_len, first_split, end_split,
    total_q, stride_out_row, stride_out_head
):
    """Final results of some packed rows of a KV head."""
    packed = first_packed + tl.arange(0, MERGED_ROWS)
    live = packed < q_len * GROUP
    rows = first_row + packed // GROUP
    heads = kv_head * GROUP + packed % GROUP
    partial = rows.to(tl.int64) * NUM_Q_HEADS + heads  # in the first split
    acc, row_max, row_sum = merge_partials(partial_out, partial_lse, partial, live, first_split, end_split, total_q)
    row_sum = tl.where(row_sum > 0.0, row_sum, 1.0)  # a row that saw nothing: acc 0, maximum -inf
    v_dims = tl.arange(0, BLOCK_V_DIM)
    out_rows = out + rows * stride_out_row + heads * stride_out_head
    tl.store(out_rows[:, None] + v_dims[None, :], acc / row_sum[:, None], mask=live[:, None])
    tl.store(lse + rows * NUM_Q_HEADS + heads, (row_max + tl.log2(row_sum)) * LN2, mask=live)


@triton.jit(do_not_specialize=["total_q", "row_blocks", "num_splits"])
def merge_splits(
    partial_out: "*fp32",  # [num_splits, total_q, NUM_Q_HEADS, V_HEAD_DIM]
    partial_lse: "*fp32",  # [num_splits, total_q, NUM_Q_HEADS], base 2
    kv_lens: "*i32",  # [batch]
    cu_q: "*i32",  # [batch + 1]
    out: "*bf16",  # [total_q, NUM_Q_HEADS, V_HEAD_DIM]
    lse: "*fp32",  # [total_q, NUM_Q_HEADS], natural logarithm
    stride_out_row: "i64",
    stride_out_head: "i64",
    total_q: "i64",
    row_blocks: "i32",
    num_splits: "i32",
):
    """Some packed rows of a KV head out of their partial results; programs are (rows x request, KV head)."""
    place = tl.program_id(0) % row_blocks
    request = tl.program_id(0) // row_blocks
    kv_head = tl.program_id(1)
    first_row = tl.load(cu_q + request)
    q_len = tl.load(cu_q + request + 1) - first_row
    kv_len = tl.load(kv_lens + request)
    if place * MERGED_ROWS >= q_len * GROUP:
        return
    num_keys = tl.maximum(kv_len, 0)
    used_splits = tl.cdiv(num_keys, keys_per_split(num_keys, num_splits))
    merge_rows(
        partial_out, partial_lse, out, lse, place * MERGED_ROWS, kv_head, first_row, q_len, 0, used_splits,
        total_q, stride_out_row, stride_out_head
    )


@triton.jit(do_not_specialize=["stride_table", "stride_scores_request", "stride_scores_row", "score_tiles"])
def score_keys(
    q: "*bf16",  # [total_q, NUM_Q_HEADS, HEAD_DIM]
    k_cache: "*bf16",  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]
    page_table: "*i32",  # [batch, max_pages]
    kv_lens: "*i32",  # [batch]
    cu_q: "*i32",  # [batch + 1]
    lse: "*fp32",  # [total_q, NUM_Q_HEADS], natural logarithm
    scores: "*fp32",  # [batch, NUM_KV_HEADS, max_kv]
    stride_q_row: "i64",
    stride_q_head: "i64",
    stride_k_page: "i64",
    stride_k_slot: "i64",
    stride_k_head: "i64",
    stride_table: "i64",
    stride_scores_request: "i64",
    stride_scores_row: "i64",
    score_tiles: "i32",
):
    """Scores of a tile of prefix keys, from the keys read again; programs are (tile x request, score row)."""
    tile = tl.program_id(0) % score_tiles
    request = tl.program_id(0) // score_tiles
    score_row = tl.program_id(1)
    first_row = tl.load(cu_q + request)
    q_len = tl.load(cu_q + request + 1) - first_row
    prefix = tl.load(kv_lens + request) - q_len
    if (q_len == 0) | (tile * SCORE_BLOCK_N >= prefix):
        return

    dims = tl.arange(0, BLOCK_DIM)
    num_scored = q_len  # rows
    keys = tile * SCORE_BLOCK_N + tl.arange(0, SCORE_BLOCK_N)
    inside = keys < prefix
    total = tl.zeros([SCORE_BLOCK_N], tl.float32)
    pages = tl.load(page_table + request * stride_table + keys // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    k_offsets = pages * stride_k_page + (keys % PAGE_SIZE) * stride_k_slot
    kv_head = score_row
    k = tl.load(
        k_cache + kv_head * stride_k_head + k_offsets[None, :] + dims[:, None],
        mask=inside[None, :],
        other=0.0,
    )
    for first_packed in tl.range(0, num_scored * GROUP, SCORE_BLOCK_M):
        packed = first_packed + tl.arange(0, SCORE_BLOCK_M)
        live = packed < num_scored * GROUP
        rows = packed // GROUP
        heads = kv_head * GROUP + packed % GROUP
        q_offsets = (first_row + rows) * stride_q_row + heads * stride_q_head
        q_tile = tl.load(
            q + q_offsets[:, None] + dims[None, :],
            mask=live[:, None],
            other=0.0,
        )
        # Rows past the last get an infinite log-sum-exp, hence weight 0.
        row_lse = tl.load(lse + (first_row + rows) * NUM_Q_HEADS + heads, mask=live, other=float("inf")) * LOG2E
        weights = tl.exp2(tile_logits(q_tile, k) - row_lse[:, None])
        total += tl.sum(weights, 0)
    # A fixed denominator: a key outside a row's window counts as weight 0.
    mean = total / (num_scored * SCORE_HEADS)
    tl.store(scores + request * stride_scores_request + score_row * stride_scores_row + keys, mean, mask=inside)


# The device functions and how each is launched and compiled: with their signatures, all that a cross-compiler needs.
# Without fusing multiplications into additions, results do not change with what else a function computes.
KERNELS = {
    attend_splits: {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False},
    merge_splits: {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False},
    score_keys: {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False},
}


def row_tiles_of(max_q: int) -> int:
    """Tiles of packed rows of a request of so many rows."""
    return triton.cdiv(max_q * GROUP.value, BLOCK_M.value)


def num_splits(batch: int, max_q: int, max_kv: int, num_sms: int) -> int:
    """Splits of every request's keys: enough blocks to fill the device, and no more splits than tiles."""
    blocks = row_tiles_of(max_q) * NUM_KV_HEADS.value * batch
    return max(1, min(CTAS_PER_SM * num_sms // max(1, blocks), triton.cdiv(max_kv, BLOCK_N.value)))


def scratch_bytes(total_q: int, splits: int) -> list[int]:
    """Bytes of each scratch array, in the order in which they lie in the workspace."""
    partials = splits * total_q * NUM_Q_HEADS.value
    arrays = [partials * V_HEAD_DIM.value * 4, partials * 4]
    return [triton.cdiv(size, ALIGNMENT) * ALIGNMENT for size in arrays]


def workspace_bytes(*, total_q: int, batch: int, max_q: int, max_kv: int, num_sms: int) -> int:
    """Bytes of scratch that a launch of these sizes needs."""
    splits = num_splits(batch, max_q, max_kv, num_sms)
    return sum(scratch_bytes(total_q, splits))


def launch(
    *,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor,
    workspace: torch.Tensor,
    max_q: int,
    max_kv: int,
    num_sms: int,
) -> None:
    """Enqueues the kernels on the current stream; allocates nothing and never waits for the device."""
    total_q, batch, row_tiles = q.shape[0], kv_lens.shape[0], row_tiles_of(max_q)
    splits = num_splits(batch, max_q, max_kv, num_sms)
    sizes = scratch_bytes(total_q, splits)
    partial_out, partial_lse = workspace[: sum(sizes)].split(sizes)
    attend_splits[(NUM_KV_HEADS.value * row_tiles * batch, splits)](
        q,
        k_cache,
        v_cache,
        page_table,
        kv_lens,
        cu_q,
        partial_out.view(torch.float32),
        partial_lse.view(torch.float32),
        q.stride(0),
        q.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        page_table.stride(0),
        total_q,
        row_tiles,
        splits,
        **KERNELS[attend_splits],
    )
    row_blocks = triton.cdiv(max_q * GROUP.value, MERGED_ROWS.value)
    merge_splits[(row_blocks * batch, NUM_KV_HEADS.value)](
        partial_out.view(torch.float32),
        partial_lse.view(torch.float32),
        kv_lens,
        cu_q,
        out,
        lse,
        out.stride(0),
        out.stride(1),
        total_q,
        row_blocks,
        splits,
        **KERNELS[merge_splits],
    )
    score_tiles = triton.cdiv(scores.shape[2], SCORE_BLOCK_N.value)
    score_keys[(score_tiles * batch, scores.shape[1])](
        q,
        k_cache,
        page_table,
        kv_lens,
        cu_q,
        lse,
        scores,
        q.stride(0),
        q.stride(1),
        *k_cache.stride()[:3],
        page_table.stride(0),
        scores.stride(0),
        scores.stride(1),
        score_tiles,
        **KERNELS[score_keys],
    )
