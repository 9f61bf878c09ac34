"""verify_attention: the rows of every request over its whole paged KV cache, with the scores of its prefix keys.

heads  32 query heads on 8 KV heads (4 to a group), head_dim 128
cache  float8_e4m3, pages of 16 keys, any strides but a unit last one; queries and outputs bfloat16
scores max over a page's keys of the mean attention weight over every row and the heads of a group
       and a histogram of each row of scores

Row i of a request sits at position kv_len - q_len + i and sees the keys up to its own. A request's keys are split
between blocks for every number of rows: attend_splits writes partial results and merge_splits combines them.

score_keys then reads the keys once more, now that the rows' log-sum-exp is known, and averages their weights.

Grids come from bounds and lengths are read on the device, so a captured launch stays right for any batch within them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

DTYPE = "bfloat16"
NUM_Q_HEADS = 32
NUM_KV_HEADS = 8
GROUP = 4  # query heads that share a KV head
HEAD_DIM = 128
V_HEAD_DIM = 128
PAGE_SIZE = 16  # keys
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
NEG_INF = float("-inf")
LOGIT_SCALE = 0.08838834764831843 * LOG2E  # logits are kept in base 2

BLOCK_M = 32  # packed rows of a tile; row m is query row m // GROUP of head m % GROUP
BLOCK_N = 64  # keys of an iteration
THREADS = 128
MERGE_THREADS = 128
VECTOR = 8  # elements read at once where every stride and address is a multiple of them
CTAS_PER_SM = 2  # blocks the grid of splits aims at, per multiprocessor
ALIGNMENT = 256  # bytes; of every scratch array
SCORE_HEADS = 4  # query heads averaged into one score
SCORE_BLOCK_M = 32  # packed rows of a score tile
SCORE_BLOCK_N = 64  # keys of a score tile
SCORE_THREADS = 128
SCORE_PAGES = 4  # pages that a block scores
HISTOGRAM_BINS = 1024  # of scores by their top 11 bits: sign, exponent and four bins an octave
HISTOGRAM_SHIFT = 21
# How scalars are declared: TileLang would write an expression out at every use of a plain name.
INT = "int32"


def device_functions(T: Any, vector: int) -> tuple[Any, ...]:
    """The functions of the device in TileLang's dialect T, in the order in which they are launched.

    vector  elements that every stride and address of queries and caches is a multiple of
    """
    elements = T.dynamic("elements")  # arrays are addressed from their first element, in 64 bits

    def decode_float8(bits: Any) -> Any:
        """float8_e4m3 as uint8 -> DTYPE, exactly."""
        # The sign at the top and the other fields where float32 has the end of its exponent: 2^120 times too small.
        fields = T.shift_left(T.cast(bits, INT) & 0x80, 24) | T.shift_left(T.cast(bits, INT) & 0x7F, 20)
        # All ones would be 480 and stand for NaN. Without a condition, as TileLang makes no vectors of those.
        is_nan = T.shift_right((T.cast(bits, INT) & 0x7F) + 1, 7)
        return T.cast(T.reinterpret(fields | (is_nan * 0x7F800000), "float32") * 1.329227995784916e36, DTYPE)

    # Warps divide the columns of a tile, as they are more than its blocks of 16 rows.
    policy = T.GemmWarpPolicy.FullCol

    @T.macro
    def fold_tile(acc, row_max, row_sum, logits, weights, v, shift, rescale):
        """One step of the online softmax: logits [M, N] and v [N, Dv] go into acc [M, Dv], row_max and row_sum [M].

        Leaves the weights, relative to `shift`, in logits.
        """
        for m in T.Parallel(BLOCK_M):
            rescale[m] = row_max[m]
        T.reduce_max(logits, row_max, dim=1, clear=False)
        for m in T.Parallel(BLOCK_M):
            # A row that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
            shift[m] = T.if_then_else(row_max[m] == -T.infinity("float32"), 0.0, row_max[m])
            rescale[m] = T.exp2(rescale[m] - shift[m])
        for m, n in T.Parallel(BLOCK_M, BLOCK_N):
            logits[m, n] = T.exp2(logits[m, n] - shift[m])
        for m in T.Parallel(BLOCK_M):
            row_sum[m] *= rescale[m]
        T.reduce_sum(logits, row_sum, dim=1, clear=False)
        for m, n in T.Parallel(BLOCK_M, BLOCK_N):
            weights[m, n] = T.cast(logits[m, n], DTYPE)
        for m, d in T.Parallel(BLOCK_M, V_HEAD_DIM):
            acc[m, d] *= rescale[m]
        T.gemm(weights, v, acc, policy=policy)

    @T.prim_func
    def attend_splits(
        q: T.Tensor((elements,), DTYPE),  # [total_q, NUM_Q_HEADS, HEAD_DIM]
        k_cache: T.Tensor((elements,), "uint8"),  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]
        v_cache: T.Tensor((elements,), "uint8"),  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, V_HEAD_DIM]
        k_scale: T.Tensor((elements,), "float32"),  # [NUM_KV_HEADS]
        page_table: T.Tensor((elements,), "int32"),  # [batch, max_pages]
        kv_lens: T.Tensor((elements,), "int32"),  # [batch]
        cu_q: T.Tensor((elements,), "int32"),  # [batch + 1]
        partial_out: T.Tensor((elements,), "float32"),  # [num_splits, total_q, NUM_Q_HEADS, V_HEAD_DIM]
        partial_lse: T.Tensor((elements,), "float32"),  # [num_splits, total_q, NUM_Q_HEADS], base 2
        stride_q_row: T.int64,
        stride_q_head: T.int64,
        stride_k_page: T.int64,
        stride_k_slot: T.int64,
        stride_k_head: T.int64,
        stride_v_page: T.int64,
        stride_v_slot: T.int64,
        stride_v_head: T.int64,
        stride_k_scale: T.int64,
        stride_table: T.int64,
        total_q: T.int64,
        row_tiles: T.int32,
        blocks: T.int32,
        num_splits: T.int32,
    ):
        """One tile of packed rows over one split of the keys; blocks are (KV head x tile x request, split)."""
        with T.Kernel(blocks, num_splits, threads=THREADS) as (block, split):
            T.assume(stride_q_row % vector == 0)
            T.assume(stride_q_head % vector == 0)
            T.assume(stride_k_page % vector == 0)
            T.assume(stride_k_slot % vector == 0)
            T.assume(stride_k_head % vector == 0)
            T.assume(stride_v_page % vector == 0)
            T.assume(stride_v_slot % vector == 0)
            T.assume(stride_v_head % vector == 0)
            q_tile = T.alloc_shared([BLOCK_M, HEAD_DIM], DTYPE)
            k_tile = T.alloc_shared([BLOCK_N, HEAD_DIM], DTYPE)
            v_tile = T.alloc_shared([BLOCK_N, V_HEAD_DIM], DTYPE)
            k_bytes = T.alloc_shared([BLOCK_N, HEAD_DIM], "uint8")
            v_bytes = T.alloc_shared([BLOCK_N, V_HEAD_DIM], "uint8")
            logits = T.alloc_fragment([BLOCK_M, BLOCK_N], "float32")
            weights = T.alloc_shared([BLOCK_M, BLOCK_N], DTYPE)
            acc = T.alloc_fragment([BLOCK_M, V_HEAD_DIM], "float32")
            row_max = T.alloc_fragment([BLOCK_M], "float32")
            row_sum = T.alloc_fragment([BLOCK_M], "float32")
            shift = T.alloc_fragment([BLOCK_M], "float32")
            rescale = T.alloc_fragment([BLOCK_M], "float32")
            kv_head = T.alloc_var(INT, init=block % NUM_KV_HEADS)
            tile = T.alloc_var(INT, init=T.truncmod(T.truncdiv(block, NUM_KV_HEADS), row_tiles))
            request = T.alloc_var(INT, init=T.truncdiv(T.truncdiv(block, NUM_KV_HEADS), row_tiles))
            first_row = T.alloc_var(INT, init=cu_q[request])
            q_len = T.alloc_var(INT, init=cu_q[request + 1] - first_row)
            kv_len = T.alloc_var(INT, init=T.max(kv_lens[request], 0))
            prefix = T.alloc_var(INT, init=kv_len - q_len)  # position of the first row
            oldest = T.alloc_var(INT, init=0)
            # Whole tiles and at least one, so that splits past a request's keys are empty.
            tiles = T.alloc_var(INT, init=T.truncdiv(T.max(kv_len - oldest, 1) + BLOCK_N - 1, BLOCK_N))
            chunk = T.alloc_var(INT, init=T.truncdiv(tiles + num_splits - 1, num_splits) * BLOCK_N)
            begin = T.alloc_var(INT, init=oldest + split * chunk)
            end = T.alloc_var(INT, init=T.min(begin + chunk, kv_len))
            first = T.alloc_var(INT, init=tile * BLOCK_M)
            # A block without rows or keys does nothing: no step of its loop, and no row to write.
            rows = T.alloc_var(INT, init=T.if_then_else(begin < end, q_len, 0))
            keys = T.alloc_var(INT, init=T.if_then_else(first < rows * GROUP, end - begin, 0))
            logit_scale = T.alloc_var("float32", init=LOGIT_SCALE * k_scale[kv_head * stride_k_scale])
            for m, d in T.Parallel(BLOCK_M, HEAD_DIM):
                row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                q_tile[m, d] = T.if_then_else(
                    row < rows, q[(first_row + row) * stride_q_row + head * stride_q_head + d], T.cast(0, DTYPE)
                )
            T.clear(acc)
            T.fill(row_max, -T.infinity("float32"))
            T.clear(row_sum)
            for step in T.Pipelined(T.truncdiv(keys + BLOCK_N - 1, BLOCK_N), num_stages=1):
                # Past the end the last key is read again: slots nobody wrote may hold NaN, and 0 * NaN is NaN.
                for n, d in T.Parallel(BLOCK_N, HEAD_DIM):
                    key = T.min(begin + step * BLOCK_N + n, end - 1)
                    page = page_table[request * stride_table + T.truncdiv(key, PAGE_SIZE)]
                    slot = T.truncmod(key, PAGE_SIZE)
                    k_bytes[n, d] = k_cache[page * stride_k_page + slot * stride_k_slot + kv_head * stride_k_head + d]
                for n, d in T.Parallel(BLOCK_N, V_HEAD_DIM):
                    key = T.min(begin + step * BLOCK_N + n, end - 1)
                    page = page_table[request * stride_table + T.truncdiv(key, PAGE_SIZE)]
                    slot = T.truncmod(key, PAGE_SIZE)
                    v_bytes[n, d] = v_cache[page * stride_v_page + slot * stride_v_slot + kv_head * stride_v_head + d]
                for n, d in T.Parallel(BLOCK_N, HEAD_DIM):
                    k_tile[n, d] = decode_float8(k_bytes[n, d])
                for n, d in T.Parallel(BLOCK_N, V_HEAD_DIM):
                    v_tile[n, d] = decode_float8(v_bytes[n, d])
                T.gemm(q_tile, k_tile, logits, transpose_B=True, clear_accum=True, policy=policy)
                for m, n in T.Parallel(BLOCK_M, BLOCK_N):
                    key, position = begin + step * BLOCK_N + n, prefix + (first + m) // GROUP
                    visible = key <= position
                    logits[m, n] = T.if_then_else(visible, logits[m, n] * logit_scale, NEG_INF)
                fold_tile(acc, row_max, row_sum, logits, weights, v_tile, shift, rescale)
            for m in T.Parallel(BLOCK_M):
                # A row that saw nothing: acc 0, maximum -inf.
                row_sum[m] = T.if_then_else(row_sum[m] > 0, row_sum[m], 1.0)
            for m, d in T.Parallel(BLOCK_M, V_HEAD_DIM):
                row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                if row < rows:
                    partial = (split * total_q + first_row + row) * NUM_Q_HEADS + head
                    partial_out[partial * V_HEAD_DIM + d] = acc[m, d] / row_sum[m]
            for m in T.Parallel(BLOCK_M):
                row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                if row < rows:
                    partial = (split * total_q + first_row + row) * NUM_Q_HEADS + head
                    partial_lse[partial] = row_max[m] + T.log2(row_sum[m])

    @T.prim_func
    def merge_splits(
        partial_out: T.Tensor((elements,), "float32"),  # [num_splits, total_q, NUM_Q_HEADS, V_HEAD_DIM]
        partial_lse: T.Tensor((elements,), "float32"),  # [num_splits, total_q, NUM_Q_HEADS], base 2
        kv_lens: T.Tensor((elements,), "int32"),  # [batch]
        cu_q: T.Tensor((elements,), "int32"),  # [batch + 1]
        v_scale: T.Tensor((elements,), "float32"),  # [NUM_KV_HEADS]
        out: T.Tensor((elements,), DTYPE),  # [total_q, NUM_Q_HEADS, V_HEAD_DIM]
        lse: T.Tensor((elements,), "float32"),  # [total_q, NUM_Q_HEADS], natural logarithm
        histogram: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS, HISTOGRAM_BINS]
        stride_out_row: T.int64,
        stride_out_head: T.int64,
        stride_v_scale: T.int64,
        total_q: T.int64,
        max_q: T.int32,
        rows: T.int32,
        num_splits: T.int32,
    ):
        """One row of one head out of its partial results; blocks are (row x request, head)."""
        with T.Kernel(rows, NUM_Q_HEADS, threads=MERGE_THREADS) as (block, head):
            row = T.alloc_var(INT, init=T.truncmod(block, max_q))
            request = T.alloc_var(INT, init=T.truncdiv(block, max_q))
            first_row = T.alloc_var(INT, init=cu_q[request])
            q_len = T.alloc_var(INT, init=cu_q[request + 1] - first_row)
            kv_len = T.alloc_var(INT, init=T.max(kv_lens[request], 0))
            oldest = T.alloc_var(INT, init=0)
            tiles = T.alloc_var(INT, init=T.truncdiv(T.max(kv_len - oldest, 1) + BLOCK_N - 1, BLOCK_N))
            chunk = T.alloc_var(INT, init=T.truncdiv(tiles + num_splits - 1, num_splits) * BLOCK_N)
            first_used = T.alloc_var(INT, init=0)
            last_used = T.alloc_var(INT, init=T.truncdiv(T.max(kv_len - oldest, 0) + chunk - 1, chunk))
            used_splits = T.alloc_var(INT, init=T.if_then_else(row < q_len, last_used, 0))
            for n in T.Parallel(HISTOGRAM_BINS):
                if T.And(row == 0, head % GROUP == 0):
                    score_row = request * NUM_KV_HEADS + head // GROUP
                    histogram[T.cast(score_row, "int64") * HISTOGRAM_BINS + n] = 0
            acc = T.alloc_fragment([V_HEAD_DIM], "float32")
            total_max = T.alloc_var("float32", init=NEG_INF)
            total_sum = T.alloc_var("float32", init=0.0)
            split_lse = T.alloc_var("float32", init=0.0)
            new_max = T.alloc_var("float32", init=0.0)
            weight = T.alloc_var("float32", init=0.0)
            rescale = T.alloc_var("float32", init=0.0)
            T.clear(acc)
            for split in T.serial(first_used, used_splits):
                split_lse = partial_lse[(split * total_q + first_row + row) * NUM_Q_HEADS + head]
                new_max = T.max(total_max, split_lse)
                shift = T.if_then_else(new_max == -T.infinity("float32"), 0.0, new_max)
                weight = T.exp2(split_lse - shift)
                rescale = T.exp2(total_max - shift)
                for d in T.Parallel(V_HEAD_DIM):
                    partial = (split * total_q + first_row + row) * NUM_Q_HEADS + head
                    acc[d] = acc[d] * rescale + partial_out[partial * V_HEAD_DIM + d] * weight
                total_sum = total_sum * rescale + weight
                total_max = new_max
            # A row that saw nothing: acc 0, maximum -inf.
            total_sum = T.if_then_else(total_sum > 0, total_sum, 1.0)
            value_scale = v_scale[head // GROUP * stride_v_scale]
            for d in T.Parallel(V_HEAD_DIM):
                acc[d] *= value_scale
            if row < q_len:
                for d in T.Parallel(V_HEAD_DIM):
                    place = (first_row + row) * stride_out_row + head * stride_out_head + d
                    out[place] = T.cast(acc[d] / total_sum, DTYPE)
                lse[(first_row + row) * NUM_Q_HEADS + head] = (total_max + T.log2(total_sum)) * LN2

    @T.prim_func
    def score_keys(
        q: T.Tensor((elements,), DTYPE),  # [total_q, NUM_Q_HEADS, HEAD_DIM]
        k_cache: T.Tensor((elements,), "uint8"),  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]
        k_scale: T.Tensor((elements,), "float32"),  # [NUM_KV_HEADS]
        page_table: T.Tensor((elements,), "int32"),  # [batch, max_pages]
        kv_lens: T.Tensor((elements,), "int32"),  # [batch]
        cu_q: T.Tensor((elements,), "int32"),  # [batch + 1]
        lse: T.Tensor((elements,), "float32"),  # [total_q, NUM_Q_HEADS], natural logarithm
        scores: T.Tensor((elements,), "float32"),  # [batch, NUM_KV_HEADS, pages of max_kv]
        histogram: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS, HISTOGRAM_BINS]
        stride_scores_request: T.int64,
        stride_scores_row: T.int64,
        stride_q_row: T.int64,
        stride_q_head: T.int64,
        stride_k_page: T.int64,
        stride_k_slot: T.int64,
        stride_k_head: T.int64,
        stride_k_scale: T.int64,
        stride_table: T.int64,
        score_tiles: T.int32,
        blocks: T.int32,
    ):
        """Scores of a tile of pages, from the keys read again.

        Blocks are (tile x request, score row).
        """
        with T.Kernel(blocks, NUM_KV_HEADS, threads=SCORE_THREADS) as (block, score_row):
            T.assume(stride_q_row % vector == 0)
            T.assume(stride_q_head % vector == 0)
            T.assume(stride_k_page % vector == 0)
            T.assume(stride_k_slot % vector == 0)
            T.assume(stride_k_head % vector == 0)
            # Warps divide the keys, as they are more than the blocks of 16 rows.
            score_policy = T.GemmWarpPolicy.FullCol
            q_tile = T.alloc_shared([SCORE_BLOCK_M, HEAD_DIM], DTYPE)
            k_tile = T.alloc_shared([SCORE_BLOCK_N, HEAD_DIM], DTYPE)
            k_bytes = T.alloc_shared([SCORE_BLOCK_N, HEAD_DIM], "uint8")
            logits = T.alloc_fragment([SCORE_BLOCK_M, SCORE_BLOCK_N], "float32")
            total = T.alloc_fragment([SCORE_BLOCK_N], "float32")
            totals = T.alloc_fragment([SCORE_BLOCK_N], "float32")
            row_lse = T.alloc_fragment([SCORE_BLOCK_M], "float32")
            means = T.alloc_fragment([SCORE_BLOCK_N], "float32")
            pooled = T.alloc_fragment([SCORE_PAGES], "float32")
            spread = T.alloc_shared([SCORE_BLOCK_N], "float32")
            tile = T.alloc_var(INT, init=T.truncmod(block, score_tiles))
            request = T.alloc_var(INT, init=T.truncdiv(block, score_tiles))
            first_row = T.alloc_var(INT, init=cu_q[request])
            q_len = T.alloc_var(INT, init=cu_q[request + 1] - first_row)
            prefix = T.alloc_var(INT, init=T.if_then_else(q_len > 0, T.max(kv_lens[request], 0) - q_len, 0))
            first = T.alloc_var(INT, init=tile * SCORE_PAGES * PAGE_SIZE)
            start = T.alloc_var(INT, init=first)
            end = T.alloc_var(INT, init=T.min(first + SCORE_PAGES * PAGE_SIZE, prefix))
            # A block without keys does nothing: no step of its loops, and no score to write.
            live = T.alloc_var(INT, init=T.if_then_else(first < prefix, q_len, 0))
            T.clear(totals)
            # A block without keys reads none.
            for kv_head in T.serial(score_row, score_row + T.min(live, 1)):
                logit_scale = T.alloc_var("float32", init=LOGIT_SCALE * k_scale[kv_head * stride_k_scale])
                # Past the end the last key is read again: slots nobody wrote may hold NaN.
                for n, d in T.Parallel(SCORE_BLOCK_N, HEAD_DIM):
                    key = T.min(start + n, end - 1)
                    page = page_table[request * stride_table + T.truncdiv(key, PAGE_SIZE)]
                    slot = T.truncmod(key, PAGE_SIZE)
                    k_bytes[n, d] = k_cache[page * stride_k_page + slot * stride_k_slot + kv_head * stride_k_head + d]
                for n, d in T.Parallel(SCORE_BLOCK_N, HEAD_DIM):
                    k_tile[n, d] = decode_float8(k_bytes[n, d])
                for step in T.serial(T.truncdiv(q_len * GROUP + SCORE_BLOCK_M - 1, SCORE_BLOCK_M)):
                    for m, d in T.Parallel(SCORE_BLOCK_M, HEAD_DIM):
                        packed = step * SCORE_BLOCK_M + m
                        rank, head = packed // GROUP, kv_head * GROUP + packed % GROUP
                        q_tile[m, d] = T.if_then_else(
                            rank < q_len,
                            q[(first_row + rank) * stride_q_row + head * stride_q_head + d],
                            T.cast(0, DTYPE),
                        )
                    T.gemm(q_tile, k_tile, logits, transpose_B=True, clear_accum=True, policy=score_policy)
                    for m in T.Parallel(SCORE_BLOCK_M):
                        # Rows past the last get an infinite log-sum-exp, hence weight 0.
                        packed = step * SCORE_BLOCK_M + m
                        rank, head = packed // GROUP, kv_head * GROUP + packed % GROUP
                        place = T.cast(first_row + rank, "int64") * NUM_Q_HEADS + head
                        row_lse[m] = T.if_then_else(rank < q_len, lse[place] * LOG2E, float("inf"))
                    for m, n in T.Parallel(SCORE_BLOCK_M, SCORE_BLOCK_N):
                        logits[m, n] = T.exp2(logits[m, n] * logit_scale - row_lse[m])
                    T.reduce_sum(logits, total, dim=0, clear=True)
                    for n in T.Parallel(SCORE_BLOCK_N):
                        totals[n] += total[n]
            for n in T.Parallel(SCORE_BLOCK_N):
                # A fixed denominator: a key outside a row's window counts as weight 0.
                mean = totals[n] / T.cast(q_len * SCORE_HEADS, "float32")
                means[n] = mean
            for n in T.Parallel(SCORE_BLOCK_N):
                spread[n] = T.if_then_else(start + n < end, means[n], NEG_INF)
            T.fill(pooled, NEG_INF)
            for slot in T.serial(PAGE_SIZE):
                for n in T.Parallel(SCORE_PAGES):
                    pooled[n] = T.max(pooled[n], spread[n * PAGE_SIZE + slot])
            for n in T.Parallel(SCORE_PAGES):
                if first + n * PAGE_SIZE < prefix:
                    place = request * stride_scores_request + score_row * stride_scores_row + tile * SCORE_PAGES + n
                    scores[place] = pooled[n]
            for n in T.Parallel(SCORE_PAGES):
                if first + n * PAGE_SIZE < prefix:
                    counted = T.cast(request * NUM_KV_HEADS + score_row, "int64") * HISTOGRAM_BINS
                    bin = T.shift_right(T.reinterpret(pooled[n], INT), HISTOGRAM_SHIFT) & (HISTOGRAM_BINS - 1)
                    T.atomic_add(histogram[counted + bin], 1)

    return attend_splits, merge_splits, score_keys


def row_tiles_of(max_q: int) -> int:
    """Tiles of packed rows of a request of so many rows."""
    return -(-max_q * GROUP // BLOCK_M)


def num_splits(batch: int, max_q: int, max_kv: int, num_sms: int) -> int:
    """Splits of every request's keys: enough blocks to fill the device, and no more splits than tiles."""
    blocks = row_tiles_of(max_q) * NUM_KV_HEADS * batch
    return max(1, min(CTAS_PER_SM * num_sms // max(1, blocks), -(-max_kv // BLOCK_N)))


def scratch_bytes(total_q: int, splits: int) -> list[int]:
    """Bytes of each scratch array, in the order in which they lie in the workspace."""
    partials = splits * total_q * NUM_Q_HEADS
    arrays = [partials * V_HEAD_DIM * 4, partials * 4]
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in arrays]


def workspace_bytes(*, total_q: int, batch: int, max_q: int, max_kv: int, num_sms: int) -> int:
    """Bytes of scratch that a launch of these sizes needs."""
    splits = num_splits(batch, max_q, max_kv, num_sms)
    return sum(scratch_bytes(total_q, splits))


def launch(
    *,
    functions: Callable[[int], Mapping[str, Callable[..., None]]],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor,
    histogram: torch.Tensor,
    workspace: torch.Tensor,
    max_q: int,
    max_kv: int,
    num_sms: int,
) -> None:
    """Enqueues the kernels on the current stream; allocates nothing and never waits for the device.

    functions  what device_functions compiled to, by name, for a vector width: called with a grid and the arguments
    """
    total_q, batch, row_tiles = q.shape[0], kv_lens.shape[0], row_tiles_of(max_q)
    splits = num_splits(batch, max_q, max_kv, num_sms)
    sizes = scratch_bytes(total_q, splits)
    partial_out, partial_lse = workspace[: sum(sizes)].split(sizes)
    places = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    aligned = all(array.data_ptr() % (VECTOR * array.element_size()) == 0 for array in (q, k_cache, v_cache))
    run = functions(VECTOR if aligned and all(place % VECTOR == 0 for place in places) else 1)
    blocks = NUM_KV_HEADS * row_tiles * batch
    run["attend_splits"](
        (blocks, splits),
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k_scale=k_scale,
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q=cu_q,
        partial_out=partial_out,
        partial_lse=partial_lse,
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_k_page=k_cache.stride(0),
        stride_k_slot=k_cache.stride(1),
        stride_k_head=k_cache.stride(2),
        stride_v_page=v_cache.stride(0),
        stride_v_slot=v_cache.stride(1),
        stride_v_head=v_cache.stride(2),
        stride_k_scale=k_scale.stride(0),
        stride_table=page_table.stride(0),
        total_q=total_q,
        row_tiles=row_tiles,
        blocks=blocks,
        num_splits=splits,
    )
    run["merge_splits"](
        (max_q * batch, NUM_Q_HEADS),
        partial_out=partial_out,
        partial_lse=partial_lse,
        kv_lens=kv_lens,
        cu_q=cu_q,
        v_scale=v_scale,
        out=out,
        lse=lse,
        histogram=histogram,
        stride_out_row=out.stride(0),
        stride_out_head=out.stride(1),
        stride_v_scale=v_scale.stride(0),
        total_q=total_q,
        max_q=max_q,
        rows=max_q * batch,
        num_splits=splits,
    )
    score_tiles = -(-scores.shape[2] // SCORE_PAGES)
    run["score_keys"](
        (score_tiles * batch, NUM_KV_HEADS),
        q=q,
        k_cache=k_cache,
        k_scale=k_scale,
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q=cu_q,
        lse=lse,
        scores=scores,
        histogram=histogram,
        stride_scores_request=scores.stride(0),
        stride_scores_row=scores.stride(1),
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_k_page=k_cache.stride(0),
        stride_k_slot=k_cache.stride(1),
        stride_k_head=k_cache.stride(2),
        stride_k_scale=k_scale.stride(0),
        stride_table=page_table.stride(0),
        score_tiles=score_tiles,
        blocks=score_tiles * batch,
    )
