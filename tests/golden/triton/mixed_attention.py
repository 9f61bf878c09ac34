"""mixed_attention: one launch for a batch in which some requests verify, with scores, and others draft.

heads  32 query heads on 8 KV heads (4 to a group), head_dim 128
cache  bfloat16, pages of 16 keys, any strides but a unit last one
chosen one selection per request and KV head: blocks of keys by number, -1 padded
scores mean attention weight over every row and the heads of a group

A request verifies where its mode is 0: its rows see every key. Otherwise they see the selected keys before tail_start
and every key from there. Either is a list of keys, which is empty of selected ones where a request verifies.

The lists of all requests, KV heads and tiles of rows lie end to end, and every program takes an equal share of their
tiles of keys, whatever requests they belong to. Where shares end inside a list, programs leave partial results in slots
of their own, which the last of a list's programs to finish merges.

score_keys then reads the keys once more, now that the rows' log-sum-exp is known, and averages their weights.

The grid comes from the device; modes, lengths and counts are read on it, so that a captured launch stays right for any
batch within the bounds.
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
CTAS_PER_SM = 1  # blocks the grid of splits aims at, per multiprocessor
ALIGNMENT = 256  # bytes; of every scratch array
SCANNED_LISTS = tl.constexpr(256)  # whose lengths are added up at a time
SCORE_HEADS = tl.constexpr(4)  # query heads averaged into one score
SCORE_BLOCK_M = tl.constexpr(32)  # packed rows of a score tile
SCORE_BLOCK_N = tl.constexpr(64)  # keys of a score tile


@triton.jit
def read_list(request, kv_head, live, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block):
    """First row, rows, keys and mode of a request; selected keys, start of the tail, and length of the list of both."""
    first_row = tl.load(cu_q + request, mask=live, other=0)
    q_len = tl.load(cu_q + request + 1, mask=live, other=0) - first_row
    kv_len = tl.load(kv_lens + request, mask=live, other=0)
    drafts = live & (tl.load(mode + request, mask=live, other=0) != 0)
    num_keys = tl.maximum(kv_len, 0)
    count = tl.load(counts + request * stride_counts + kv_head, mask=drafts, other=0)
    count = tl.minimum(tl.maximum(count, 0), width) * block
    tail = tl.minimum(tl.maximum(tl.load(tail_start + request, mask=drafts, other=0), 0), num_keys)
    return first_row, q_len, kv_len, drafts, count, tail, count + num_keys - tail


@triton.jit
def tiles_of_list(listed, q_len):
    """Tiles of keys, at least one so that rows without keys are written as well, and tiles of packed rows."""
    return tl.maximum(tl.cdiv(listed, BLOCK_N), 1), tl.cdiv(q_len * GROUP, BLOCK_M)


@triton.jit
def work_of_lists(first, end, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block):
    """Tiles of keys that each of SCANNED_LISTS lists is read in, by all of its tiles of rows; 0 from `end` on."""
    lists = first + tl.arange(0, SCANNED_LISTS)
    live = lists < end
    request, kv_head = lists // NUM_KV_HEADS, lists % NUM_KV_HEADS
    _, q_len, _, _, _, _, listed = read_list(
        request, kv_head, live, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block
    )
    key_tiles, row_tiles = tiles_of_list(listed, q_len)
    return tl.where(live, key_tiles.to(tl.int64) * row_tiles, 0)


@triton.jit
def total_work(end, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block):
    """Work of the lists before `end`."""
    total = tl.full([], 0, tl.int64)
    for first in tl.range(0, end, SCANNED_LISTS):
        work = work_of_lists(first, end, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block)
        total += tl.sum(work, 0)
    return total


@triton.jit
def find_list(position, num_lists, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block):
    """The list that holds a position of the work, and the position where it begins."""
    found = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int64)
    seen = tl.full([], 0, tl.int64)
    for first in tl.range(0, num_lists, SCANNED_LISTS):
        work = work_of_lists(first, num_lists, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block)
        passed = (seen + tl.cumsum(work, 0) <= position) & (first + tl.arange(0, SCANNED_LISTS) < num_lists)
        found += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, work, 0), 0)
        seen += tl.sum(work, 0)
    return found, before


@triton.jit
def read_slots(row_slots, blocks, mask, slot_words: tl.constexpr):
    """Places of selected blocks in the cache, of one 32-bit word or two."""
    low = tl.load(row_slots + blocks * slot_words, mask=mask, other=-1)
    if slot_words == 1:
        return low.to(tl.int64)
    high = tl.load(row_slots + blocks * 2 + 1, mask=mask, other=-1)
    return (high.to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def read_places(selection, row_slots, table, start, end, count, tail, num_pages, block, slot_words: tl.constexpr):
    """Positions of one tile of the list, negative for none, and the pages and slots that hold them."""
    places = start + tl.arange(0, BLOCK_N)
    listed = places < tl.minimum(count, end)
    chosen = tl.load(selection + places // block, mask=listed, other=-1)
    # Whatever is far past the tail may as well be just past it, where no product overflows.
    chosen = tl.minimum(chosen, tail // block + 1) * block + places % block
    # A selected key of the tail would count twice, and a negative one stands for none.
    keys = tl.where(places < count, tl.where(chosen < tail, chosen, -1), tail + places - count)
    keys = tl.where(places < end, keys, -1)
    if slot_words == 0:
        pages = tl.load(table + keys // PAGE_SIZE, mask=keys >= 0, other=0).to(tl.int64)
        return keys, pages, keys % PAGE_SIZE
    # Selected blocks say where they are, and one that is nowhere in the cache stands for none.
    blocks = read_slots(row_slots, places // block, listed, slot_words)
    chosen_pages = blocks // (PAGE_SIZE // block)
    keys = tl.where(listed & ((blocks < 0) | (chosen_pages >= num_pages)), -1, keys)
    tail_pages = tl.load(table + keys // PAGE_SIZE, mask=(keys >= 0) & (places >= count), other=0).to(tl.int64)
    slots = blocks % (PAGE_SIZE // block) * block + places % block
    return keys, tl.where(listed, chosen_pages, tail_pages), tl.where(listed, slots.to(tl.int32), keys % PAGE_SIZE)


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


@triton.jit
def merge_split(acc, row_max, row_sum, split_out, split_lse):
    """One split's result [M, Dv] and base-2 log-sum-exp [M] go into acc [M, Dv], row_max and row_sum [M]."""
    new_max = tl.maximum(row_max, split_lse)
    shift = tl.where(new_max == NEG_INF, 0.0, new_max)
    weight = tl.exp2(split_lse - shift)
    rescale = tl.exp2(row_max - shift)
    return acc * rescale[:, None] + split_out * weight[:, None], new_max, row_sum * rescale + weight


