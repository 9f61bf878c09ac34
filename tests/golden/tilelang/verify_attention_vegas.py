"""verify_attention: the rows of every request over its whole paged KV cache, with the scores of its prefix keys.

heads  32 query heads on 8 KV heads (4 to a group), head_dim 128
cache  bfloat16, pages of 16 keys, any strides but a unit last one
scores mean attention weight over the first and the last row and all query heads

Row i of a request sits at position kv_len - q_len + i and sees the keys up to its own. A request's keys are split
between blocks for every number of rows: attend_splits writes partial results and merge_splits combines them.

attend_splits also keeps the weights it saw, which score_keys rescales to the final log-sum-exp and averages.

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
SPLIT_KEYS = 2048  # keys of a split, whatever else is in the batch
ALIGNMENT = 256  # bytes; of every scratch array
SCORE_HEADS = 32  # query heads averaged into one score
SCORE_BLOCK_N = 64  # keys of a score tile
SCORE_THREADS = 128
# How scalars are declared: TileLang would write an expression out at every use of a plain name.
INT = "int32"


def device_functions(T: Any, vector: int) -> tuple[Any, ...]:
    """The functions of the device in TileLang's dialect T, in the order in which they are launched.

    vector  elements that every stride and address of queries and caches is a multiple of
    """
    elements = T.dynamic("elements")  # arrays are addressed from their first element, in 64 bits
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
        k_cache: T.Tensor((elements,), DTYPE),  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]
        v_cache: T.Tensor((elements,), DTYPE),  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, V_HEAD_DIM]
        page_table: T.Tensor((elements,), "int32"),  # [batch, max_pages]
        kv_lens: T.Tensor((elements,), "int32"),  # [batch]
        cu_q: T.Tensor((elements,), "int32"),  # [batch + 1]
        partial_out: T.Tensor((elements,), "float32"),  # [num_splits, total_q, NUM_Q_HEADS, V_HEAD_DIM]
        partial_lse: T.Tensor((elements,), "float32"),  # [num_splits, total_q, NUM_Q_HEADS], base 2
        dump: T.Tensor((elements,), "float16"),  # [2 * batch, NUM_Q_HEADS, dump_columns] relative weights
        dump_max: T.Tensor((elements,), "float32"),  # [2 * batch, NUM_Q_HEADS, dump_columns // BLOCK_N], base 2
        stride_q_row: T.int64,
        stride_q_head: T.int64,
        stride_k_page: T.int64,
        stride_k_slot: T.int64,
        stride_k_head: T.int64,
        stride_v_page: T.int64,
        stride_v_slot: T.int64,
        stride_v_head: T.int64,
        stride_table: T.int64,
        dump_columns: T.int64,
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
            T.assume(dump_columns % BLOCK_N == 0)
            q_tile = T.alloc_shared([BLOCK_M, HEAD_DIM], DTYPE)
            k_tile = T.alloc_shared([BLOCK_N, HEAD_DIM], DTYPE)
            v_tile = T.alloc_shared([BLOCK_N, V_HEAD_DIM], DTYPE)
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
            begin = T.alloc_var(INT, init=T.max(split * SPLIT_KEYS, oldest))
            end = T.alloc_var(INT, init=T.min((split + 1) * SPLIT_KEYS, kv_len))
            first = T.alloc_var(INT, init=tile * BLOCK_M)
            # A block without rows or keys does nothing: no step of its loop, and no row to write.
            rows = T.alloc_var(INT, init=T.if_then_else(begin < end, q_len, 0))
            keys = T.alloc_var(INT, init=T.if_then_else(first < rows * GROUP, end - begin, 0))
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
                    k_tile[n, d] = k_cache[page * stride_k_page + slot * stride_k_slot + kv_head * stride_k_head + d]
                for n, d in T.Parallel(BLOCK_N, V_HEAD_DIM):
                    key = T.min(begin + step * BLOCK_N + n, end - 1)
                    page = page_table[request * stride_table + T.truncdiv(key, PAGE_SIZE)]
                    slot = T.truncmod(key, PAGE_SIZE)
                    v_tile[n, d] = v_cache[page * stride_v_page + slot * stride_v_slot + kv_head * stride_v_head + d]
                T.gemm(q_tile, k_tile, logits, transpose_B=True, clear_accum=True, policy=policy)
                for m, n in T.Parallel(BLOCK_M, BLOCK_N):
                    key, position = begin + step * BLOCK_N + n, prefix + (first + m) // GROUP
                    visible = key <= position
                    logits[m, n] = T.if_then_else(visible, logits[m, n] * LOGIT_SCALE, NEG_INF)
                fold_tile(acc, row_max, row_sum, logits, weights, v_tile, shift, rescale)
                for m, n in T.Parallel(BLOCK_M, BLOCK_N):
                    row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                    dump_row = (request * 2 + T.min(row, 1)) * NUM_Q_HEADS + head
                    key = begin + step * BLOCK_N + n
                    if T.And(T.And(row < rows, T.Or(row == 0, row == q_len - 1)), key < prefix):
                        dump[dump_row * dump_columns + key] = T.cast(logits[m, n], "float16")
                for m in T.Parallel(BLOCK_M):
                    row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                    dump_row = (request * 2 + T.min(row, 1)) * NUM_Q_HEADS + head
                    is_scored = T.And(row < rows, T.Or(row == 0, row == q_len - 1))
                    if T.And(is_scored, begin + step * BLOCK_N < prefix):
                        dump_tile = T.truncdiv(begin, BLOCK_N) + step
                        dump_max[dump_row * T.truncdiv(dump_columns, BLOCK_N) + dump_tile] = shift[m]
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
        out: T.Tensor((elements,), DTYPE),  # [total_q, NUM_Q_HEADS, V_HEAD_DIM]
        lse: T.Tensor((elements,), "float32"),  # [total_q, NUM_Q_HEADS], natural logarithm
        stride_out_row: T.int64,
        stride_out_head: T.int64,
        total_q: T.int64,
        max_q: T.int32,
        rows: T.int32,
    ):
        """One row of one head out of its partial results; blocks are (row x request, head)."""
        with T.Kernel(rows, NUM_Q_HEADS, threads=MERGE_THREADS) as (block, head):
            row = T.alloc_var(INT, init=T.truncmod(block, max_q))
            request = T.alloc_var(INT, init=T.truncdiv(block, max_q))
            first_row = T.alloc_var(INT, init=cu_q[request])
            q_len = T.alloc_var(INT, init=cu_q[request + 1] - first_row)
            kv_len = T.alloc_var(INT, init=T.max(kv_lens[request], 0))
            oldest = T.alloc_var(INT, init=0)
            first_used = T.alloc_var(INT, init=T.truncdiv(oldest, SPLIT_KEYS))
            last_used = T.alloc_var(INT, init=T.truncdiv(T.max(kv_len, 0) + SPLIT_KEYS - 1, SPLIT_KEYS))
            used_splits = T.alloc_var(INT, init=T.if_then_else(row < q_len, last_used, 0))
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
            if row < q_len:
                for d in T.Parallel(V_HEAD_DIM):
                    place = (first_row + row) * stride_out_row + head * stride_out_head + d
                    out[place] = T.cast(acc[d] / total_sum, DTYPE)
                lse[(first_row + row) * NUM_Q_HEADS + head] = (total_max + T.log2(total_sum)) * LN2

    @T.prim_func
    def score_keys(
        dump: T.Tensor((elements,), "float16"),  # [2 * batch, NUM_Q_HEADS, dump_columns] relative weights
        dump_max: T.Tensor((elements,), "float32"),  # [2 * batch, NUM_Q_HEADS, dump_columns // BLOCK_N], base 2
        kv_lens: T.Tensor((elements,), "int32"),  # [batch]
        cu_q: T.Tensor((elements,), "int32"),  # [batch + 1]
        lse: T.Tensor((elements,), "float32"),  # [total_q, NUM_Q_HEADS], natural logarithm
        scores: T.Tensor((elements,), "float32"),  # [batch, 1, max_kv]
        stride_scores_request: T.int64,
        stride_scores_row: T.int64,
        dump_columns: T.int64,
        score_tiles: T.int32,
        blocks: T.int32,
    ):
        """Scores of a tile of prefix keys, from the kept weights.

        Blocks are (tile x request, score row).
        """
        with T.Kernel(blocks, 1, threads=SCORE_THREADS) as (block, score_row):
            means = T.alloc_fragment([SCORE_BLOCK_N], "float32")
            tile = T.alloc_var(INT, init=T.truncmod(block, score_tiles))
            request = T.alloc_var(INT, init=T.truncdiv(block, score_tiles))
            first_row = T.alloc_var(INT, init=cu_q[request])
            q_len = T.alloc_var(INT, init=cu_q[request + 1] - first_row)
            prefix = T.alloc_var(INT, init=T.if_then_else(q_len > 0, T.max(kv_lens[request], 0) - q_len, 0))
            first = T.alloc_var(INT, init=tile * SCORE_BLOCK_N)
            start = T.alloc_var(INT, init=first)
            end = T.alloc_var(INT, init=T.min(first + SCORE_BLOCK_N, prefix))
            # A block without keys does nothing: no step of its loops, and no score to write.
            live = T.alloc_var(INT, init=T.if_then_else(first < prefix, q_len, 0))
            T.clear(means)
            for packed in T.serial(T.min(live, 2) * SCORE_HEADS):
                rank, head = packed // SCORE_HEADS, score_row * SCORE_HEADS + packed % SCORE_HEADS
                dumped = request * 2 + rank
                dump_row = dumped * NUM_Q_HEADS + head
                for n in T.Parallel(SCORE_BLOCK_N):
                    row_lse = lse[T.cast(first_row + rank * (q_len - 1), "int64") * NUM_Q_HEADS + head] * LOG2E
                    place = dump_row * dump_columns + start + n
                    means[n] += T.if_then_else(
                        start + n < end,
                        T.cast(dump[place], "float32") * T.exp2(dump_max[T.truncdiv(place, BLOCK_N)] - row_lse),
                        0.0,
                    )
            for n in T.Parallel(SCORE_BLOCK_N):
                # A fixed denominator: a key outside a row's window counts as weight 0.
                means[n] = means[n] / T.cast(T.min(q_len, 2) * SCORE_HEADS, "float32")
            for n in T.Parallel(SCORE_BLOCK_N):
                if first + n < prefix:
                    place = request * stride_scores_request + score_row * stride_scores_row + first + n
                    scores[place] = means[n]

    return attend_splits, merge_splits, score_keys


def row_tiles_of(max_q: int) -> int:
    """Tiles of packed rows of a request of so many rows."""
    return -(-max_q * GROUP // BLOCK_M)


def num_splits(batch: int, max_q: int, max_kv: int, num_sms: int) -> int:
    """Splits of the longest request: as many as it needs, so that no other request has a say in where it is split."""
    return max(1, -(-max_kv // SPLIT_KEYS))


def scratch_bytes(total_q: int, batch: int, max_kv: int, splits: int) -> list[int]:
    """Bytes of each scratch array, in the order in which they lie in the workspace."""
    partials = splits * total_q * NUM_Q_HEADS
    dumped = 2 * batch * NUM_Q_HEADS
    tiles = -(-max_kv // BLOCK_N)
    arrays = [partials * V_HEAD_DIM * 4, partials * 4, dumped * tiles * BLOCK_N * 2, dumped * tiles * 4]
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in arrays]


def workspace_bytes(*, total_q: int, batch: int, max_q: int, max_kv: int, num_sms: int) -> int:
    """Bytes of scratch that a launch of these sizes needs."""
    splits = num_splits(batch, max_q, max_kv, num_sms)
    return sum(scratch_bytes(total_q, batch, max_kv, splits))


def launch(
    *,
    functions: Callable[[int], Mapping[str, Callable[..., None]]],
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
    """Enqueues the kernels on the current stream; allocates nothing and never waits for the device.

    functions  what device_functions compiled to, by name, for a vector width: called with a grid and the arguments
    """
    total_q, batch, row_tiles = q.shape[0], kv_lens.shape[0], row_tiles_of(max_q)
    splits = num_splits(batch, max_q, max_kv, num_sms)
    sizes = scratch_bytes(total_q, batch, max_kv, splits)
    partial_out, partial_lse, dump, dump_max = workspace[: sum(sizes)].split(sizes)
    dump_columns = -(-max_kv // BLOCK_N) * BLOCK_N
    places = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    aligned = all(array.data_ptr() % (VECTOR * array.element_size()) == 0 for array in (q, k_cache, v_cache))
    run = functions(VECTOR if aligned and all(place % VECTOR == 0 for place in places) else 1)
    blocks = NUM_KV_HEADS * row_tiles * batch
    run["attend_splits"](
        (blocks, splits),
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q=cu_q,
        partial_out=partial_out,
        partial_lse=partial_lse,
        dump=dump,
        dump_max=dump_max,
        dump_columns=dump_columns,
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_k_page=k_cache.stride(0),
        stride_k_slot=k_cache.stride(1),
        stride_k_head=k_cache.stride(2),
        stride_v_page=v_cache.stride(0),
        stride_v_slot=v_cache.stride(1),
        stride_v_head=v_cache.stride(2),
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
        out=out,
        lse=lse,
        stride_out_row=out.stride(0),
        stride_out_head=out.stride(1),
        total_q=total_q,
        max_q=max_q,
        rows=max_q * batch,
        num_splits=splits,
    )
    score_tiles = -(-scores.shape[2] // SCORE_BLOCK_N)
    run["score_keys"](
        (score_tiles * batch, 1),
        dump=dump,
        dump_max=dump_max,
        kv_lens=kv_lens,
        cu_q=cu_q,
        lse=lse,
        scores=scores,
        stride_scores_request=scores.stride(0),
        stride_scores_row=scores.stride(1),
        dump_columns=dump_columns,
        score_tiles=score_tiles,
        blocks=score_tiles * batch,
    )
