"""select_kv: the keys of a row of scores that a policy takes, as ascending indices; ties go to the smaller index.

scores one row per request and KV head (8 of them), float32

Scores become 32-bit integers of the same order. A search finds the smallest one that is taken, a digit at a time: from
counts of digits for a number of keys, from sums of scores for a share of the mass. Then every block counts what it
takes, which tells the next ones where to write.

The work is in phases, and what a phase leaves in the workspace is all the next one knows. Where a row has one block, a
launch runs all phases; where several blocks share a row, each phase is a launch of its own, so that no block ever waits
for another. What blocks leave is added up by every block of the next phase, in one order, so results never differ.

Where neighbouring rows are united, what each of them takes goes to the workspace first, and unite_rows merges it.
"""

import torch
import triton
import triton.language as tl

BLOCK_N = tl.constexpr(2048)  # scores of an iteration
BLOCK_MASS = tl.constexpr(1024)  # of one that sums up scores by digit
BLOCK_UNION = tl.constexpr(1024)  # columns of one that unites rows
RADIX_BITS = tl.constexpr(8)
RADIX_BINS = tl.constexpr(256)
MASS_BITS = tl.constexpr(4)
MASS_BINS = tl.constexpr(16)
MASS_KEY_BITS = tl.constexpr(31)  # of scores that are not negative
MAX_SPLITS = tl.constexpr(16)  # blocks that may share a row
FEWEST_SPLITS = 4  # fewer gain less than the launches cost
ONE_LAUNCH = torch.version.hip is None  # AMD's barrier orders shared memory only, so there each phase is a launch
ALIGNMENT = 256  # bytes; of every scratch array

PPM = tl.constexpr(1_000_000)
TOP_K = tl.constexpr(0)
TOP_P = tl.constexpr(1)  # 2 is a threshold
ZERO = tl.constexpr(0x80000000)  # the order of a score of 0
LEAST = tl.constexpr(0x80000001)  # and of the least score above 0
NOTHING = tl.constexpr(0xFFFFFFFF)  # an order that no score has
EVERY = tl.constexpr(2147483647.0)  # ties: as many as there are
HISTOGRAM_BINS = tl.constexpr(1024)  # of the top 11 bits of scores that are not negative
HISTOGRAM_SHIFT = tl.constexpr(21)
TOTALS = tl.constexpr(2)  # where a row's doubles hold (forced, free, largest) of every block, after two limits
COUNTS = tl.constexpr(2)  # where its words hold (above, tied) of every block


