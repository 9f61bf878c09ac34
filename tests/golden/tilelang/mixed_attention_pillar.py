"""mixed_attention: one launch for a batch in which some requests verify, with scores, and others draft.

heads  32 query heads on 8 KV heads (4 to a group), head_dim 128
cache  bfloat16, pages of 16 keys, any strides but a unit last one
chosen one selection per request and KV head: blocks of keys by number, -1 padded
scores mean attention weight over every row and the heads of a group

A request verifies where its mode is 0: its rows see every key. Otherwise they see the selected keys before tail_start
and every key from there. Either is a list of keys, which is empty of selected ones where a request verifies.

The lists of all requests, KV heads and tiles of rows lie end to end, and every program takes an equal share of their
tiles of keys, whatever requests they belong to. A list that one program reads whole is done; of others, programs leave
partial results in slots of their own, which merge_splits combines.

score_keys then reads the keys once more, now that the rows' log-sum-exp is known, and averages their weights.

The grid comes from the device; modes, lengths and counts are read on it, so that a captured launch stays right for any
batch within the bounds.
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
SCANNED_REQUESTS = 128  # whose work is added up at a time
SCORE_HEADS = 4  # query heads averaged into one score
SCORE_BLOCK_M = 32  # packed rows of a score tile
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

    @T.macro
    def read_work(
        works, chunk, kv_lens, cu_q, mode, counts, tail_start,
        stride_counts, width, keys_of_index, num_requests
    ):
        """Work of a chunk of requests, in tiles of keys of all their KV heads and tiles of rows; 0 past the last."""
        counted = T.alloc_fragment([SCANNED_REQUESTS], "int64")
        T.clear(counted)
        for kv_head in T.serial(NUM_KV_HEADS):
            for n in T.Parallel(SCANNED_REQUESTS):
                request = T.min(chunk * SCANNED_REQUESTS + n, num_requests - 1)
                q_len, num_keys = cu_q[request + 1] - cu_q[request], T.max(kv_lens[request], 0)
                tail = T.min(T.max(tail_start[request], 0), num_keys)
                chosen = T.min(T.max(counts[request * stride_counts + kv_head], 0), width) * keys_of_index
                # Without keys before the tail nothing can be selected.
                drafted = chosen * T.min(tail, 1) + num_keys - tail
                listed = T.if_then_else(mode[request] != 0, drafted, num_keys)
                key_tiles = T.max(T.truncdiv(listed + BLOCK_N - 1, BLOCK_N), 1)
                tiles = T.truncdiv(q_len * GROUP + BLOCK_M - 1, BLOCK_M)
                counted[n] += T.cast(key_tiles, "int64") * tiles
        for n in T.Parallel(SCANNED_REQUESTS):
            works[n] = T.if_then_else(chunk * SCANNED_REQUESTS + n < num_requests, counted[n], T.cast(0, "int64"))

    @T.prim_func
    def attend_splits(
        q: T.Tensor((elements,), DTYPE),  # [total_q, NUM_Q_HEADS, HEAD_DIM]
        k_cache: T.Tensor((elements,), DTYPE),  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]
        v_cache: T.Tensor((elements,), DTYPE),  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, V_HEAD_DIM]
        page_table: T.Tensor((elements,), "int32"),  # [batch, max_pages]
        kv_lens: T.Tensor((elements,), "int32"),  # [batch]
        cu_q: T.Tensor((elements,), "int32"),  # [batch + 1]
        mode: T.Tensor((elements,), "int32"),  # [batch], 0 where a request verifies
        indices: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS, width], of blocks of keys_of_index keys
        counts: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS]
        slots: T.Tensor((elements,), "int32"),  # [batch, rows, width, slot_words], where the cache has them
        tail_start: T.Tensor((elements,), "int32"),  # [batch]
        partial_out: T.Tensor((elements,), "float32"),  # [2 * programs, BLOCK_M, V_HEAD_DIM]
        partial_lse: T.Tensor((elements,), "float32"),  # [2 * programs, BLOCK_M], base 2
        owners: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS, row_tiles], who begins a tile's list
        pieces: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS, row_tiles], how many read it
        out: T.Tensor((elements,), DTYPE),  # [total_q, NUM_Q_HEADS, V_HEAD_DIM]
        lse: T.Tensor((elements,), "float32"),  # [total_q, NUM_Q_HEADS], natural logarithm
        stride_q_row: T.int64,
        stride_q_head: T.int64,
        stride_k_page: T.int64,
        stride_k_slot: T.int64,
        stride_k_head: T.int64,
        stride_v_page: T.int64,
        stride_v_slot: T.int64,
        stride_v_head: T.int64,
        stride_out_row: T.int64,
        stride_out_head: T.int64,
        stride_table: T.int64,
        stride_indices_request: T.int64,
        stride_indices_row: T.int64,
        stride_counts: T.int64,
        width: T.int32,
        keys_of_index: T.int32,
        slot_words: T.int32,  # of 32 bits; 0 where the page table says where keys are
        num_pages: T.int32,
        row_tiles: T.int32,
        num_requests: T.int32,
        programs: T.int32,
    ):
        """An equal share of the work of all lists; blocks are shares."""
        with T.Kernel(programs, threads=THREADS) as program:
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
            works = T.alloc_shared([SCANNED_REQUESTS], "int64")
            chunks = T.alloc_var(INT, init=T.truncdiv(num_requests + SCANNED_REQUESTS - 1, SCANNED_REQUESTS))
            all_work = T.alloc_var("int64", init=0)
            for chunk in T.serial(chunks):
                read_work(
                    works, chunk, kv_lens, cu_q, mode, counts, tail_start,
                    stride_counts, width, keys_of_index, num_requests
                )
                for n in T.serial(T.min(SCANNED_REQUESTS, num_requests - chunk * SCANNED_REQUESTS)):
                    all_work += works[n]
            share = T.alloc_var("int64", init=T.max(T.truncdiv(all_work + programs - 1, programs), 1))
            share_begin = T.alloc_var("int64", init=program * share)
            share_end = T.alloc_var("int64", init=T.min(share_begin + share, all_work))
            # The requests with the first tile of the share and with its last, and the work before them.
            first_request = T.alloc_var(INT, init=0)
            last_request = T.alloc_var(INT, init=0)
            before = T.alloc_var("int64", init=0)
            summed = T.alloc_var("int64", init=0)
            for chunk in T.serial(chunks):
                read_work(
                    works, chunk, kv_lens, cu_q, mode, counts, tail_start,
                    stride_counts, width, keys_of_index, num_requests
                )
                for n in T.serial(T.min(SCANNED_REQUESTS, num_requests - chunk * SCANNED_REQUESTS)):
                    summed += works[n]
                    before = T.if_then_else(summed <= share_begin, summed, before)
                    first_request += T.if_then_else(summed <= share_begin, 1, 0)
                    last_request += T.if_then_else(summed < share_end, 1, 0)
            # Without work of its own a program goes through no list.
            lists = T.alloc_var(INT, init=T.if_then_else(share_begin < share_end, last_request + 1 - first_request, 0))
            work = T.alloc_var("int64", init=0)  # of a list
            for number in T.serial(lists * NUM_KV_HEADS):
                # Of the list before; what follows the inner loops is done by the warps alone that multiply.
                before += work
                request = T.alloc_var(INT, init=first_request + number // NUM_KV_HEADS)
                kv_head = T.alloc_var(INT, init=number % NUM_KV_HEADS)
                first_row = T.alloc_var(INT, init=cu_q[request])
                q_len = T.alloc_var(INT, init=cu_q[request + 1] - first_row)
                rows = T.alloc_var(INT, init=q_len)
                kv_len = T.alloc_var(INT, init=kv_lens[request])
                num_keys = T.alloc_var(INT, init=T.max(kv_len, 0))
                drafts = T.alloc_var("bool", init=mode[request] != 0)
                count = T.alloc_var(INT, init=T.min(T.max(counts[request * stride_counts + kv_head], 0), width))
                tail = T.alloc_var(INT, init=T.if_then_else(drafts, tail_start[request], 0))
                tail = T.min(T.max(tail, 0), num_keys)
                selected = T.alloc_var(INT, init=T.if_then_else(drafts, count * keys_of_index * T.min(tail, 1), 0))
                listed = T.alloc_var(INT, init=selected + num_keys - tail)
                spare = T.alloc_var(INT, init=T.max(num_keys - 1, 0))
                spare_page = T.alloc_var(INT, init=page_table[request * stride_table + T.truncdiv(spare, PAGE_SIZE)])
                spare_slot = T.alloc_var(INT, init=T.truncmod(spare, PAGE_SIZE))
                spare_page = T.min(T.max(spare_page, 0), num_pages - 1)
                has_slots = T.alloc_var(INT, init=T.min(T.min(slot_words, selected), 1))
                row_offset = T.alloc_var("int64", init=request * stride_indices_request + kv_head * stride_indices_row)
                # At least one tile, so that rows without keys are written as well.
                key_tiles = T.alloc_var(INT, init=T.max(T.truncdiv(listed + BLOCK_N - 1, BLOCK_N), 1))
                tiles_of_rows = T.truncdiv(q_len * GROUP + BLOCK_M - 1, BLOCK_M)
                work = T.cast(key_tiles, "int64") * tiles_of_rows
                # What the share has of this list.
                low = T.alloc_var("int64", init=T.max(share_begin - before, 0))
                high = T.alloc_var("int64", init=T.min(share_end - before, work))
                begin_tile = T.alloc_var(INT, init=T.cast(T.truncdiv(low, key_tiles), INT))
                end_tile = T.alloc_var(INT, init=T.cast(T.truncdiv(high + key_tiles - 1, key_tiles), INT))
                end_tile = T.if_then_else(low < high, end_tile, begin_tile)
                for tile in T.serial(begin_tile, end_tile):
                    tile_begin = T.alloc_var("int64", init=T.cast(tile, "int64") * key_tiles)
                    first_key_tile = T.alloc_var(INT, init=T.cast(T.max(low - tile_begin, 0), INT))
                    end_key_tile = T.alloc_var(INT, init=T.cast(T.min(high - tile_begin, key_tiles), INT))
                    start = T.alloc_var(INT, init=first_key_tile * BLOCK_N)
                    end = T.alloc_var(INT, init=T.min(end_key_tile * BLOCK_N, listed))
                    places = T.alloc_var(INT, init=end - start)
                    first = T.alloc_var(INT, init=tile * BLOCK_M)
                    for m, d in T.Parallel(BLOCK_M, HEAD_DIM):
                        row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                        q_tile[m, d] = T.if_then_else(
                            row < rows, q[(first_row + row) * stride_q_row + head * stride_q_head + d], T.cast(0, DTYPE)
                        )
                    T.clear(acc)
                    T.fill(row_max, -T.infinity("float32"))
                    T.clear(row_sum)
                    for step in T.serial(T.truncdiv(places + BLOCK_N - 1, BLOCK_N)):
                        for n in T.Parallel(BLOCK_N):
                            place = T.min(start + step * BLOCK_N + n, end - 1)
                            named = row_offset + T.truncdiv(place, keys_of_index)
                            index = T.if_then_else(place < selected, indices[named], 0)
                            # Whatever is far past the tail may as well be just past it, where no product overflows.
                            chosen = T.min(index, T.truncdiv(tail, keys_of_index) + 1) * keys_of_index
                            chosen_key = chosen + T.truncmod(place, keys_of_index)
                            # A selected key of the tail would count twice, and a negative one stands for none.
                            selected_key = T.if_then_else(chosen_key < tail, chosen_key, -1)
                            key = T.if_then_else(place < selected, selected_key, tail + place - selected)
                            keys[n] = T.if_then_else(start + step * BLOCK_N + n < end, key, -1)
                        for n in T.Parallel(BLOCK_N):
                            # Slots nobody wrote may hold NaN, and 0 * NaN is NaN, so that no key is the spare one.
                            key = T.if_then_else(keys[n] >= 0, keys[n], spare)
                            page = page_table[request * stride_table + T.truncdiv(key, PAGE_SIZE)]
                            pages[n] = T.if_then_else(keys[n] >= 0, page, spare_page)
                            page_slots[n] = T.truncmod(key, PAGE_SIZE)
                        # Selected blocks may say themselves where they are, in a 32-bit word or two; one step or none.
                        for _ in T.serial(has_slots):
                            for n in T.Parallel(BLOCK_N):
                                place = T.min(start + step * BLOCK_N + n, selected - 1)
                                word = (row_offset + T.truncdiv(place, keys_of_index)) * slot_words
                                upper = T.shift_left(T.cast(slots[word + slot_words - 1], "int64"), slot_shift)
                                lower_bits = T.shift_left(T.cast(1, "int64"), slot_shift) - 1
                                blocks_of_slots[n] = upper | (T.cast(slots[word], "int64") & lower_bits)
                            for n in T.Parallel(BLOCK_N):
                                if start + step * BLOCK_N + n < selected:
                                    # A block that is nowhere in the cache stands for none.
                                    page = T.truncdiv(blocks_of_slots[n], blocks_of_page)
                                    is_somewhere = T.And(blocks_of_slots[n] >= 0, page < num_pages)
                                    found = T.And(is_somewhere, keys[n] >= 0)
                                    block_slot = T.truncmod(blocks_of_slots[n], blocks_of_page) * keys_of_index
                                    slot = block_slot + T.truncmod(start + step * BLOCK_N + n, keys_of_index)
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
                            position = kv_len - q_len + (first + m) // GROUP
                            visible = T.And(keys[n] >= 0, keys[n] <= position)
                            logits[m, n] = T.if_then_else(visible, logits[m, n] * LOGIT_SCALE, NEG_INF)
                        fold_tile(acc, row_max, row_sum, logits, weights, v_tile, shift, rescale)
                    # Programs that read the list, of which the owner reads its first keys.
                    owner = T.alloc_var(INT, init=T.cast(T.truncdiv(before + tile_begin, share), INT))
                    tile_end = before + tile_begin + key_tiles
                    readers = T.alloc_var(INT, init=T.cast(T.truncdiv(tile_end - 1, share), INT) - owner + 1)
                    # A program continues at most one list, its first, and leaves at most one unfinished, its last.
                    slot = T.alloc_var(INT, init=2 * program + T.if_then_else(first_key_tile == 0, 1, 0))
                    for m in T.Parallel(BLOCK_M):
                        # A row that saw nothing: acc 0, maximum -inf.
                        row_sum[m] = T.if_then_else(row_sum[m] > 0, row_sum[m], 1.0)
                    for m, d in T.Parallel(BLOCK_M, V_HEAD_DIM):
                        row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                        if T.And(row < rows, readers > 1):
                            partial_out[(slot * BLOCK_M + m) * V_HEAD_DIM + d] = acc[m, d] / row_sum[m]
                    for m, d in T.Parallel(BLOCK_M, V_HEAD_DIM):
                        row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                        if T.And(row < rows, readers == 1):
                            place = (first_row + row) * stride_out_row + head * stride_out_head + d
                            out[place] = T.cast(acc[m, d] / row_sum[m], DTYPE)
                    for m in T.Parallel(BLOCK_M):
                        row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                        if T.And(row < rows, readers > 1):
                            partial_lse[slot * BLOCK_M + m] = row_max[m] + T.log2(row_sum[m])
                    for m in T.Parallel(BLOCK_M):
                        row, head = (first + m) // GROUP, kv_head * GROUP + (first + m) % GROUP
                        if T.And(row < rows, readers == 1):
                            lse[(first_row + row) * NUM_Q_HEADS + head] = (row_max[m] + T.log2(row_sum[m])) * LN2
                    if first_key_tile == 0:
                        owners[(request * NUM_KV_HEADS + kv_head) * row_tiles + tile] = owner
                        pieces[(request * NUM_KV_HEADS + kv_head) * row_tiles + tile] = readers

    @T.prim_func
    def merge_splits(
        partial_out: T.Tensor((elements,), "float32"),  # [2 * programs, BLOCK_M, V_HEAD_DIM]
        partial_lse: T.Tensor((elements,), "float32"),  # [2 * programs, BLOCK_M], base 2
        owners: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS, row_tiles], who begins a tile's list
        pieces: T.Tensor((elements,), "int32"),  # [batch, NUM_KV_HEADS, row_tiles], how many read it
        cu_q: T.Tensor((elements,), "int32"),  # [batch + 1]
        out: T.Tensor((elements,), DTYPE),  # [total_q, NUM_Q_HEADS, V_HEAD_DIM]
        lse: T.Tensor((elements,), "float32"),  # [total_q, NUM_Q_HEADS], natural logarithm
        stride_out_row: T.int64,
        stride_out_head: T.int64,
        row_tiles: T.int32,
        max_q: T.int32,
        rows: T.int32,
    ):
        """One row of one head, if several programs read its list; blocks are (row x request, head)."""
        with T.Kernel(rows, NUM_Q_HEADS, threads=MERGE_THREADS) as (block, head):
            row = T.alloc_var(INT, init=T.truncmod(block, max_q))
            request = T.alloc_var(INT, init=T.truncdiv(block, max_q))
            first_row = T.alloc_var(INT, init=cu_q[request])
            q_len = T.alloc_var(INT, init=cu_q[request + 1] - first_row)
            packed = T.alloc_var(INT, init=row * GROUP + head % GROUP)
            tile = T.alloc_var(INT, init=(request * NUM_KV_HEADS + head // GROUP) * row_tiles + packed // BLOCK_M)
            first_used = T.alloc_var(INT, init=0)
            used_splits = T.alloc_var(INT, init=T.if_then_else(row < q_len, pieces[tile], 1))
            owner = T.alloc_var(INT, init=T.if_then_else(used_splits > 1, owners[tile], 0))
            # What one program read whole is done, and is not read again.
            used_splits = T.if_then_else(used_splits > 1, used_splits, 0)
            acc = T.alloc_fragment([V_HEAD_DIM], "float32")
            total_max = T.alloc_var("float32", init=NEG_INF)
            total_sum = T.alloc_var("float32", init=0.0)
            split_lse = T.alloc_var("float32", init=0.0)
            new_max = T.alloc_var("float32", init=0.0)
            weight = T.alloc_var("float32", init=0.0)
            rescale = T.alloc_var("float32", init=0.0)
            T.clear(acc)
            for split in T.serial(first_used, used_splits):
                split_lse = partial_lse[(2 * (owner + split) + (1 - T.min(split, 1))) * BLOCK_M + packed % BLOCK_M]
                new_max = T.max(total_max, split_lse)
                shift = T.if_then_else(new_max == -T.infinity("float32"), 0.0, new_max)
                weight = T.exp2(split_lse - shift)
                rescale = T.exp2(total_max - shift)
                for d in T.Parallel(V_HEAD_DIM):
                    partial = (2 * (owner + split) + (1 - T.min(split, 1))) * BLOCK_M + packed % BLOCK_M
                    acc[d] = acc[d] * rescale + partial_out[partial * V_HEAD_DIM + d] * weight
                total_sum = total_sum * rescale + weight
                total_max = new_max
            # A row that saw nothing: acc 0, maximum -inf.
            total_sum = T.if_then_else(total_sum > 0, total_sum, 1.0)
            if used_splits > 0:
                for d in T.Parallel(V_HEAD_DIM):
                    place = (first_row + row) * stride_out_row + head * stride_out_head + d
                    out[place] = T.cast(acc[d] / total_sum, DTYPE)
                lse[(first_row + row) * NUM_Q_HEADS + head] = (total_max + T.log2(total_sum)) * LN2

    @T.prim_func
    def score_keys(
        q: T.Tensor((elements,), DTYPE),  # [total_q, NUM_Q_HEADS, HEAD_DIM]
        k_cache: T.Tensor((elements,), DTYPE),  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]
        page_table: T.Tensor((elements,), "int32"),  # [batch, max_pages]
        kv_lens: T.Tensor((elements,), "int32"),  # [batch]
        cu_q: T.Tensor((elements,), "int32"),  # [batch + 1]
        mode: T.Tensor((elements,), "int32"),  # [batch], 0 where a request verifies
        lse: T.Tensor((elements,), "float32"),  # [total_q, NUM_Q_HEADS], natural logarithm
        scores: T.Tensor((elements,), "float32"),  # [batch, NUM_KV_HEADS, max_kv]
        stride_scores_request: T.int64,
        stride_scores_row: T.int64,
        stride_q_row: T.int64,
        stride_q_head: T.int64,
        stride_k_page: T.int64,
        stride_k_slot: T.int64,
        stride_k_head: T.int64,
        stride_table: T.int64,
        score_tiles: T.int32,
        blocks: T.int32,
    ):
        """Scores of a tile of prefix keys, from the keys read again.

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
            logits = T.alloc_fragment([SCORE_BLOCK_M, SCORE_BLOCK_N], "float32")
            total = T.alloc_fragment([SCORE_BLOCK_N], "float32")
            totals = T.alloc_fragment([SCORE_BLOCK_N], "float32")
            row_lse = T.alloc_fragment([SCORE_BLOCK_M], "float32")
            means = T.alloc_fragment([SCORE_BLOCK_N], "float32")
            tile = T.alloc_var(INT, init=T.truncmod(block, score_tiles))
            request = T.alloc_var(INT, init=T.truncdiv(block, score_tiles))
            first_row = T.alloc_var(INT, init=cu_q[request])
            q_len = T.alloc_var(INT, init=cu_q[request + 1] - first_row)
            prefix = T.alloc_var(INT, init=T.if_then_else(q_len > 0, T.max(kv_lens[request], 0) - q_len, 0))
            prefix = T.if_then_else(mode[request] == 0, prefix, 0)
            first = T.alloc_var(INT, init=tile * SCORE_BLOCK_N)
            start = T.alloc_var(INT, init=first)
            end = T.alloc_var(INT, init=T.min(first + SCORE_BLOCK_N, prefix))
            # A block without keys does nothing: no step of its loops, and no score to write.
            live = T.alloc_var(INT, init=T.if_then_else(first < prefix, q_len, 0))
            T.clear(totals)
            # A block without keys reads none.
            for kv_head in T.serial(score_row, score_row + T.min(live, 1)):
                # Past the end the last key is read again: slots nobody wrote may hold NaN.
                for n, d in T.Parallel(SCORE_BLOCK_N, HEAD_DIM):
                    key = T.min(start + n, end - 1)
                    page = page_table[request * stride_table + T.truncdiv(key, PAGE_SIZE)]
                    slot = T.truncmod(key, PAGE_SIZE)
                    k_tile[n, d] = k_cache[page * stride_k_page + slot * stride_k_slot + kv_head * stride_k_head + d]
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
                        logits[m, n] = T.exp2(logits[m, n] * LOGIT_SCALE - row_lse[m])
                    T.reduce_sum(logits, total, dim=0, clear=True)
                    for n in T.Parallel(SCORE_BLOCK_N):
                        totals[n] += total[n]
            for n in T.Parallel(SCORE_BLOCK_N):
                # A fixed denominator: a key outside a row's window counts as weight 0.
                mean = totals[n] / T.cast(q_len * SCORE_HEADS, "float32")
                means[n] = mean
            for n in T.Parallel(SCORE_BLOCK_N):
                if first + n < prefix:
                    place = request * stride_scores_request + score_row * stride_scores_row + first + n
                    scores[place] = means[n]

    return attend_splits, merge_splits, score_keys


