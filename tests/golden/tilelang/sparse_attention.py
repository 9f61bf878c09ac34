"""sparse_attention: the rows of every request over its selected keys and a dense tail of its paged KV cache.

heads  32 query heads on 8 KV heads (4 to a group), head_dim 128
cache  bfloat16, pages of 16 keys, any strides but a unit last one
chosen one selection per request and KV head: blocks of keys by number, -1 padded

A row at position p sees the selected keys before tail_start and every key from tail_start to p. The two form one list,
selection first, that is split between blocks: attend_splits writes partial results and merge_splits combines them.

Grids come from bounds; lengths and counts are read on the device, so a captured launch stays right for any within them.
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

BLOCK_M = 16  # packed rows of a tile; row m is query row m // GROUP of head m % GROUP
BLOCK_N = 64  # keys of an iteration
THREADS = 128
MERGE_THREADS = 128
VECTOR = 8  # elements read at once where every stride and address is a multiple of them
CTAS_PER_SM = 2  # blocks the grid of splits aims at, per multiprocessor
ALIGNMENT = 256  # bytes; of every scratch array
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
        indices: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS, width], of blocks of keys_of_index keys
        counts: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS]
        slots: T.Tensor((elements,), "int32"),  # [batch, rows, width, slot_words], where the cache has them
        tail_start: T.Tensor((elements,), "int32"),  # [batch]
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
        stride_table: T.int64,
        stride_indices_request: T.int64,
        stride_indices_row: T.int64,
        stride_counts: T.int64,
        total_q: T.int64,
        width: T.int32,
        keys_of_index: T.int32,
        slot_words: T.int32,  # of 32 bits; 0 where the page table says where keys are
        num_pages: T.int32,
        row_tiles: T.int32,
        blocks: T.int32,
        num_splits: T.int32,
    ):
        """One tile of packed rows over one split of the list; blocks are (KV head x tile x request, split)."""
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
            logits = T.alloc_fragment([BLOCK_M, BLOCK_N], "float32")
            weights = T.alloc_shared([BLOCK_M, BLOCK_N], DTYPE)
            acc = T.alloc_fragment([BLOCK_M, V_HEAD_DIM], "float32")
            row_max = T.alloc_fragment([BLOCK_M], "float32")
            row_sum = T.alloc_fragment([BLOCK_M], "float32")
            shift = T.alloc_fragment([BLOCK_M], "float32")
            rescale = T.alloc_fragment([BLOCK_M], "float32")
            keys = T.alloc_shared([BLOCK_N], INT)  # of a tile, negative for none,
            pages = T.alloc_shared([BLOCK_N], INT)  # and where the cache holds them
            page_slots = T.alloc_shared([BLOCK_N], INT)
            blocks_of_slots = T.alloc_shared([BLOCK_N], "int64")
            slot_shift = T.alloc_var("int64", init=T.max(slot_words - 1, 0) * 32)
            blocks_of_page = T.alloc_var("int64", init=T.max(T.truncdiv(PAGE_SIZE, keys_of_index), 1))
            kv_head = T.alloc_var(INT, init=block % NUM_KV_HEADS)
            tile = T.alloc_var(INT, init=T.truncmod(T.truncdiv(block, NUM_KV_HEADS), row_tiles))
            request = T.alloc_var(INT, init=T.truncdiv(T.truncdiv(block, NUM_KV_HEADS), row_tiles))
            first_row = T.alloc_var(INT, init=cu_q[request])
            q_len = T.alloc_var(INT, init=cu_q[request + 1] - first_row)
            prefix = T.alloc_var(INT, init=kv_lens[request] - q_len)  # position of the first row
            row_offset = T.alloc_var("int64", init=request * stride_indices_request + kv_head * stride_indices_row)
            count = T.alloc_var(INT, init=counts[request * stride_counts + kv_head])
            num_keys = T.alloc_var(INT, init=T.max(kv_lens[request], 0))
            tail = T.alloc_var(INT, init=T.min(T.max(tail_start[request], 0), num_keys))
            # Without keys before the tail nothing can be selected.
            selected = T.alloc_var(INT, init=T.min(T.max(count, 0), width) * keys_of_index * T.min(tail, 1))
            listed = T.alloc_var(INT, init=selected + num_keys - tail)
            # Whole tiles and at least one, so that splits past a list's end are empty.
            tiles = T.alloc_var(INT, init=T.truncdiv(T.max(listed, 1) + BLOCK_N - 1, BLOCK_N))
            chunk = T.alloc_var(INT, init=T.truncdiv(tiles + num_splits - 1, num_splits) * BLOCK_N)
            spare = T.alloc_var(INT, init=T.max(num_keys - 1, 0))
            spare_page = T.alloc_var(INT, init=page_table[request * stride_table + T.truncdiv(spare, PAGE_SIZE)])
            spare_slot = T.alloc_var(INT, init=T.truncmod(spare, PAGE_SIZE))
            spare_page = T.min(T.max(spare_page, 0), num_pages - 1)
            has_slots = T.alloc_var(INT, init=T.min(T.min(slot_words, selected), 1))
            begin = T.alloc_var(INT, init=split * chunk)
            end = T.alloc_var(INT, init=T.min(begin + chunk, listed))
            first = T.alloc_var(INT, init=tile * BLOCK_M)
            # A block without rows or keys does nothing: no step of its loop, and no row to write.
            rows = T.alloc_var(INT, init=T.if_then_else(begin < end, q_len, 0))
            places = T.alloc_var(INT, init=T.if_then_else(first < rows * GROUP, end - begin, 0))
            for m, d in T.Parallel(BLOCK_M, HEAD_DIM):
                row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                q_tile[m, d] = T.if_then_else(
                    row < rows, q[(first_row + row) * stride_q_row + head * stride_q_head + d], T.cast(0, DTYPE)
                )
            T.clear(acc)
            T.fill(row_max, -T.infinity("float32"))
            T.clear(row_sum)
            for step in T.Pipelined(T.truncdiv(places + BLOCK_N - 1, BLOCK_N), num_stages=0):
                for n in T.Parallel(BLOCK_N):
                    place = T.min(begin + step * BLOCK_N + n, end - 1)
                    named = row_offset + T.truncdiv(place, keys_of_index)
                    index = T.if_then_else(place < selected, indices[named], 0)
                    # Whatever is far past the tail may as well be just past it, where no product overflows.
                    chosen = T.min(index, T.truncdiv(tail, keys_of_index) + 1) * keys_of_index
                    chosen_key = chosen + T.truncmod(place, keys_of_index)
                    # A selected key of the tail would count twice, and a negative one stands for none.
                    selected_key = T.if_then_else(chosen_key < tail, chosen_key, -1)
                    key = T.if_then_else(place < selected, selected_key, tail + place - selected)
                    keys[n] = T.if_then_else(begin + step * BLOCK_N + n < end, key, -1)
                for n in T.Parallel(BLOCK_N):
                    # Slots nobody wrote may hold NaN, and 0 * NaN is NaN, so that no key is the spare one.
                    key = T.if_then_else(keys[n] >= 0, keys[n], spare)
                    page = page_table[request * stride_table + T.truncdiv(key, PAGE_SIZE)]
                    pages[n] = T.if_then_else(keys[n] >= 0, page, spare_page)
                    page_slots[n] = T.truncmod(key, PAGE_SIZE)
                # Selected blocks may say themselves where they are, in a 32-bit word or two; one step or none.
                for _ in T.serial(has_slots):
                    for n in T.Parallel(BLOCK_N):
                        place = T.min(begin + step * BLOCK_N + n, selected - 1)
                        word = (row_offset + T.truncdiv(place, keys_of_index)) * slot_words
                        upper = T.shift_left(T.cast(slots[word + slot_words - 1], "int64"), slot_shift)
                        lower_bits = T.shift_left(T.cast(1, "int64"), slot_shift) - 1
                        blocks_of_slots[n] = upper | (T.cast(slots[word], "int64") & lower_bits)
                    for n in T.Parallel(BLOCK_N):
                        if begin + step * BLOCK_N + n < selected:
                            # A block that is nowhere in the cache stands for none.
                            page = T.truncdiv(blocks_of_slots[n], blocks_of_page)
                            is_somewhere = T.And(blocks_of_slots[n] >= 0, page < num_pages)
                            found = T.And(is_somewhere, keys[n] >= 0)
                            block_slot = T.truncmod(blocks_of_slots[n], blocks_of_page) * keys_of_index
                            slot = block_slot + T.truncmod(begin + step * BLOCK_N + n, keys_of_index)
                            pages[n] = T.if_then_else(found, T.cast(page, INT), spare_page)
                            page_slots[n] = T.if_then_else(found, T.cast(slot, INT), spare_slot)
                            keys[n] = T.if_then_else(found, keys[n], -1)
                for n, d in T.Parallel(BLOCK_N, HEAD_DIM):
                    k_tile[n, d] = k_cache[
                        pages[n] * stride_k_page + page_slots[n] * stride_k_slot + kv_head * stride_k_head + d
                    ]
                for n, d in T.Parallel(BLOCK_N, V_HEAD_DIM):
                    v_tile[n, d] = v_cache[
                        pages[n] * stride_v_page + page_slots[n] * stride_v_slot + kv_head * stride_v_head + d
                    ]
                T.gemm(q_tile, k_tile, logits, transpose_B=True, clear_accum=True, policy=policy)
                for m, n in T.Parallel(BLOCK_M, BLOCK_N):
                    position = prefix + (first + m) // GROUP
                    visible = T.And(keys[n] >= 0, keys[n] <= position)
                    logits[m, n] = T.if_then_else(visible, logits[m, n] * LOGIT_SCALE, NEG_INF)
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
        counts: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS]
        tail_start: T.Tensor((elements,), "int32"),  # [batch]
        out: T.Tensor((elements,), DTYPE),  # [total_q, NUM_Q_HEADS, V_HEAD_DIM]
        lse: T.Tensor((elements,), "float32"),  # [total_q, NUM_Q_HEADS], natural logarithm
        stride_out_row: T.int64,
        stride_out_head: T.int64,
        stride_counts: T.int64,
        total_q: T.int64,
        width: T.int32,
        keys_of_index: T.int32,
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
            count = T.alloc_var(INT, init=counts[request * stride_counts + head // GROUP])
            num_keys = T.alloc_var(INT, init=T.max(kv_lens[request], 0))
            tail = T.alloc_var(INT, init=T.min(T.max(tail_start[request], 0), num_keys))
            # Without keys before the tail nothing can be selected.
            selected = T.alloc_var(INT, init=T.min(T.max(count, 0), width) * keys_of_index * T.min(tail, 1))
            listed = T.alloc_var(INT, init=selected + num_keys - tail)
            # Whole tiles and at least one, so that splits past a list's end are empty.
            tiles = T.alloc_var(INT, init=T.truncdiv(T.max(listed, 1) + BLOCK_N - 1, BLOCK_N))
            chunk = T.alloc_var(INT, init=T.truncdiv(tiles + num_splits - 1, num_splits) * BLOCK_N)
            first_used = T.alloc_var(INT, init=0)
            last_used = T.alloc_var(INT, init=T.truncdiv(listed + chunk - 1, chunk))
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

    return attend_splits, merge_splits


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
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in (partials * V_HEAD_DIM * 4, partials * 4)]


def workspace_bytes(*, total_q: int, batch: int, max_q: int, max_kv: int, num_sms: int) -> int:
    """Bytes of scratch that a launch of these sizes needs."""
    return sum(scratch_bytes(total_q, num_splits(batch, max_q, max_kv, num_sms)))


def launch(
    *,
    functions: Callable[[int], Mapping[str, Callable[..., None]]],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    slots: torch.Tensor | None,
    tail_start: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor,
    max_q: int,
    max_kv: int,
    block: int,
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
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q=cu_q,
        indices=indices,
        counts=counts,
        slots=indices if slots is None else slots,
        tail_start=tail_start,
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
        stride_table=page_table.stride(0),
        stride_indices_request=indices.stride(0),
        stride_indices_row=indices.stride(1),
        stride_counts=counts.stride(0),
        total_q=total_q,
        width=indices.shape[2],
        keys_of_index=block,
        slot_words=0 if slots is None else slots.element_size() // 4,
        num_pages=k_cache.shape[0],
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
        counts=counts,
        tail_start=tail_start,
        out=out,
        lse=lse,
        stride_out_row=out.stride(0),
        stride_out_head=out.stride(1),
        stride_counts=counts.stride(0),
        total_q=total_q,
        width=indices.shape[2],
        keys_of_index=block,
        max_q=max_q,
        rows=max_q * batch,
        num_splits=splits,
    )