@triton.jit
def merge_partials(partial_out, partial_lse, partial, live, first_split, end_split, owner):
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
            distance = (2 * (owner + first + place) + tl.where(first + place == 0, 1, 0)) * BLOCK_M
            split_out = tl.load(out_of + distance * V_HEAD_DIM, mask=used[:, None], other=0.0)
            split_lse = tl.load(lse_of + distance, mask=used, other=NEG_INF)
            acc, row_max, row_sum = merge_split(acc, row_max, row_sum, split_out, split_lse)
    return acc, row_max, row_sum


@triton.jit
def merge_rows(
    partial_out, partial_lse, out, lse, first_packed, kv_head, first_row, q_len, first_split, end_split,
    owner, stride_out_row, stride_out_head
):
    """Final results of some packed rows of a KV head."""
    packed = first_packed + tl.arange(0, MERGED_ROWS)
    live = packed < q_len * GROUP
    rows = first_row + packed // GROUP
    heads = kv_head * GROUP + packed % GROUP
    partial = (packed % BLOCK_M).to(tl.int64)  # in a slot
    acc, row_max, row_sum = merge_partials(partial_out, partial_lse, partial, live, first_split, end_split, owner)
    row_sum = tl.where(row_sum > 0.0, row_sum, 1.0)  # a row that saw nothing: acc 0, maximum -inf
    v_dims = tl.arange(0, BLOCK_V_DIM)
    out_rows = out + rows * stride_out_row + heads * stride_out_head
    tl.store(out_rows[:, None] + v_dims[None, :], acc / row_sum[:, None], mask=live[:, None])
    tl.store(lse + rows * NUM_Q_HEADS + heads, (row_max + tl.log2(row_sum)) * LN2, mask=live)


