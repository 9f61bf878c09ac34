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

from collections.abc import Callable, Mapping
from typing import Any

import torch

THREADS = 256
ITEMS = 8  # scores of a thread in an iteration
BLOCK_N = ITEMS * THREADS  # and of all of them
RADIX_BITS = 8
RADIX_BINS = 256
TALLIES = 16  # counters of a digit, so that threads which count the same one seldom wait for each other
MASS_BITS = 4
MASS_BINS = 16
MASS_KEY_BITS = 31  # of scores that are not negative
MAX_SPLITS = 16  # blocks that may share a row
FEWEST_SPLITS = 4  # fewer gain less than the launches cost
ALIGNMENT = 256  # bytes; of every scratch array
VECTOR = 8  # the width that functions are compiled for; see device_functions

PPM = 1_000_000
TOP_K = 0
TOP_P = 1  # 2 is a threshold
LOWEST = -(2**31)  # the order of NaN
ZERO = 0  # of a score of 0
LEAST = 1  # of the least score above 0
INFINITE = 0x7F800000
NOTHING = 2**31 - 1  # an order that no score has
EVERY = 2.0**30  # ties: more than a row has
HISTOGRAM_BITS = 10  # of verification's histogram: what follows the sign of scores that are not negative
HISTOGRAM_BINS = 1024
HISTOGRAM_SHIFT = 21
TOTALS = 2  # where a row's doubles hold (forced, free, largest) of every block, after two limits
COUNTS = 2  # where its words hold (above, tied) of every block
# How scalars are declared: TileLang would write an expression out at every use of a plain name.
INT = "int32"
WIDE = "int64"
DOUBLE = "float64"