def row_tiles_of(max_q: int) -> int:
    """Tiles of packed rows of a request of so many rows."""
    return -(-max_q * GROUP // BLOCK_M)


def num_programs(num_sms: int) -> int:
    """As many as the device holds at once: each goes through its share of the work and ends."""
    return CTAS_PER_SM * num_sms


def scratch_bytes(programs: int, batch: int, row_tiles: int) -> list[int]:
    """Bytes of each scratch array, in the order in which they lie in the workspace."""
    partials, tiles = 2 * programs * BLOCK_M, batch * NUM_KV_HEADS * row_tiles
    arrays = [partials * V_HEAD_DIM * 4, partials * 4, tiles * 4, tiles * 4]
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in arrays]


def workspace_bytes(*, total_q: int, batch: int, max_q: int, max_kv: int, num_sms: int) -> int:
    """Bytes of scratch that a launch of these sizes needs."""
    programs, row_tiles = num_programs(num_sms), row_tiles_of(max_q)
    return sum(scratch_bytes(programs, batch, row_tiles))


def launch(
    *,
    functions: Callable[[int], Mapping[str, Callable[..., None]]],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    mode: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    slots: torch.Tensor | None,
    tail_start: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor,
    workspace: torch.Tensor,
    max_q: int,
    max_kv: int,
    block: int,
    num_sms: int,
) -> None:
    """Enqueues the kernels on the current stream; allocates nothing and never waits for the device.

    functions  what device_functions compiled to, by name, for a vector width: called with a grid and the arguments
    """
    batch, row_tiles, programs = kv_lens.shape[0], row_tiles_of(max_q), num_programs(num_sms)
    sizes = scratch_bytes(programs, batch, row_tiles)
    partial_out, partial_lse, owners, pieces = workspace[: sum(sizes)].split(sizes)
    places = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    aligned = all(array.data_ptr() % (VECTOR * array.element_size()) == 0 for array in (q, k_cache, v_cache))
    run = functions(VECTOR if aligned and all(place % VECTOR == 0 for place in places) else 1)
    run["attend_splits"](
        (programs,),
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q=cu_q,
        mode=mode,
        indices=indices,
        counts=counts,
        slots=indices if slots is None else slots,
        tail_start=tail_start,
        partial_out=partial_out,
        partial_lse=partial_lse,
        owners=owners,
        pieces=pieces,
        out=out,
        lse=lse,
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_k_page=k_cache.stride(0),
        stride_k_slot=k_cache.stride(1),
        stride_k_head=k_cache.stride(2),
        stride_v_page=v_cache.stride(0),
        stride_v_slot=v_cache.stride(1),
        stride_v_head=v_cache.stride(2),
        stride_out_row=out.stride(0),
        stride_out_head=out.stride(1),
        stride_table=page_table.stride(0),
        stride_indices_request=indices.stride(0),
        stride_indices_row=indices.stride(1),
        stride_counts=counts.stride(0),
        width=indices.shape[2],
        keys_of_index=block,
        slot_words=0 if slots is None else slots.element_size() // 4,
        num_pages=k_cache.shape[0],
        row_tiles=row_tiles,
        num_requests=batch,
        programs=programs,
    )
    run["merge_splits"](
        (max_q * batch, NUM_Q_HEADS),
        partial_out=partial_out,
        partial_lse=partial_lse,
        owners=owners,
        pieces=pieces,
        cu_q=cu_q,
        out=out,
        lse=lse,
        stride_out_row=out.stride(0),
        stride_out_head=out.stride(1),
        row_tiles=row_tiles,
        max_q=max_q,
        rows=max_q * batch,
    )
    score_tiles = -(-scores.shape[2] // SCORE_BLOCK_N)
    run["score_keys"](
        (score_tiles * batch, NUM_KV_HEADS),
        q=q,
        k_cache=k_cache,
        page_table=page_table,
        kv_lens=kv_lens,
        cu_q=cu_q,
        mode=mode,
        lse=lse,
        scores=scores,
        stride_scores_request=scores.stride(0),
        stride_scores_row=scores.stride(1),
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_k_page=k_cache.stride(0),
        stride_k_slot=k_cache.stride(1),
        stride_k_head=k_cache.stride(2),
        stride_table=page_table.stride(0),
        score_tiles=score_tiles,
        blocks=score_tiles * batch,
    )