@triton.jit
def merge_tile(
    partial_out, partial_lse, out, lse, tile, kv_head, first_row, q_len, used_splits,
    owner, stride_out_row, stride_out_head
):
    """Final results of a tile of packed rows."""
    end_packed = tl.minimum((tile + 1) * BLOCK_M, q_len * GROUP)
    for first_packed in tl.range(tile * BLOCK_M, end_packed, MERGED_ROWS):
        merge_rows(
            partial_out, partial_lse, out, lse, first_packed, kv_head, first_row, q_len, 0, used_splits,
            owner, stride_out_row, stride_out_head
        )


# Only cache and query strides and the keys of an index are specialised on; what changes from call to call must not
# compile another variant.
@triton.jit(
    do_not_specialize=[
        "stride_table",
        "stride_indices_request",
        "stride_indices_row",
        "stride_counts",
        "width",
        "num_pages",
        "batch",
    ]
)
def attend_splits(
    q: "*bf16",  # [total_q, NUM_Q_HEADS, HEAD_DIM]
    k_cache: "*bf16",  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]
    v_cache: "*bf16",  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, V_HEAD_DIM]
    page_table: "*i32",  # [batch, max_pages]
    kv_lens: "*i32",  # [batch]
    cu_q: "*i32",  # [batch + 1]
    mode: "*i32",  # [batch], 0 where a request verifies
    indices: "*i32",  # [batch, NUM_KV_HEADS, width], of blocks of `block` keys
    counts: "*i32",  # [batch, NUM_KV_HEADS]
    slots: "*i32",  # [batch, NUM_KV_HEADS, width, slot_words], where the cache holds those blocks; strided as indices
    tail_start: "*i32",  # [batch]
    partial_out: "*fp32",  # [2 * programs, BLOCK_M, V_HEAD_DIM]
    partial_lse: "*fp32",  # [2 * programs, BLOCK_M], base 2
    arrivals: "*i32",  # [programs], 0 before and after
    out: "*bf16",  # [total_q, NUM_Q_HEADS, V_HEAD_DIM]
    lse: "*fp32",  # [total_q, NUM_Q_HEADS], natural logarithm
    stride_q_row: "i64",
    stride_q_head: "i64",
    stride_out_row: "i64",
    stride_out_head: "i64",
    stride_k_page: "i64",
    stride_k_slot: "i64",
    stride_k_head: "i64",
    stride_v_page: "i64",
    stride_v_slot: "i64",
    stride_v_head: "i64",
    stride_table: "i64",
    stride_indices_request: "i64",
    stride_indices_row: "i64",
    stride_counts: "i64",
    width: "i32",
    num_pages: "i32",
    batch: "i32",
    block: tl.constexpr = 1,  # keys that an index names
    slot_words: tl.constexpr = 0,  # of 32 bits; 0 where the page table says where keys are
):
    """An equal share of the work of all lists; programs are shares."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    num_lists = batch * NUM_KV_HEADS
    all_tiles = total_work(num_lists, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block)
    share_tiles = tl.maximum(tl.cdiv(all_tiles, programs), 1)
    position = program * share_tiles
    last = tl.minimum(position + share_tiles, all_tiles)
    if position >= last:
        return

    list_number, before = find_list(
        position, num_lists, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block
    )
    v_dims = tl.arange(0, BLOCK_V_DIM)
    while position < last:
        request, kv_head = list_number // NUM_KV_HEADS, list_number % NUM_KV_HEADS
        is_list = list_number < num_lists
        first_row, q_len, kv_len, drafts, count, tail, listed = read_list(
            request, kv_head, is_list, kv_lens, cu_q, counts, tail_start, mode, stride_counts, width, block
        )
        key_tiles, row_tiles = tiles_of_list(listed, q_len)
        offset = (position - before).to(tl.int32)
        tile = offset // key_tiles
        # From here to the end of the list or of the share; a request without rows has no work to be done.
        first_tile = offset % key_tiles
        taken = tl.minimum(key_tiles - first_tile, last - position).to(tl.int32)
        taken = tl.where(row_tiles > 0, taken, 0)
        begin = first_tile * BLOCK_N
        end = tl.minimum(begin + taken * BLOCK_N, listed)

        packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = packed // GROUP
        heads = kv_head * GROUP + packed % GROUP
        live = rows < q_len
        dims = tl.arange(0, BLOCK_DIM)
        q_offsets = (first_row + rows) * stride_q_row + heads * stride_q_head
        q_tile = tl.load(q + q_offsets[:, None] + dims[None, :], mask=live[:, None], other=0.0)
        positions = kv_len - q_len + rows
        table = page_table + request * stride_table
        row_offset = request * stride_indices_request + kv_head * stride_indices_row
        selection = indices + row_offset
        row_slots = slots + row_offset * slot_words
        k_head = k_cache + kv_head * stride_k_head
        v_head = v_cache + kv_head * stride_v_head
        acc = tl.zeros([BLOCK_M, BLOCK_V_DIM], tl.float32)
        row_max = tl.full([BLOCK_M], NEG_INF, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        keys, pages, page_slots = read_places(
            selection, row_slots, table, begin, end, count, tail, num_pages, block, slot_words
        )
        for place in tl.range(begin, end, BLOCK_N):
            inside = keys >= 0
            k_offsets = pages * stride_k_page + page_slots * stride_k_slot
            v_offsets = pages * stride_v_page + page_slots * stride_v_slot
            # Slots outside are read as zero: what lies there may be NaN, and 0 * NaN is NaN.
            k = tl.load(k_head + k_offsets[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
            v = tl.load(v_head + v_offsets[:, None] + v_dims[None, :], mask=inside[:, None], other=0.0)
            logits = tile_logits(q_tile, k)
            visible = inside[None, :] & (keys[None, :] <= positions[:, None])
            logits = tl.where(visible, logits, NEG_INF)
            acc, row_max, row_sum = fold_tile(acc, row_max, row_sum, logits, v)
            # Carried from the iteration before, places do not make the loads of keys and values indirect.
            keys, pages, page_slots = read_places(
                selection, row_slots, table, place + BLOCK_N, end, count, tail, num_pages, block, slot_words
            )

        row_sum = tl.where(row_sum > 0.0, row_sum, 1.0)  # a row that saw nothing: acc 0, maximum -inf
        acc = acc / row_sum[:, None]
        row_lse = row_max + tl.log2(row_sum)
        rows += first_row
        tile_begin = before + tile.to(tl.int64) * key_tiles
        owner = (tile_begin // share_tiles).to(tl.int32)
        last_program = ((tile_begin + key_tiles - 1) // share_tiles).to(tl.int32)
        pieces = tl.where(row_tiles > 0, last_program - owner + 1, 1)
        # A program continues at most one list, its first, and leaves at most one unfinished, its last.
        slot = 2 * program + tl.where(first_tile == 0, 1, 0)
        tl.debug_barrier()  # whatever was in the slot has been merged
        partial = slot * BLOCK_M + tl.arange(0, BLOCK_M)
        partial_rows = partial_out + partial[:, None] * V_HEAD_DIM + v_dims[None, :]
        tl.store(partial_rows, acc, mask=live[:, None])
        tl.store(partial_lse + partial, row_lse, mask=live)
        # Every thread has stored before one of them says so, and reads others' results after it has heard of the last.
        tl.debug_barrier()
        arrived = pieces - 1
        if pieces > 1:
            arrived = tl.atomic_add(arrivals + owner, 1, sem="acq_rel", scope="gpu")
        if arrived == pieces - 1:
            tl.store(arrivals + owner, 0, mask=pieces > 1)  # as the next launch wants it
            merge_tile(
                partial_out, partial_lse, out, lse, tile, kv_head, first_row, q_len, pieces,
                owner, stride_out_row, stride_out_head
            )
        position += taken
        work = key_tiles.to(tl.int64) * row_tiles
        is_done = position >= before + work
        before = tl.where(is_done, before + work, before)
        list_number += tl.where(is_done, 1, 0)


@triton.jit(do_not_specialize=["stride_table", "stride_scores_request", "stride_scores_row", "score_tiles"])
def score_keys(
    q: "*bf16",  # [total_q, NUM_Q_HEADS, HEAD_DIM]
    k_cache: "*bf16",  # [num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]
    page_table: "*i32",  # [batch, max_pages]
    kv_lens: "*i32",  # [batch]
    cu_q: "*i32",  # [batch + 1]
    mode: "*i32",  # [batch], 0 where a request verifies
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
    prefix = tl.where(tl.load(mode + request) == 0, prefix, 0)  # a drafting request has no scores
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
    attend_splits: {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False},
    score_keys: {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False},
}


def row_tiles_of(max_q: int) -> int:
    """Tiles of packed rows of a request of so many rows."""
    return triton.cdiv(max_q * GROUP.value, BLOCK_M.value)


def num_programs(num_sms: int) -> int:
    """As many as the device holds at once: each goes through its share of the work and ends."""
    return CTAS_PER_SM * num_sms


def num_arrivals(num_sms: int) -> int:
    """Counters of a launch: each is of the list that a program leaves unfinished."""
    return num_programs(num_sms)


def scratch_bytes(programs: int) -> list[int]:
    """Bytes of each scratch array, in the order in which they lie in the workspace."""
    partials = 2 * programs * BLOCK_M.value
    arrays = [partials * V_HEAD_DIM.value * 4, partials * 4]
    return [triton.cdiv(size, ALIGNMENT) * ALIGNMENT for size in arrays]


def workspace_bytes(*, total_q: int, batch: int, max_q: int, max_kv: int, num_sms: int) -> int:
    """Bytes of scratch that a launch of these sizes needs."""
    programs = num_programs(num_sms)
    return sum(scratch_bytes(programs))


def launch(
    *,
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
    arrivals: torch.Tensor,
    max_q: int,
    max_kv: int,
    block: int,
    num_sms: int,
) -> None:
    """Enqueues the kernels on the current stream; allocates nothing and never waits for the device.

    arrivals [num_arrivals] int32 is 0 before and after, and belongs to one launch at a time.
    """
    batch, width = kv_lens.shape[0], indices.shape[2]
    programs = num_programs(num_sms)
    sizes = scratch_bytes(programs)
    partial_out, partial_lse = workspace[: sum(sizes)].split(sizes)
    attend_splits[(programs,)](
        q,
        k_cache,
        v_cache,
        page_table,
        kv_lens,
        cu_q,
        mode,
        indices,
        counts,
        indices if slots is None else slots.view(torch.int32),
        tail_start,
        partial_out.view(torch.float32),
        partial_lse.view(torch.float32),
        arrivals,
        out,
        lse,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        page_table.stride(0),
        indices.stride(0),
        indices.stride(1),
        counts.stride(0),
        width,
        k_cache.shape[0],
        batch,
        block,
        0 if slots is None else slots.element_size() // 4,
        **KERNELS[attend_splits],
    )
    score_tiles = triton.cdiv(scores.shape[2], SCORE_BLOCK_N.value)
    score_keys[(score_tiles * batch, scores.shape[1])](
        q,
        k_cache,
        page_table,
        kv_lens,
        cu_q,
        mode,
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