def device_functions(T: Any, vector: int) -> tuple[Any, ...]:
    """The functions of the device in TileLang's dialect T, in the order in which they are launched.

    vector  of no use here: rows of scores may begin anywhere
    """
    elements = T.dynamic("elements")  # arrays are addressed from their first element, in 64 bits

    def ceil_div(a: Any, b: Any) -> Any:
        return T.truncdiv(a + (b - 1), b)

    def order_of(bits: Any) -> Any:
        """Integers in the order of the scores of such bits: NaN is the least, below -inf; -0 equals +0."""
        sign, magnitude = T.shift_right(bits, 31), bits & 0x7FFFFFFF
        # All bits where the score is NaN. TileLang's analysis takes minutes over as many conditions as there would be.
        is_nan = T.shift_right(INFINITE - magnitude, 31)
        return (((magnitude ^ sign) - sign) & ~is_nan) | (is_nan & LOWEST)

    def score_of(order: Any) -> Any:
        """The score, not negative, of an order."""
        return T.cast(T.reinterpret(order, "float32"), DOUBLE)

    def mass_of(order: Any) -> Any:
        """An order's score as a mass: what is negative, infinite or NaN is none."""
        return score_of(order * T.cast(T.And(order > ZERO, order < INFINITE), INT))

    def shift_of(bits: Any, step: Any, digit_bits: int) -> Any:
        """Bits below the digit of a step; digits go from the highest down, and the last one may be shorter."""
        return T.max(bits - (step + 1) * digit_bits, 0)

    def bits_above(bits: Any, step: Any, digit_bits: int) -> Any:
        """A mask of the bits above the digit of a step."""
        return T.cast(-T.shift_left(T.cast(1, WIDE), T.cast(bits - step * digit_bits, WIDE)), INT)

    @T.macro
    def read_tile(orders, free, scores, row_scores, start, end, head, tail):
        """Orders of a tile's scores, and which of them are inside and free to be chosen."""
        for i, lane in T.Parallel(ITEMS, THREADS):
            position = start + i * THREADS + lane
            orders[i, lane] = T.reinterpret(T.if_then_else(position < end, scores[row_scores + position], 0.0), INT)
            orders[i, lane] = order_of(orders[i, lane])
            free[i, lane] = T.cast(T.And(position >= head, position < T.min(tail, end)), INT)

    @T.macro
    def subtract_bins(coarse, scores, row_scores, begin, end):
        """Takes the keys [begin, end) out of a histogram."""
        orders = T.alloc_fragment([ITEMS, THREADS], INT)
        free = T.alloc_fragment([ITEMS, THREADS], INT)
        for step in T.serial(ceil_div(end - begin, BLOCK_N)):
            read_tile(orders, free, scores, row_scores, begin + step * BLOCK_N, end, begin, end)
            for i, lane in T.Parallel(ITEMS, THREADS):
                if free[i, lane] > 0:
                    found = T.shift_right(orders[i, lane], HISTOGRAM_SHIFT) & (HISTOGRAM_BINS - 1)
                    T.atomic_add(coarse[found], -1)

    @T.macro
    def rank_tile(ranks, line_ranks):
        """Running sums of a tile: those of (i, lane) are ranks[i, lane] + line_ranks[i] - ranks[i, THREADS - 1]."""
        T.cumsum(ranks, dim=1)
        for i in T.Parallel(ITEMS):
            line_ranks[i] = ranks[i, THREADS - 1]
        T.cumsum(line_ranks, dim=0)

    @T.macro
    def store_tile(
        places, start, indices, slots, page_table, row_out, row_table, width, pages, slots_per_page, slot_words
    ):
        """Writes a tile's taken positions, and where the paged cache holds them: -1 where the table names no page."""
        for i, lane in T.Parallel(ITEMS, THREADS):
            if T.And(places[i, lane] >= 0, places[i, lane] < width):
                indices[row_out + places[i, lane]] = start + i * THREADS + lane
        for _ in T.serial(T.min(slot_words, 1)):
            for i, lane in T.Parallel(ITEMS, THREADS):
                if T.And(places[i, lane] >= 0, places[i, lane] < width):
                    position = start + i * THREADS + lane
                    page = T.truncdiv(position, slots_per_page)
                    entry = T.if_then_else(page < pages, page_table[row_table + page], -1)
                    found = T.cast(entry, WIDE) * slots_per_page + T.truncmod(position, slots_per_page)
                    slot = T.Select(entry < 0, T.cast(-1, WIDE), found)
                    slots[(row_out + places[i, lane]) * slot_words] = T.cast(slot, INT)
                    if slot_words == 2:
                        slots[(row_out + places[i, lane]) * 2 + 1] = T.cast(T.shift_right(slot, T.cast(32, WIDE)), INT)

    @T.macro
    def pad_row(indices, slots, row_out, first, width, stride, slot_words):
        """Writes -1 from `first` on, a tile every `stride` columns; of slots, in as many words as each has."""
        for step in T.serial(T.Select(first < width, ceil_div(width - first, stride), 0)):
            for i, lane in T.Parallel(ITEMS, THREADS):
                if first + step * stride + i * THREADS + lane < width:
                    indices[row_out + first + step * stride + i * THREADS + lane] = -1
            for word in T.serial(slot_words):
                for i, lane in T.Parallel(ITEMS, THREADS):
                    if first + step * stride + i * THREADS + lane < width:
                        slots[(row_out + first + step * stride + i * THREADS + lane) * slot_words + word] = -1

    @T.prim_func
    def select_rows(
        scores: T.Tensor((elements,), "float32"),  # [layers, batch, score_rows, columns]
        prefix_lens: T.Tensor((elements,), "int32"),  # [batch], in keys
        thresholds: T.Tensor((elements,), "float32"),  # [layers, batch, score_rows]
        histogram: T.Tensor((elements,), "int32"),  # [layers, batch, score_rows, HISTOGRAM_BINS]
        page_table: T.Tensor((elements,), "int32"),  # [batch, pages]
        indices: T.Tensor((elements,), "int32"),  # [layers, batch, score_rows, width]
        counts: T.Tensor((elements,), "int32"),  # [layers, batch, score_rows]
        slots: T.Tensor((elements,), "int32"),  # [layers, batch, score_rows, width, slot_words]
        words: T.Tensor((elements,), "int32"),  # [layers, batch, score_rows, words of a row]
        doubles: T.Tensor((elements,), "float64"),  # [layers, batch, score_rows, doubles of a row]
        stride_scores_layer: T.int64,
        stride_scores_request: T.int64,
        stride_scores_row: T.int64,
        stride_thresholds_layer: T.int64,
        stride_thresholds_request: T.int64,
        stride_thresholds_row: T.int64,
        stride_table: T.int64,
        batch: T.int32,
        score_rows: T.int32,
        columns: T.int32,
        width: T.int32,
        block: T.int32,  # keys of a column; sink, recent and budgets are in keys, too
        sink: T.int32,
        recent: T.int32,
        pages: T.int32,
        slots_per_page: T.int32,
        slot_words: T.int32,  # of 32 bits; 0 for no slots
        policy: T.int32,
        k: T.int32,  # 0 where the budget is a ratio of the prefix
        ratio_ppm: T.int32,
        min_keys: T.int32,
        max_keys: T.int32,
        share: T.float64,
        threshold: T.float32,
        has_thresholds: T.int32,
        has_histogram: T.int32,
        bisection_steps: T.int32,
        mass_steps: T.int32,  # passes that find the limit of a share, and then
        count_steps: T.int32,  # those that find the limit of a number of keys
        first_phase: T.int32,
        last_phase: T.int32,
        rows: T.int32,
        splits: T.int32,
    ):
        """Phases [first_phase, last_phase) of one row; blocks are (row, block of the row)."""
        with T.Kernel(rows, splits, threads=THREADS) as (row, split):
            tally = T.alloc_shared([RADIX_BINS * TALLIES], INT)
            counted = T.alloc_shared([RADIX_BINS], INT)
            coarse = T.alloc_shared([HISTOGRAM_BINS], INT)
            by_digit = T.alloc_shared([MASS_BINS, THREADS], DOUBLE)
            bin_masses = T.alloc_shared([MASS_BINS], DOUBLE)
            ranks = T.alloc_shared([ITEMS, THREADS], INT)
            line_ranks = T.alloc_shared([ITEMS], INT)
            score_row = T.alloc_var(INT, init=T.truncmod(row, score_rows))
            request = T.alloc_var(INT, init=T.truncmod(T.truncdiv(row, score_rows), batch))
            layer = T.alloc_var(INT, init=T.truncdiv(T.truncdiv(row, score_rows), batch))
            row_scores = T.alloc_var(
                WIDE,
                init=layer * stride_scores_layer + request * stride_scores_request + score_row * stride_scores_row,
            )
            row_thresholds = T.alloc_var(
                WIDE,
                init=layer * stride_thresholds_layer
                + request * stride_thresholds_request
                + score_row * stride_thresholds_row,
            )
            row_histogram = T.alloc_var(WIDE, init=T.cast(row, WIDE) * HISTOGRAM_BINS)
            row_out = T.alloc_var(WIDE, init=T.cast(row, WIDE) * width)
            row_table = T.alloc_var(WIDE, init=request * stride_table)
            # Where the row's words and doubles begin, and in them what blocks leave of counts and of sums.
            row_words = T.alloc_var(WIDE, init=T.cast(row, WIDE) * (COUNTS + 2 * splits + 2 * splits * RADIX_BINS))
            row_doubles = T.alloc_var(WIDE, init=T.cast(row, WIDE) * (TOTALS + 3 * splits + 2 * splits * MASS_BINS))
            row_counted = T.alloc_var(WIDE, init=row_words + COUNTS + 2 * splits)
            row_summed = T.alloc_var(WIDE, init=row_doubles + TOTALS + 3 * splits)

            # The prefix in columns, of which [0, head) and [tail, prefix) are forced; a run of keys covers whole ones.
            keys = T.alloc_var(INT, init=T.max(T.min(prefix_lens[request], columns * block), 0))
            prefix = T.alloc_var(INT, init=ceil_div(keys, block))
            head = T.alloc_var(INT, init=T.min(ceil_div(sink, block), prefix))
            tail = T.alloc_var(INT, init=prefix)
            if recent > 0:
                tail = T.max(head, T.truncdiv(T.max(keys - recent, 0), block))

            # A fixed k, or clamp(ceil(ratio * prefix), min, max); the product passes 2^31.
            share_of_keys = T.alloc_var(WIDE, init=ceil_div(T.cast(ratio_ppm, WIDE) * keys, T.cast(PPM, WIDE)))
            budget = T.alloc_var(INT, init=T.min(T.max(T.cast(share_of_keys, INT), min_keys), max_keys))
            if policy == TOP_P:
                budget = max_keys
            if k > 0:
                budget = k
            most = T.alloc_var(INT, init=ceil_div(T.min(budget, keys), block))
            least = T.alloc_var(INT, init=ceil_div(T.min(min_keys, keys), block))

            # Whole tiles; blocks past the prefix have none.
            chunk = T.alloc_var(INT, init=ceil_div(ceil_div(prefix, splits), BLOCK_N) * BLOCK_N)
            begin = T.alloc_var(INT, init=T.min(split * chunk, prefix))
            end = T.alloc_var(INT, init=T.min(begin + chunk, prefix))
            tiles = T.alloc_var(INT, init=ceil_div(end - begin, BLOCK_N))

            # First the totals and the steps of a share's limit, with a count of what it takes where bounds may change
            # that; then the steps of a number's limit; last the count that says where to write, and the writing.
            mass_phases = T.alloc_var(INT, init=T.Select(policy == TOP_P, 1 + mass_steps, 0))
            first_step = T.alloc_var(INT, init=mass_phases)
            if T.And(policy == TOP_P, count_steps > 0):
                first_step = mass_phases + 1
            last_count = T.alloc_var(INT, init=first_step + count_steps)
            bits = T.alloc_var(INT, init=T.Select(has_histogram > 0, HISTOGRAM_SHIFT, 32))

            limit = T.alloc_var(INT, init=LOWEST)
            needed = T.alloc_var(DOUBLE, init=0.0)  # of what has the digits of the limit
            needed_was = T.alloc_var(DOUBLE, init=0.0)
            forced_mass = T.alloc_var(DOUBLE, init=0.0)
            total_mass = T.alloc_var(DOUBLE, init=0.0)
            largest = T.alloc_var(DOUBLE, init=0.0)
            needed_mass = T.alloc_var(DOUBLE, init=0.0)
            running = T.alloc_var(DOUBLE, init=0.0)
            counted_now = T.alloc_var(WIDE, init=T.cast(0, WIDE))
            summed_now = T.alloc_var(WIDE, init=T.cast(0, WIDE))
            left = T.alloc_var(WIDE, init=T.cast(0, WIDE))
            limit_was = T.alloc_var(INT, init=0)
            massless = T.alloc_var(INT, init=0)
            tail_now = T.alloc_var(INT, init=0)
            forced = T.alloc_var(INT, init=0)
            digit = T.alloc_var(INT, init=0)
            wanted = T.alloc_var(INT, init=0)
            shift = T.alloc_var(INT, init=0)
            higher = T.alloc_var(INT, init=0)
            above_all = T.alloc_var(INT, init=0)
            tied_all = T.alloc_var(INT, init=0)
            above_before = T.alloc_var(INT, init=0)
            tied_before = T.alloc_var(INT, init=0)
            ties = T.alloc_var(INT, init=0)
            total = T.alloc_var(INT, init=0)
            steps = T.alloc_var(INT, init=0)
            floor = T.alloc_var("float32", init=0.0)
            # Loops of one step or none: inside an `if`, TileLang does not keep the threads of a loop apart.
            after_counts = T.alloc_var(INT, init=0)
            after_sums = T.alloc_var(INT, init=0)
            after_halving = T.alloc_var(INT, init=0)
            starts_search = T.alloc_var(INT, init=0)
            reads_histogram = T.alloc_var(INT, init=0)
            totals = T.alloc_var(INT, init=0)
            sums = T.alloc_var(INT, init=0)
            halves = T.alloc_var(INT, init=0)
            searches = T.alloc_var(INT, init=0)
            takes = T.alloc_var(INT, init=0)
            writes = T.alloc_var(INT, init=0)

            for phase in T.serial(first_phase, last_phase):
                slot = T.truncmod(phase, 2)
                limit_was = words[row_words + 1 - slot]
                needed_was = doubles[row_doubles + 1 - slot]
                counted_now = row_counted + T.cast(slot * splits + split, WIDE) * RADIX_BINS
                summed_now = row_summed + T.cast(slot * splits + split, WIDE) * MASS_BINS

                # Mass of the forced and of all keys, and the largest free score.
                forced_mass = 0.0
                total_mass = 0.0
                largest = 0.0
                for other in T.serial(T.Select(T.And(policy == TOP_P, phase > 0), splits, 0)):
                    left = row_doubles + TOTALS + 3 * other
                    forced_mass += doubles[left]
                    total_mass += doubles[left + 1]
                    largest = T.max(largest, doubles[left + 2])
                total_mass += forced_mass
                needed_mass = share * total_mass - forced_mass
                massless = T.Select(T.And(T.And(policy == TOP_P, phase > 0), total_mass == 0.0), 1, 0)
                tail_now = tail
                if massless > 0:
                    # Without any mass the newest keys are forced until there are enough.
                    tail_now = T.max(head, T.min(tail, prefix - (least - head)))
                forced = head + prefix - tail_now

                # What a share's limit takes, and where it stands in the row; of use in the phase after a count.
                above_all = 0
                tied_all = 0
                above_before = 0
                tied_before = 0
                for other in T.serial(splits):
                    left = row_words + COUNTS + 2 * other
                    if other < split:
                        above_before += words[left]
                        tied_before += words[left + 1]
                    above_all += words[left]
                    tied_all += words[left + 1]

                after_counts = T.Select(T.And(phase > first_step, phase <= last_count), 1, 0)
                after_sums = T.Select(T.And(phase > 1, phase <= mass_phases), 1, 0)
                after_halving = T.Select(bisection_steps > 0, after_sums, 0)
                after_sums -= after_halving
                starts_search = T.Select(T.And(phase == first_step, count_steps > 0), 1, 0)
                totals = T.Select(T.And(phase == 0, policy == TOP_P), 1, 0)
                sums = T.Select(T.And(phase > 0, phase < mass_phases), 1, 0)
                halves = T.Select(bisection_steps > 0, sums, 0)
                sums -= halves
                searches = T.Select(T.And(phase >= first_step, phase < last_count), 1, 0)
                takes = T.Select(T.Or(phase == last_count, T.And(phase == mass_phases, policy == TOP_P)), 1, 0)
                writes = T.Select(phase > last_count, 1, 0)

                # The limit, by what the phase before left of it.
                limit = limit_was
                needed = needed_was
                for _ in T.serial(after_counts):
                    for b in T.Parallel(RADIX_BINS):
                        counted[b] = 0
                    for other in T.serial(splits):
                        left = row_counted + T.cast((1 - slot) * splits + other, WIDE) * RADIX_BINS
                        for b in T.Parallel(RADIX_BINS):
                            counted[b] += words[left + b]
                    # The last bin from which on the counts reach what is needed, and what is still needed of it.
                    T.cumsum(counted, dim=0, reverse=True)
                    digit = 0
                    for bit in T.serial(RADIX_BITS):
                        middle = digit + T.shift_right(RADIX_BINS // 2, bit)
                        digit = T.Select(T.cast(counted[middle], DOUBLE) >= needed, middle, digit)
                    if digit < RADIX_BINS - 1:
                        needed -= T.cast(counted[T.min(digit + 1, RADIX_BINS - 1)], DOUBLE)
                    if limit_was != NOTHING:
                        limit = limit_was ^ T.shift_left(digit, shift_of(bits, phase - first_step - 1, RADIX_BITS))
                for _ in T.serial(after_sums):
                    for b in T.Parallel(MASS_BINS):
                        bin_masses[b] = 0.0
                    for other in T.serial(splits):
                        left = row_summed + T.cast((1 - slot) * splits + other, WIDE) * MASS_BINS
                        for b in T.Parallel(MASS_BINS):
                            bin_masses[b] += doubles[left + b]
                    # The last digit from which on the sums reach what is needed.
                    digit = -1
                    running = 0.0
                    for b in T.serial(MASS_BINS):
                        if digit < 0:
                            needed = needed_was - running
                            running += bin_masses[MASS_BINS - 1 - b]
                            if T.Or(running >= needed_was, b == MASS_BINS - 1):
                                digit = MASS_BINS - 1 - b
                    limit = limit_was ^ T.shift_left(digit, shift_of(MASS_KEY_BITS, phase - 2, MASS_BITS))
                for _ in T.serial(after_halving):
                    # The mass from the middle on tells which half of [limit, needed] the threshold is in.
                    running = 0.0
                    for other in T.serial(splits):
                        running += doubles[row_summed + T.cast((1 - slot) * splits + other, WIDE) * MASS_BINS]
                    floor = T.cast(0.5 * (score_of(limit_was) + needed_was), "float32")
                    if running >= needed_mass:
                        limit = T.reinterpret(floor, INT)
                    else:
                        needed = T.cast(floor, DOUBLE)

                if T.And(phase == 1, phase < mass_phases):
                    limit = ZERO
                    needed = T.Select(bisection_steps > 0, largest, needed_mass)
                if T.And(policy == TOP_P, phase == mass_phases):
                    # How many keys equal to the limit of a share are taken.
                    if massless > 0:
                        limit = NOTHING
                    if T.And(massless == 0, mass_steps == 0):
                        limit = LEAST  # all of the mass
                    if T.Or(T.Or(massless > 0, mass_steps == 0), bisection_steps > 0):
                        needed = EVERY
                    elif T.And(limit > ZERO, needed > 0.0):
                        needed = T.min(T.ceil(needed / score_of(limit)), EVERY)
                    else:
                        needed = 0.0
                if T.And(policy > TOP_P, phase == last_count):
                    floor = threshold
                    if has_thresholds > 0:
                        floor = thresholds[row_thresholds]
                    limit = T.reinterpret(floor, INT)
                    limit = order_of(limit)
                    needed = EVERY
                for _ in T.serial(starts_search):
                    wanted = most - forced
                    if policy == TOP_P:
                        wanted = forced + above_all + T.cast(T.min(T.cast(tied_all, DOUBLE), needed_was), INT)
                        wanted = T.min(T.max(wanted, least), most) - forced
                    limit = T.Select(wanted <= 0, NOTHING, LOWEST)
                    needed = T.cast(wanted, DOUBLE)
                    searched = T.And(wanted > 0, wanted < tail_now - head)
                    reads_histogram = T.Select(searched, T.min(has_histogram, 1), 0)
                    for _ in T.serial(reads_histogram):
                        # The bin of verification's histogram in which the wanted keys end, without the forced keys it
                        # counts as well.
                        for b in T.Parallel(HISTOGRAM_BINS):
                            coarse[b] = histogram[row_histogram + b]
                        T.sync_threads()
                        subtract_bins(coarse, scores, row_scores, 0, head)
                        subtract_bins(coarse, scores, row_scores, tail_now, prefix)
                        T.sync_threads()
                        # The last bin from which on the counts reach what is needed, and what is still needed of it.
                        T.cumsum(coarse, dim=0, reverse=True)
                        digit = 0
                        for bit in T.serial(HISTOGRAM_BITS):
                            middle = digit + T.shift_right(HISTOGRAM_BINS // 2, bit)
                            digit = T.Select(T.cast(coarse[middle], DOUBLE) >= needed, middle, digit)
                        if digit < HISTOGRAM_BINS - 1:
                            needed -= T.cast(coarse[T.min(digit + 1, HISTOGRAM_BINS - 1)], DOUBLE)
                        limit = T.shift_left(digit, HISTOGRAM_SHIFT)
                if split == 0:
                    # Every block knows the same; one writes it down for the next phase.
                    words[row_words + slot] = limit
                    doubles[row_doubles + slot] = needed

                for _ in T.serial(totals):
                    orders = T.alloc_fragment([ITEMS, THREADS], INT)
                    free = T.alloc_fragment([ITEMS, THREADS], INT)
                    masses = T.alloc_fragment([THREADS], DOUBLE)
                    forced_masses = T.alloc_fragment([THREADS], DOUBLE)
                    maxima = T.alloc_fragment([THREADS], INT)
                    block_mass = T.alloc_fragment([1], DOUBLE)
                    block_forced = T.alloc_fragment([1], DOUBLE)
                    block_largest = T.alloc_fragment([1], INT)
                    T.clear(masses)
                    T.clear(forced_masses)
                    T.fill(maxima, ZERO)
                    for step in T.serial(tiles):
                        read_tile(orders, free, scores, row_scores, begin + step * BLOCK_N, end, head, tail_now)
                        for i in T.unroll(ITEMS):
                            for lane in T.Parallel(THREADS):
                                masses[lane] += mass_of(orders[i, lane] * free[i, lane])
                                forced_masses[lane] += mass_of(orders[i, lane] * (1 - free[i, lane]))
                                finite = T.cast(orders[i, lane] < INFINITE, INT)
                                maxima[lane] = T.max(maxima[lane], orders[i, lane] * (finite * free[i, lane]))
                    T.reduce_sum(masses, block_mass, dim=0)
                    T.reduce_sum(forced_masses, block_forced, dim=0)
                    T.reduce_max(maxima, block_largest, dim=0)
                    left = row_doubles + TOTALS + 3 * split
                    doubles[left] = block_forced[0]
                    doubles[left + 1] = block_mass[0]
                    doubles[left + 2] = score_of(block_largest[0])
                for _ in T.serial(sums):
                    orders = T.alloc_fragment([ITEMS, THREADS], INT)
                    free = T.alloc_fragment([ITEMS, THREADS], INT)
                    summed = T.alloc_fragment([MASS_BINS], DOUBLE)
                    # Sums up the scores that share the digits found so far, by their next digit; every thread adds up
                    # its own.
                    shift = shift_of(MASS_KEY_BITS, phase - 1, MASS_BITS)
                    higher = bits_above(MASS_KEY_BITS, phase - 1, MASS_BITS)
                    for b, lane in T.Parallel(MASS_BINS, THREADS):
                        by_digit[b, lane] = 0.0
                    for step in T.serial(tiles):
                        read_tile(orders, free, scores, row_scores, begin + step * BLOCK_N, end, head, tail_now)
                        for i in T.unroll(ITEMS):
                            for lane in T.Parallel(THREADS):
                                differs = orders[i, lane] ^ limit
                                shares = T.cast((differs & higher) == 0, INT) * free[i, lane]
                                by_digit[T.shift_right(differs, shift) & (MASS_BINS - 1), lane] += mass_of(
                                    orders[i, lane] * shares
                                )
                    T.reduce_sum(by_digit, summed, dim=1)
                    for b in T.Parallel(MASS_BINS):
                        doubles[summed_now + b] = summed[b]
                for _ in T.serial(halves):
                    orders = T.alloc_fragment([ITEMS, THREADS], INT)
                    free = T.alloc_fragment([ITEMS, THREADS], INT)
                    masses = T.alloc_fragment([THREADS], DOUBLE)
                    block_mass = T.alloc_fragment([1], DOUBLE)
                    # The mass of free scores from the middle on.
                    middle = T.reinterpret(T.cast(0.5 * (score_of(limit) + needed), "float32"), INT)
                    T.clear(masses)
                    for step in T.serial(tiles):
                        read_tile(orders, free, scores, row_scores, begin + step * BLOCK_N, end, head, tail_now)
                        for i in T.unroll(ITEMS):
                            for lane in T.Parallel(THREADS):
                                from_middle = T.cast(orders[i, lane] >= middle, INT)
                                masses[lane] += mass_of(orders[i, lane] * (from_middle * free[i, lane]))
                    T.reduce_sum(masses, block_mass, dim=0)
                    doubles[summed_now] = block_mass[0]
                for _ in T.serial(searches):
                    orders = T.alloc_fragment([ITEMS, THREADS], INT)
                    free = T.alloc_fragment([ITEMS, THREADS], INT)
                    # Counts the keys that share the digits found so far, by their next digit; nothing is to be found
                    # where no key is wanted or all are.
                    shift = shift_of(bits, phase - first_step, RADIX_BITS)
                    higher = bits_above(bits, phase - first_step, RADIX_BITS)
                    for b in T.Parallel(RADIX_BINS * TALLIES):
                        tally[b] = 0
                    T.sync_threads()
                    searched = T.And(limit != NOTHING, needed < T.cast(tail_now - head, DOUBLE))
                    steps = T.Select(searched, tiles, 0)
                    for step in T.serial(steps):
                        read_tile(orders, free, scores, row_scores, begin + step * BLOCK_N, end, head, tail_now)
                        for i, lane in T.Parallel(ITEMS, THREADS):
                            if T.And(free[i, lane] > 0, ((orders[i, lane] ^ limit) & higher) == 0):
                                found = T.shift_right(orders[i, lane] ^ limit, shift) & (RADIX_BINS - 1)
                                T.atomic_add(tally[found * TALLIES + lane % TALLIES], 1)
                    T.sync_threads()
                    for b in T.Parallel(RADIX_BINS):
                        counted[b] = 0
                    for copy in T.serial(TALLIES):
                        for b in T.Parallel(RADIX_BINS):
                            counted[b] += tally[b * TALLIES + copy]
                    for b in T.Parallel(RADIX_BINS):
                        words[counted_now + b] = counted[b]
                for _ in T.serial(takes):
                    orders = T.alloc_fragment([ITEMS, THREADS], INT)
                    free = T.alloc_fragment([ITEMS, THREADS], INT)
                    above = T.alloc_fragment([THREADS], INT)
                    tied = T.alloc_fragment([THREADS], INT)
                    block_above = T.alloc_fragment([1], INT)
                    block_tied = T.alloc_fragment([1], INT)
                    # Counts the free keys above the limit and equal to it.
                    T.clear(above)
                    T.clear(tied)
                    for step in T.serial(tiles):
                        read_tile(orders, free, scores, row_scores, begin + step * BLOCK_N, end, head, tail_now)
                        for i in T.unroll(ITEMS):
                            for lane in T.Parallel(THREADS):
                                above[lane] += T.cast(orders[i, lane] > limit, INT) * free[i, lane]
                                tied[lane] += T.cast(orders[i, lane] == limit, INT) * free[i, lane]
                    T.reduce_sum(above, block_above, dim=0)
                    T.reduce_sum(tied, block_tied, dim=0)
                    left = row_words + COUNTS + 2 * split
                    words[left] = block_above[0]
                    words[left + 1] = block_tied[0]
                for _ in T.serial(writes):
                    orders = T.alloc_fragment([ITEMS, THREADS], INT)
                    free = T.alloc_fragment([ITEMS, THREADS], INT)
                    places = T.alloc_fragment([ITEMS, THREADS], INT)
                    # Writes the block's part of the ascending indices, and of the -1 after them.
                    ties = T.max(T.cast(needed, INT), 0)
                    total = T.min(forced + above_all + T.min(tied_all, ties), width)
                    above_before += T.min(begin, head) + T.max(begin - tail_now, 0)
                    for step in T.serial(tiles):
                        read_tile(orders, free, scores, row_scores, begin + step * BLOCK_N, end, head, tail_now)
                        # Sure keys are counted in the lower half of a word, ties in the upper one.
                        for i, lane in T.Parallel(ITEMS, THREADS):
                            inside = T.cast(begin + step * BLOCK_N + i * THREADS + lane < end, INT)
                            sure = T.cast(T.Or(free[i, lane] == 0, orders[i, lane] > limit), INT)
                            tie = T.cast(orders[i, lane] == limit, INT) * (1 - sure)
                            places[i, lane] = inside * (sure + 0x10000 * tie)
                            ranks[i, lane] = places[i, lane]
                        rank_tile(ranks, line_ranks)
                        for i, lane in T.Parallel(ITEMS, THREADS):
                            rank = ranks[i, lane] + line_ranks[i] - ranks[i, THREADS - 1] - places[i, lane]
                            sure_rank, tie_rank = above_before + (rank & 0xFFFF), tied_before + T.shift_right(rank, 16)
                            tie_taken = T.cast(tie_rank < ties, INT) * T.shift_right(places[i, lane], 16)
                            taken = (places[i, lane] & 1) + tie_taken
                            places[i, lane] = taken * (sure_rank + T.min(tie_rank, ties) + 1) - 1
                        store_tile(
                            places,
                            begin + step * BLOCK_N,
                            indices,
                            slots,
                            page_table,
                            row_out,
                            row_table,
                            width,
                            pages,
                            slots_per_page,
                            slot_words,
                        )
                        above_before += line_ranks[ITEMS - 1] & 0xFFFF
                        tied_before += T.shift_right(line_ranks[ITEMS - 1], 16)
                    pad_row(indices, slots, row_out, total + split * BLOCK_N, width, splits * BLOCK_N, slot_words)
                    if split == 0:
                        counts[row] = total
                T.sync_threads()  # what this phase wrote, other threads of the block read in the next

    @T.prim_func
    def unite_rows(
        row_indices: T.Tensor((elements,), "int32"),  # [layers, batch, united_rows, united, row_width], -1 padded
        members: T.Tensor((elements,), "int32"),  # [layers, batch, united_rows, columns], whether a row takes a column
        prefix_lens: T.Tensor((elements,), "int32"),  # [batch], in keys
        page_table: T.Tensor((elements,), "int32"),  # [batch, pages]
        indices: T.Tensor((elements,), "int32"),  # [layers, batch, united_rows, width]
        counts: T.Tensor((elements,), "int32"),  # [layers, batch, united_rows]
        slots: T.Tensor((elements,), "int32"),  # [layers, batch, united_rows, width, slot_words]
        stride_table: T.int64,
        batch: T.int32,
        united_rows: T.int32,
        united: T.int32,
        columns: T.int32,
        row_width: T.int32,
        width: T.int32,
        block: T.int32,
        pages: T.int32,
        slots_per_page: T.int32,
        slot_words: T.int32,
        rows: T.int32,
    ):
        """The union of some rows' indices; blocks are its rows."""
        with T.Kernel(rows, threads=THREADS) as row:
            places = T.alloc_fragment([ITEMS, THREADS], INT)
            ranks = T.alloc_shared([ITEMS, THREADS], INT)
            line_ranks = T.alloc_shared([ITEMS], INT)
            request = T.alloc_var(INT, init=T.truncmod(T.truncdiv(row, united_rows), batch))
            row_members = T.alloc_var(WIDE, init=T.cast(row, WIDE) * columns)
            row_lists = T.alloc_var(WIDE, init=T.cast(row, WIDE) * united * row_width)
            row_out = T.alloc_var(WIDE, init=T.cast(row, WIDE) * width)
            row_table = T.alloc_var(WIDE, init=request * stride_table)
            prefix = T.alloc_var(INT, init=ceil_div(T.max(T.min(prefix_lens[request], columns * block), 0), block))
            listed = T.alloc_var(INT, init=united * row_width)
            total = T.alloc_var(INT, init=0)
            for step in T.serial(ceil_div(prefix, BLOCK_N)):
                for i, lane in T.Parallel(ITEMS, THREADS):
                    position = step * BLOCK_N + i * THREADS + lane
                    if position < prefix:
                        members[row_members + position] = 0
            T.sync_threads()
            for step in T.serial(ceil_div(listed, BLOCK_N)):
                for i, lane in T.Parallel(ITEMS, THREADS):
                    place = step * BLOCK_N + i * THREADS + lane
                    taken = T.if_then_else(place < listed, row_indices[row_lists + place], -1)
                    if taken >= 0:
                        members[row_members + taken] = 1
            T.sync_threads()
            for step in T.serial(ceil_div(prefix, BLOCK_N)):
                for i, lane in T.Parallel(ITEMS, THREADS):
                    position = step * BLOCK_N + i * THREADS + lane
                    places[i, lane] = T.if_then_else(position < prefix, members[row_members + position], 0)
                    ranks[i, lane] = places[i, lane]
                rank_tile(ranks, line_ranks)
                for i, lane in T.Parallel(ITEMS, THREADS):
                    rank = ranks[i, lane] + line_ranks[i] - ranks[i, THREADS - 1] - 1
                    places[i, lane] = places[i, lane] * (total + rank + 1) - 1
                store_tile(
                    places,
                    step * BLOCK_N,
                    indices,
                    slots,
                    page_table,
                    row_out,
                    row_table,
                    width,
                    pages,
                    slots_per_page,
                    slot_words,
                )
                total += line_ranks[ITEMS - 1]
            pad_row(indices, slots, row_out, total, width, BLOCK_N, slot_words)
            counts[row] = total

    return select_rows, unite_rows


def launches(phases: int, in_one: bool) -> list[tuple[int, int]]:
    """First phase of every launch, and the one after its last."""
    return [(0, phases)] if in_one else [(phase, phase + 1) for phase in range(phases)]


def num_splits(rows: int, columns: int, num_sms: int) -> int:
    """Blocks of every row: enough to fill the device, no more than tiles, and one where few would not be worth it."""
    splits = min(MAX_SPLITS, num_sms // max(1, rows), -(-columns // BLOCK_N))
    return splits if splits >= FEWEST_SPLITS else 1


def scratch_bytes(rows: int, columns: int, splits: int, row_width: int, united: int) -> list[int]:
    """Bytes of each scratch array, in the order in which they lie in the workspace."""
    words = rows * (COUNTS + 2 * splits + 2 * splits * RADIX_BINS)
    doubles = rows * (TOTALS + 3 * splits + 2 * splits * MASS_BINS)
    lists = (rows * row_width, rows, rows // united * columns) if united > 1 else ()  # indices, counts, members
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in (words * 4, doubles * 8, *(n * 4 for n in lists))]


def workspace_bytes(*, rows: int, columns: int, row_width: int, united: int, num_sms: int) -> int:
    """Bytes of scratch that a launch for so many rows of scores needs."""
    return sum(scratch_bytes(rows, columns, num_splits(rows, columns, num_sms), row_width, united))


def launch(
    *,
    functions: Callable[[int], Mapping[str, Callable[..., None]]],
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
    """Enqueues the kernels on the current stream; allocates nothing and never waits for the device.

    functions  what device_functions compiled to, by name, for a vector width: called with a grid and the arguments

    scores [layers, batch, score_rows, columns] and thresholds [layers, batch, score_rows] may have any strides but a
    unit last one of scores; indices, counts, slots and histogram are contiguous. What is None is not used. `united`
    neighbouring score rows, each of which takes at most `row_width` columns, give one row of the outputs.
    """
    layers, batch, score_rows, columns = scores.shape
    rows = layers * batch * score_rows
    if rows == 0:
        return
    run = functions(VECTOR)
    splits = num_splits(rows, columns, num_sms)
    sizes = scratch_bytes(rows, columns, splits, row_width, united)
    words, doubles, *lists = workspace[: sum(sizes)].split(sizes)
    row_indices, row_counts, members = lists if lists else (indices, counts, indices)
    table, stride_table, pages = prefix_lens, 0, 0
    if page_table is not None:
        table, stride_table, pages = page_table, page_table.stride(0), page_table.shape[1]
    slot_words = 0 if slots is None else slots.element_size() // 4
    slot_memory = indices if slots is None else slots
    bounded = policy == TOP_P and (min_keys > 0 or max_keys < columns * block)
    bits = 32 if histogram is None else HISTOGRAM_SHIFT
    count_steps = -(-bits // RADIX_BITS) if policy == TOP_K or bounded else 0
    mass_steps = bisection_steps
    if policy == TOP_P and bisection_steps == 0 and share < 1.0:
        mass_steps = -(-MASS_KEY_BITS // MASS_BITS)
    phases = (1 + mass_steps + bounded if policy == TOP_P else 0) + count_steps + 2
    strides = (0, 0, 0) if thresholds is None else thresholds.stride()
    for first, last in launches(phases, splits == 1):
        run["select_rows"](
            (rows, splits),
            scores=scores,
            prefix_lens=prefix_lens,
            thresholds=scores if thresholds is None else thresholds,
            histogram=counts if histogram is None else histogram,
            page_table=table,
            indices=row_indices,
            counts=row_counts,
            slots=slot_memory,
            words=words,
            doubles=doubles,
            stride_scores_layer=scores.stride(0),
            stride_scores_request=scores.stride(1),
            stride_scores_row=scores.stride(2),
            stride_thresholds_layer=strides[0],
            stride_thresholds_request=strides[1],
            stride_thresholds_row=strides[2],
            stride_table=stride_table,
            batch=batch,
            score_rows=score_rows,
            columns=columns,
            width=row_width if lists else indices.shape[-1],
            block=block,
            sink=sink,
            recent=recent,
            pages=pages,
            slots_per_page=slots_per_page,
            slot_words=0 if lists else slot_words,
            policy=policy,
            k=k,
            ratio_ppm=ratio_ppm,
            min_keys=min_keys,
            max_keys=max_keys,
            share=share,
            threshold=threshold,
            has_thresholds=0 if thresholds is None else 1,
            has_histogram=0 if histogram is None else 1,
            bisection_steps=bisection_steps,
            mass_steps=mass_steps,
            count_steps=count_steps,
            first_phase=first,
            last_phase=last,
            rows=rows,
            splits=splits,
        )
    if lists:
        run["unite_rows"](
            (rows // united,),
            row_indices=row_indices,
            members=members,
            prefix_lens=prefix_lens,
            page_table=table,
            indices=indices,
            counts=counts,
            slots=slot_memory,
            stride_table=stride_table,
            batch=batch,
            united_rows=score_rows // united,
            united=united,
            columns=columns,
            row_width=row_width,
            width=indices.shape[-1],
            block=block,
            pages=pages,
            slots_per_page=slots_per_page,
            slot_words=slot_words,
            rows=rows // united,
        )