@triton.jit
def order_bits(scores):
    """Unsigned integers in the order of the scores: NaN is 0, below -inf; -0 equals +0."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    signed = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(is_nan, 0, signed.to(tl.uint32, bitcast=True) ^ ZERO)


@triton.jit
def mass_of(order):
    """The score, not negative, of an order."""
    return (order ^ ZERO).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def read_tile(row_scores, start, end, head, tail, TILE: tl.constexpr):
    """Positions and scores of one tile, which are inside the chunk, and which are free to be chosen."""
    positions = start + tl.arange(0, TILE)
    inside = positions < end
    scores = tl.load(row_scores + positions, mask=inside, other=0.0)
    return positions, scores, inside, inside & (positions >= head) & (positions < tail)


@triton.jit
def masses_of(scores):
    """Scores as masses: what is negative, infinite or NaN is none."""
    return tl.where((scores > 0.0) & (scores < float("inf")), scores, 0.0)


@triton.jit
def read_totals(doubles, splits):
    """Mass of the forced and of the free keys, and the largest free score."""
    split = tl.arange(0, MAX_SPLITS)
    totals = doubles + TOTALS + 3 * split
    forced = tl.sum(tl.load(totals, mask=split < splits, other=0.0), 0)
    free = tl.sum(tl.load(totals + 1, mask=split < splits, other=0.0), 0)
    largest = tl.max(tl.load(totals + 2, mask=split < splits, other=0.0), 0)
    return forced, free, largest


@triton.jit
def read_counts(words, splits):
    """Keys of every block above the limit, and equal to it."""
    split = tl.arange(0, MAX_SPLITS)
    counts = words + COUNTS + 2 * split
    above = tl.load(counts, mask=split < splits, other=0)
    return above, tl.load(counts + 1, mask=split < splits, other=0)


@triton.jit
def add_bins(partials, splits, BINS: tl.constexpr):
    """What all blocks left in each bin."""
    split, bins = tl.arange(0, MAX_SPLITS), tl.arange(0, BINS)
    tile = tl.load(partials + split[:, None] * BINS + bins[None, :], mask=split[:, None] < splits, other=0)
    return tl.sum(tile.to(tl.float64), 0)


@triton.jit
def pick_bin(weights, needed, BINS: tl.constexpr):
    """The last bin from which on the weights reach what is needed, and what is still needed of it."""
    bins = tl.arange(0, BINS)
    at_least = tl.cumsum(weights, 0, reverse=True)
    picked = tl.max(tl.where(at_least >= needed, bins, 0), 0)
    return picked, needed - tl.sum(tl.where(bins > picked, weights, 0.0), 0)


@triton.jit
def shift_of(bits, step, DIGIT_BITS: tl.constexpr):
    """Bits below the digit of a step; digits go from the highest down, and the last one may be shorter."""
    return tl.maximum((step + 1) * -DIGIT_BITS + bits, 0)


@triton.jit
def digits_of(scores, limit, bits, step, DIGIT_BITS: tl.constexpr):
    """The digit of a step, and whether all digits above it are those of the limit."""
    shift = shift_of(bits, step, DIGIT_BITS)
    digits = (order_bits(scores) ^ limit) >> shift
    return digits.to(tl.int32), (digits >> (step * -DIGIT_BITS + bits - shift)) == 0


@triton.jit
def read_limit(words, doubles, slot):
    return tl.load(words + slot).to(tl.uint32, bitcast=True), tl.load(doubles + slot)


@triton.jit
def keep_limit(words, doubles, slot, split, limit, needed):
    """Every block knows the same; one writes it down for the next phase."""
    tl.store(words + slot, limit.to(tl.int32, bitcast=True), mask=split == 0)
    tl.store(doubles + slot, needed, mask=split == 0)


@triton.jit
def total_masses(row_scores, doubles, begin, end, head, tail, split):
    """Sums up one block's scores, the forced and the free ones."""
    forced_mass = tl.full([], 0.0, tl.float64)
    free_mass = tl.full([], 0.0, tl.float64)
    largest = tl.full([], 0.0, tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        positions, scores, inside, free = read_tile(row_scores, start, end, head, tail, BLOCK_N)
        masses = masses_of(scores)
        free_masses = tl.where(free, masses, 0.0)
        forced_mass += tl.sum(tl.where(free, 0.0, masses).to(tl.float64), 0)
        free_mass += tl.sum(free_masses.to(tl.float64), 0)
        largest = tl.maximum(largest, tl.max(free_masses, 0))
    totals = doubles + TOTALS + 3 * split
    tl.store(totals, forced_mass)
    tl.store(totals + 1, free_mass)
    tl.store(totals + 2, largest.to(tl.float64))


@triton.jit
def next_mass_limit(words, doubles, partials, slot, splits, step):
    """The limit after a step that summed up scores by digit."""
    limit, needed = read_limit(words, doubles, slot)
    digit, needed = pick_bin(add_bins(partials, splits, MASS_BINS), needed, MASS_BINS)
    return limit | (digit.to(tl.uint32) << shift_of(MASS_KEY_BITS, step, MASS_BITS)), needed


@triton.jit
def sum_by_digit(row_scores, partials, begin, end, head, tail, limit, largest, split, step):
    """Sums up one block's scores that share the digits found so far, by their next digit.

    Eights are added in float32, scaled so that none overflows, which costs a share of 2^-21; their sums in float64.
    """
    bins = tl.arange(0, MASS_BINS)
    scale = tl.where(largest > 1e30, 2.0**-20, 1.0).to(tl.float32)
    sums = tl.zeros([MASS_BINS], tl.float64)
    for start in tl.range(begin, end, BLOCK_MASS):
        positions, scores, inside, free = read_tile(row_scores, start, end, head, tail, BLOCK_MASS)
        digits, shares = digits_of(scores, limit, MASS_KEY_BITS, step, MASS_BITS)
        masses = tl.where(free & shares, masses_of(scores) * scale, 0.0)
        by_bin = tl.where(digits[None, :] == bins[:, None], masses[None, :], 0.0)
        eights = tl.sum(tl.reshape(by_bin, [MASS_BINS, BLOCK_MASS // 8, 8]), 2)
        sums += tl.sum(eights.to(tl.float64), 1)
    tl.store(partials + split * MASS_BINS + bins, sums / scale.to(tl.float64))


@triton.jit
def next_bisection(words, doubles, partials, slot, splits, target):
    """The bounds of the threshold after a halving: the mass from the middle on tells which half it is in."""
    split = tl.arange(0, MAX_SPLITS)
    low_order, high = read_limit(words, doubles, slot)
    low = mass_of(low_order)
    middle = (0.5 * (low + high)).to(tl.float32).to(tl.float64)
    reached = tl.sum(tl.load(partials + split * MASS_BINS, mask=split < splits, other=0.0), 0) >= target
    return order_bits(tl.where(reached, middle, low).to(tl.float32)), tl.where(reached, high, middle)


@triton.jit
def limit_of_share(words, doubles, partials, slot, splits, needed_mass, massless, mass_steps, bisection_steps):
    """The limit of a share after its last step, and how many keys equal to it are taken."""
    limit = tl.full([], LEAST, tl.uint32)  # all of the mass
    ties = tl.full([], EVERY, tl.float64)
    if massless:
        limit = tl.full([], NOTHING, tl.uint32)
    elif bisection_steps > 0:
        limit, high = next_bisection(words, doubles, partials, slot, splits, needed_mass)
    elif mass_steps > 0:
        limit, needed = next_mass_limit(words, doubles, partials, slot, splits, mass_steps - 1)
        score = mass_of(limit)
        ties = tl.minimum(tl.ceil(needed / tl.where(score > 0.0, score, 1.0)), EVERY)
        ties = tl.where((score > 0.0) & (needed > 0.0), ties, 0.0)
    return limit, ties


@triton.jit
def sum_from(row_scores, partials, begin, end, head, tail, floor, split):
    """The mass of one block's free scores of at least `floor`."""
    mass = tl.full([], 0.0, tl.float64)
    for start in tl.range(begin, end, BLOCK_N):
        positions, scores, inside, free = read_tile(row_scores, start, end, head, tail, BLOCK_N)
        mass += tl.sum(tl.where(free & (scores >= floor), masses_of(scores), 0.0).to(tl.float64), 0)
    tl.store(partials + split * MASS_BINS, mass)


@triton.jit
def start_from_histogram(row_scores, row_histogram, prefix, head, tail, wanted):
    """The bin of verification's histogram in which the wanted keys end, without the forced keys it counts as well."""
    bins = tl.arange(0, HISTOGRAM_BINS)
    counted = tl.load(row_histogram + bins)
    for start in tl.range(0, head, BLOCK_N):
        positions, scores, inside, free = read_tile(row_scores, start, head, 0, head, BLOCK_N)
        taken = (order_bits(scores) >> HISTOGRAM_SHIFT) & (HISTOGRAM_BINS - 1)
        counted -= tl.histogram(taken.to(tl.int32), HISTOGRAM_BINS, mask=inside)
    for start in tl.range(tail, prefix, BLOCK_N):
        positions, scores, inside, free = read_tile(row_scores, start, prefix, tail, prefix, BLOCK_N)
        taken = (order_bits(scores) >> HISTOGRAM_SHIFT) & (HISTOGRAM_BINS - 1)
        counted -= tl.histogram(taken.to(tl.int32), HISTOGRAM_BINS, mask=inside)
    picked, needed = pick_bin(counted.to(tl.float64), wanted, HISTOGRAM_BINS)
    return (picked.to(tl.uint32) << HISTOGRAM_SHIFT) | ZERO, needed


@triton.jit
def next_count_limit(words, doubles, partials, slot, splits, step, bits):
    """The limit after a step that counted digits."""
    limit, needed = read_limit(words, doubles, slot)
    digit, needed = pick_bin(add_bins(partials, splits, RADIX_BINS), needed, RADIX_BINS)
    return limit | (digit.to(tl.uint32) << shift_of(bits, step, RADIX_BITS)), needed


@triton.jit
def count_by_digit(row_scores, partials, begin, end, head, tail, limit, split, step, bits):
    """Counts one block's keys that share the digits found so far, by their next digit."""
    counted = tl.zeros([RADIX_BINS], tl.int32)
    for start in tl.range(begin, end, BLOCK_N):
        positions, scores, inside, free = read_tile(row_scores, start, end, head, tail, BLOCK_N)
        digits, shares = digits_of(scores, limit, bits, step, RADIX_BITS)
        counted += tl.histogram(tl.where(shares, digits, 0), RADIX_BINS, mask=free & shares)
    tl.store(partials + split * RADIX_BINS + tl.arange(0, RADIX_BINS), counted)


@triton.jit
def count_taken(row_scores, words, begin, end, head, tail, limit, split):
    """Counts one block's free keys above the limit and equal to it."""
    above = 0
    tied = 0
    for start in tl.range(begin, end, BLOCK_N):
        positions, scores, inside, free = read_tile(row_scores, start, end, head, tail, BLOCK_N)
        order = order_bits(scores)
        above += tl.sum((free & (order > limit)).to(tl.int32), 0)
        tied += tl.sum((free & (order == limit)).to(tl.int32), 0)
    tl.store(words + COUNTS + 2 * split, above)
    tl.store(words + COUNTS + 2 * split + 1, tied)


@triton.jit
def taken_by_limit(words, doubles, slot, splits):
    """Free keys that a limit takes, as its count has found."""
    above, tied = read_counts(words, splits)
    limit, ties = read_limit(words, doubles, slot)
    return tl.sum(above, 0) + tl.minimum(tl.sum(tied, 0).to(tl.float64), ties).to(tl.int32)


@triton.jit
def store_slots(row_slots, row_table, places, positions, take, pages, slots_per_page, slot_words):
    """Where the paged cache holds the taken columns, in one word or two; -1 where the table names no page."""
    page = positions // slots_per_page
    entry = tl.load(row_table + page, mask=take & (page < pages), other=-1).to(tl.int64)
    slot = tl.where(entry < 0, -1, entry * slots_per_page + positions % slots_per_page)
    tl.store(row_slots + places * slot_words, slot.to(tl.int32), mask=take)
    tl.store(row_slots + places * slot_words + 1, (slot >> 32).to(tl.int32), mask=take & (slot_words == 2))


@triton.jit
def pad_row(row_indices, row_slots, first, width, stride, slot_words):
    """Writes -1 from `first` on, a tile every `stride` columns."""
    for start in tl.range(first, width, stride):
        places = start + tl.arange(0, BLOCK_N)
        nothing = tl.full([BLOCK_N], -1, tl.int32)
        tl.store(row_indices + places, nothing, mask=places < width)
        tl.store(row_slots + places * slot_words, nothing, mask=(places < width) & (slot_words > 0))
        tl.store(row_slots + places * slot_words + 1, nothing, mask=(places < width) & (slot_words == 2))


@triton.jit
def write_taken(
    row_scores,
    row_indices,
    row_slots,
    row_table,
    words,
    begin,
    end,
    prefix,
    head,
    tail,
    limit,
    ties,
    split,
    splits,
    width,
    pages,
    slots_per_page,
    slot_words,
):
    """Writes one block's part of the ascending indices, and of the -1 after them; returns how many the row has."""
    above, tied = read_counts(words, splits)
    before = tl.arange(0, MAX_SPLITS) < split
    ties_seen = tl.sum(tl.where(before, tied, 0), 0)
    taken = tl.minimum(begin, head) + tl.maximum(begin - tail, 0) + tl.minimum(ties_seen, ties)
    taken += tl.sum(tl.where(before, above, 0), 0)
    total = head + prefix - tail + tl.sum(above, 0) + tl.minimum(tl.sum(tied, 0), ties)
    total = tl.minimum(total, width)
    for start in tl.range(begin, end, BLOCK_N):
        positions, scores, inside, free = read_tile(row_scores, start, end, head, tail, BLOCK_N)
        order = order_bits(scores)
        tie = (free & (order == limit)).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, 0) - tie
        sure = inside & ((free == 0) | (order > limit))
        take = (sure | ((tie > 0) & (tie_rank < ties))).to(tl.int32)
        places = taken + tl.cumsum(take, 0) - take
        chosen = (take > 0) & (places < width)
        tl.store(row_indices + places, positions, mask=chosen)
        if slot_words > 0:
            store_slots(row_slots, row_table, places, positions, chosen, pages, slots_per_page, slot_words)
        taken += tl.sum(take, 0)
        ties_seen += tl.sum(tie, 0)
    pad_row(row_indices, row_slots, total + split * BLOCK_N, width, splits * BLOCK_N, slot_words)
    return total


# Nothing is specialised on: sizes, budgets and strides change from call to call.
@triton.jit(
    do_not_specialize=[
        "batch",
        "score_rows",
        "columns",
        "width",
        "block",
        "sink",
        "recent",
        "stride_scores_layer",
        "stride_scores_request",
        "stride_scores_row",
        "stride_thresholds_layer",
        "stride_thresholds_request",
        "stride_thresholds_row",
        "stride_table",
        "pages",
        "slots_per_page",
        "slot_words",
        "policy",
        "k",
        "ratio_ppm",
        "min_keys",
        "max_keys",
        "share",
        "threshold",
        "has_thresholds",
        "has_histogram",
        "bisection_steps",
        "mass_steps",
        "count_steps",
        "first_phase",
        "last_phase",
    ]
)
def select_rows(
    scores: "*fp32",  # [layers, batch, score_rows, columns]
    prefix_lens: "*i32",  # [batch], in keys
    thresholds: "*fp32",  # [layers, batch, score_rows]
    histogram: "*i32",  # [layers, batch, score_rows, HISTOGRAM_BINS]
    page_table: "*i32",  # [batch, pages]
    indices: "*i32",  # [layers, batch, score_rows, width]
    counts: "*i32",  # [layers, batch, score_rows]
    slots: "*i32",  # [layers, batch, score_rows, width, slot_words]
    words: "*i32",  # [layers, batch, score_rows, words of a row]
    doubles: "*fp64",  # [layers, batch, score_rows, doubles of a row]
    batch: "i32",
    score_rows: "i32",
    columns: "i32",
    width: "i32",
    block: "i32",  # keys of a column; sink, recent and budgets are in keys, too
    sink: "i32",
    recent: "i32",
    stride_scores_layer: "i64",
    stride_scores_request: "i64",
    stride_scores_row: "i64",
    stride_thresholds_layer: "i64",
    stride_thresholds_request: "i64",
    stride_thresholds_row: "i64",
    stride_table: "i64",
    pages: "i32",
    slots_per_page: "i32",
    slot_words: "i32",  # of 32 bits; 0 for no slots
    policy: "i32",
    k: "i32",  # 0 where the budget is a ratio of the prefix
    ratio_ppm: "i32",
    min_keys: "i32",
    max_keys: "i32",
    share: "fp64",
    threshold: "fp32",
    has_thresholds: "i32",
    has_histogram: "i32",
    bisection_steps: "i32",
    mass_steps: "i32",  # passes that find the limit of a share, and then
    count_steps: "i32",  # those that find the limit of a number of keys
    first_phase: "i32",
    last_phase: "i32",
):
    """Phases [first_phase, last_phase) of one row; programs are (row, block of the row)."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    score_row = row % score_rows
    request = row // score_rows % batch
    layer = row // score_rows // batch
    row_scores = scores + layer * stride_scores_layer + request * stride_scores_request + score_row * stride_scores_row
    row_indices = indices + row.to(tl.int64) * width
    row_slots = slots + row.to(tl.int64) * width * slot_words
    row_table = page_table + request * stride_table
    words += row.to(tl.int64) * (COUNTS + 2 * splits + 2 * splits * RADIX_BINS)
    doubles += row.to(tl.int64) * (TOTALS + 3 * splits + 2 * splits * MASS_BINS)
    counted = words + COUNTS + 2 * splits
    summed = doubles + TOTALS + 3 * splits

    # The prefix in columns, of which [0, head) and [tail, prefix) are forced; a run of keys covers whole columns.
    keys = tl.maximum(tl.minimum(tl.load(prefix_lens + request), columns * block), 0)
    prefix = tl.cdiv(keys, block)
    head = tl.minimum(tl.cdiv(sink, block), prefix)
    tail = tl.where(recent > 0, tl.maximum(head, tl.maximum(keys - recent, 0) // block), prefix)

    # A fixed k, or clamp(ceil(ratio * prefix), min, max); the product passes 2^31.
    share_of_keys = (ratio_ppm.to(tl.int64) * keys + (PPM - 1)) // PPM
    budget = tl.minimum(tl.maximum(share_of_keys, min_keys), max_keys).to(tl.int32)
    budget = tl.where(k > 0, k, tl.where(policy == TOP_P, max_keys, budget))
    most = tl.cdiv(tl.minimum(budget, keys), block)
    least = tl.cdiv(tl.minimum(min_keys, keys), block)

    chunk = tl.cdiv(tl.cdiv(prefix, splits), BLOCK_N) * BLOCK_N  # whole tiles; blocks past the prefix have none
    begin = tl.minimum(split * chunk, prefix)
    end = tl.minimum(begin + chunk, prefix)

    # First the totals and the steps of a share's limit, with a count of what it takes where bounds may change that;
    # then the steps of a number's limit; last the count that says where to write, and the writing.
    mass_phases = tl.where(policy == TOP_P, 1 + mass_steps, 0)
    first_step = mass_phases + tl.where((policy == TOP_P) & (count_steps > 0), 1, 0)
    last_count = first_step + count_steps
    bits = tl.where(has_histogram > 0, HISTOGRAM_SHIFT, 32)
    for phase in tl.range(first_phase, last_phase):
        slot = phase % 2
        was = 1 - slot
        counted_now = counted + slot * splits * RADIX_BINS
        counted_before = counted + was * splits * RADIX_BINS
        summed_now = summed + slot * splits * MASS_BINS
        summed_before = summed + was * splits * MASS_BINS
        has_totals = (policy == TOP_P) & (phase > 0)
        forced_mass, free_mass, largest = read_totals(doubles, tl.where(has_totals, splits, 0))
        needed_mass = share * (forced_mass + free_mass) - forced_mass
        massless = has_totals & (forced_mass + free_mass == 0.0)
        # Without any mass the newest keys are forced until there are enough.
        newest = tl.maximum(head, tl.minimum(tail, prefix - (least - head)))
        tail_now = tl.where(massless, newest, tail)
        forced = head + prefix - tail_now

        if phase < mass_phases:
            if phase == 0:
                total_masses(row_scores, doubles, begin, end, head, tail, split)
            elif bisection_steps > 0:
                low, high = tl.full([], ZERO, tl.uint32), largest
                if phase > 1:
                    low, high = next_bisection(words, doubles, summed_before, was, splits, needed_mass)
                keep_limit(words, doubles, slot, split, low, high)
                middle = (0.5 * (mass_of(low) + high)).to(tl.float32)
                sum_from(row_scores, summed_now, begin, end, head, tail_now, middle, split)
            else:
                limit, needed = tl.full([], ZERO, tl.uint32), needed_mass
                if phase > 1:
                    limit, needed = next_mass_limit(words, doubles, summed_before, was, splits, phase - 2)
                keep_limit(words, doubles, slot, split, limit, needed)
                sum_by_digit(row_scores, summed_now, begin, end, head, tail_now, limit, largest, split, phase - 1)
        elif (phase >= first_step) & (phase < last_count):
            if phase == first_step:
                wanted = most - forced
                if policy == TOP_P:
                    taken = forced + taken_by_limit(words, doubles, was, splits)
                    wanted = tl.minimum(tl.maximum(taken, least), most) - forced
                needed = wanted.to(tl.float64)
                limit = tl.where(wanted <= 0, NOTHING, 0).to(tl.uint32)
                if (has_histogram > 0) & (wanted > 0) & (wanted < tail_now - head):
                    row_histogram = histogram + row.to(tl.int64) * HISTOGRAM_BINS
                    limit, needed = start_from_histogram(row_scores, row_histogram, prefix, head, tail_now, needed)
            else:
                limit, needed = next_count_limit(
                    words, doubles, counted_before, was, splits, phase - first_step - 1, bits
                )
            keep_limit(words, doubles, slot, split, limit, needed)
            # Nothing to search for where no key is wanted or all are.
            stop = tl.where((limit != NOTHING) & (needed < tail_now - head), end, begin)
            count_by_digit(row_scores, counted_now, begin, stop, head, tail_now, limit, split, phase - first_step, bits)
        elif phase <= last_count:
            if (phase == last_count) & (count_steps > 0):
                limit, ties = next_count_limit(words, doubles, counted_before, was, splits, count_steps - 1, bits)
            elif policy == TOP_P:
                limit, ties = limit_of_share(
                    words, doubles, summed_before, was, splits, needed_mass, massless, mass_steps, bisection_steps
                )
            else:
                row_threshold = thresholds + layer * stride_thresholds_layer + request * stride_thresholds_request
                value = tl.load(row_threshold + score_row * stride_thresholds_row, mask=has_thresholds > 0, other=0.0)
                limit, ties = order_bits(tl.where(has_thresholds > 0, value, threshold)), tl.full([], EVERY, tl.float64)
            keep_limit(words, doubles, slot, split, limit, ties)
            count_taken(row_scores, words, begin, end, head, tail_now, limit, split)
        else:
            limit, ties = read_limit(words, doubles, was)
            total = write_taken(
                row_scores,
                row_indices,
                row_slots,
                row_table,
                words,
                begin,
                end,
                prefix,
                head,
                tail_now,
                limit,
                tl.maximum(ties.to(tl.int32), 0),
                split,
                splits,
                width,
                pages,
                slots_per_page,
                slot_words,
            )
            tl.store(counts + row, total, mask=split == 0)
        tl.debug_barrier()  # what this phase wrote, other threads of the block read in the next


@triton.jit(
    do_not_specialize=[
        "batch",
        "united_rows",
        "united",
        "columns",
        "row_width",
        "width",
        "block",
        "stride_table",
        "pages",
        "slots_per_page",
        "slot_words",
        "first_phase",
        "last_phase",
    ]
)
def unite_rows(
    row_indices: "*i32",  # [layers, batch, united_rows, united, row_width], -1 padded
    members: "*i32",  # [layers, batch, united_rows, columns], whether any of the united rows takes a column
    prefix_lens: "*i32",  # [batch], in keys
    page_table: "*i32",  # [batch, pages]
    indices: "*i32",  # [layers, batch, united_rows, width]
    counts: "*i32",  # [layers, batch, united_rows]
    slots: "*i32",  # [layers, batch, united_rows, width, slot_words]
    batch: "i32",
    united_rows: "i32",
    united: "i32",
    columns: "i32",
    row_width: "i32",
    width: "i32",
    block: "i32",
    stride_table: "i64",
    pages: "i32",
    slots_per_page: "i32",
    slot_words: "i32",
    first_phase: "i32",
    last_phase: "i32",
):
    """Phases [first_phase, last_phase) of the union of some rows' indices; programs are its rows."""
    row = tl.program_id(0)
    request = row // united_rows % batch
    row_members = members + row.to(tl.int64) * columns
    row_lists = row_indices + row.to(tl.int64) * united * row_width
    row_out = indices + row.to(tl.int64) * width
    row_slots = slots + row.to(tl.int64) * width * slot_words
    row_table = page_table + request * stride_table
    keys = tl.maximum(tl.minimum(tl.load(prefix_lens + request), columns * block), 0)
    prefix = tl.cdiv(keys, block)
    for phase in tl.range(first_phase, last_phase):
        if phase == 0:
            for start in tl.range(0, prefix, BLOCK_UNION):
                positions = start + tl.arange(0, BLOCK_UNION)
                tl.store(row_members + positions, tl.zeros([BLOCK_UNION], tl.int32), mask=positions < prefix)
        elif phase == 1:
            for start in tl.range(0, united * row_width, BLOCK_UNION):
                places = start + tl.arange(0, BLOCK_UNION)
                taken = tl.load(row_lists + places, mask=places < united * row_width, other=-1)
                tl.store(row_members + taken, tl.full([BLOCK_UNION], 1, tl.int32), mask=taken >= 0)
        else:
            total = 0
            for start in tl.range(0, prefix, BLOCK_UNION):
                positions = start + tl.arange(0, BLOCK_UNION)
                member = tl.load(row_members + positions, mask=positions < prefix, other=0)
                places = total + tl.cumsum(member, 0) - member
                tl.store(row_out + places, positions, mask=member > 0)
                if slot_words > 0:
                    store_slots(
                        row_slots, row_table, places, positions, member > 0, pages, slots_per_page, slot_words
                    )
                total += tl.sum(member, 0)
            pad_row(row_out, row_slots, total, width, BLOCK_UNION, slot_words)
            tl.store(counts + row, total)
        tl.debug_barrier()  # what this phase wrote, other threads of the block read in the next


# The device functions and how each is launched and compiled: with their signatures, all that a cross-compiler needs.
KERNELS = {
    select_rows: {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False},
    unite_rows: {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False},
}
UNITE_PHASES = 3


def launches(phases: int, in_one: bool) -> list[tuple[int, int]]:
    """First phase of every launch, and the one after its last."""
    return [(0, phases)] if in_one else [(phase, phase + 1) for phase in range(phases)]


def num_splits(rows: int, columns: int, num_sms: int) -> int:
    """Blocks of every row: enough to fill the device, no more than tiles, and one where few would not be worth it."""
    splits = min(MAX_SPLITS.value, num_sms // max(1, rows), triton.cdiv(columns, BLOCK_N.value))
    return splits if splits >= FEWEST_SPLITS else 1


def scratch_bytes(rows: int, columns: int, splits: int, row_width: int, united: int) -> list[int]:
    """Bytes of each scratch array, in the order in which they lie in the workspace."""
    words = rows * (COUNTS.value + 2 * splits + 2 * splits * RADIX_BINS.value)
    doubles = rows * (TOTALS.value + 3 * splits + 2 * splits * MASS_BINS.value)
    lists = (rows * row_width, rows, rows // united * columns) if united > 1 else ()  # indices, counts, members
    return [triton.cdiv(size, ALIGNMENT) * ALIGNMENT for size in (words * 4, doubles * 8, *(n * 4 for n in lists))]


def workspace_bytes(*, rows: int, columns: int, row_width: int, united: int, num_sms: int) -> int:
    """Bytes of scratch that a launch for so many rows of scores needs."""
    return sum(scratch_bytes(rows, columns, num_splits(rows, columns, num_sms), row_width, united))


def launch(
    *,
    scores: torch.Tensor,
    prefix_lens: torch.Tensor,
    thresholds: torch.Tensor | None,
    histogram: torch.Tensor | None,
    page_table: torch.Tensor | None,
    indices: torch.Tensor,
    counts: torch.Tensor,
    slots: torch.Tensor | None,
    workspace: torch.Tensor,
    block: int,
    sink: int,
    recent: int,
    slots_per_page: int,
    row_width: int,
    united: int,
    policy: int,
    k: int,
    ratio_ppm: int,
    min_keys: int,
    max_keys: int,
    share: float,
    bisection_steps: int,
    threshold: float,
    num_sms: int,
) -> None:
    """Enqueues the kernel on the current stream; allocates nothing and never waits for the device.

    scores [layers, batch, score_rows, columns] and thresholds [layers, batch, score_rows] may have any strides but a
    unit last one of scores; indices, counts, slots and histogram are contiguous. What is None is not used. `united`
    neighbouring score rows, each of which takes at most `row_width` columns, give one row of the outputs.
    """
    layers, batch, score_rows, columns = scores.shape
    rows = layers * batch * score_rows
    if rows == 0:
        return
    splits = num_splits(rows, columns, num_sms)
    sizes = scratch_bytes(rows, columns, splits, row_width, united)
    words, doubles, *lists = (part.view(torch.int32) for part in workspace[: sum(sizes)].split(sizes))
    row_indices, row_counts, members = lists if lists else (indices, counts, indices)
    table = (prefix_lens, 0, 0) if page_table is None else (page_table, page_table.stride(0), page_table.shape[1])
    slot_words = 0 if slots is None else slots.element_size() // 4
    slot_memory = indices if slots is None else slots.view(torch.int32)
    bounded = policy == TOP_P.value and (min_keys > 0 or max_keys < columns * block)
    bits = 32 if histogram is None else HISTOGRAM_SHIFT.value
    count_steps = triton.cdiv(bits, RADIX_BITS.value) if policy == TOP_K.value or bounded else 0
    mass_steps = bisection_steps
    if policy == TOP_P.value and bisection_steps == 0 and share < 1.0:
        mass_steps = triton.cdiv(MASS_KEY_BITS.value, MASS_BITS.value)
    phases = (1 + mass_steps + bounded if policy == TOP_P.value else 0) + count_steps + 2
    for first, last in launches(phases, splits == 1 and ONE_LAUNCH):
        select_rows[(rows, splits)](
            scores,
            prefix_lens,
            scores if thresholds is None else thresholds,
            counts if histogram is None else histogram,
            table[0],
            row_indices,
            row_counts,
            slot_memory,
            words,
            doubles.view(torch.float64),
            batch,
            score_rows,
            columns,
            row_width if lists else indices.shape[-1],
            block,
            sink,
            recent,
            *scores.stride()[:3],
            *((0, 0, 0) if thresholds is None else thresholds.stride()),
            *table[1:],
            slots_per_page,
            0 if lists else slot_words,
            policy,
            k,
            ratio_ppm,
            min_keys,
            max_keys,
            share,
            threshold,
            0 if thresholds is None else 1,
            0 if histogram is None else 1,
            bisection_steps,
            mass_steps,
            count_steps,
            first,
            last,
            **KERNELS[select_rows],
        )
    for first, last in launches(UNITE_PHASES, ONE_LAUNCH) if lists else ():
        unite_rows[(rows // united,)](
            row_indices,
            members,
            prefix_lens,
            table[0],
            indices,
            counts,
            slot_memory,
            batch,
            score_rows // united,
            united,
            columns,
            row_width,
            indices.shape[-1],
            block,
            table[1],
            table[2],
            slots_per_page,
            slot_words,
            first,
            last,
            **KERNELS[unite_rows],
        )
