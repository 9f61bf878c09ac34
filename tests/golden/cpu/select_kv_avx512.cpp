// Selection over attention scores: the k largest, the fewest with a share of the mass, or all from a threshold on.
// Exact on every input, ties to the smaller index, indices ascending.
//
// A row is read once where that is enough. A sample of it, or a histogram that verification left, names a floor under
// which no score should be needed; one pass keeps what reaches the floor, and a search among the few that were kept
// finds the exact limit. A floor that is too low keeps more than needed and one that is too high is noticed and
// dropped, so that only time depends on the guess. A task is one row, or some neighbours whose selections are united.
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <immintrin.h>

// ---- the plan ----
constexpr int SAMPLED = 1024;  // scores looked at before a row is read

constexpr int RUN = 16;                    // neighbours of a sample, a cache line of them
constexpr int SLACK = 16;                  // elements a vector store may write past the last one that counts
constexpr int HISTOGRAM_BINS = 1024;       // of non-negative scores, by their top bits
constexpr int HISTOGRAM_SHIFT = 21;
constexpr float LEAST_MASS = 0x1p-149f;    // the smallest score above 0
constexpr uint32_t SIGN = 0x80000000u, INFINITY_BITS = 0x7f800000u;
constexpr int SUMS = 16;                   // partial sums of a row, so that additions overlap and their order is fixed
constexpr int FEW = 32;                    // keys that are sorted rather than counted

enum Policy { TOP_K, TOP_P, THRESHOLD };

struct Arguments {
    const float* scores;         // [layers, batch, rows, columns]
    const float* thresholds;     // [layers, batch, rows], or null
    const int32_t* histogram;    // [layers, batch, rows, HISTOGRAM_BINS], or null
    const int32_t* prefix_lens;  // [batch], in keys
    const int32_t* page_table;   // [batch, pages], or null
    int32_t *indices, *counts;   // [layers, batch, rows / united, width], [layers, batch, rows / united]
    void* slots;                 // [layers, batch, rows / united, width] of slot_bytes, or null
    char* workspace;
    int64_t score_layer, score_request, score_row, threshold_layer, threshold_request, threshold_row, table_request;
    int64_t policy, k, ratio_ppm, min_keys, max_keys;  // k is 0 where the budget is a ratio of the prefix
    int64_t sink, recent, block;                       // in keys
    double share;                                      // of the mass
    float threshold;                                   // of every row, where thresholds is null
    int32_t layers, batch, rows, columns;
    int32_t united;  // rows whose selections become one
    int32_t width, bisection_steps, pages, slots_per_page, slot_bytes, threads;
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- scores as integers of the same order ----

// NaN below -infinity, -0 equal to +0.
static inline uint32_t ordered(float score) {
    uint32_t bits;
    memcpy(&bits, &score, 4);
    bits = bits == SIGN ? 0 : bits;
    return score == score ? bits ^ ((uint32_t)((int32_t)bits >> 31) | SIGN) : 0;
}

static inline float score_of(uint32_t key) {
    const uint32_t bits = key & SIGN ? key ^ SIGN : ~key;
    float score;
    memcpy(&score, &bits, 4);
    return score;
}

// ---- vectors: of masks, of scores and of integers; pack() moves what a mask marks to the front ----

constexpr int LANES = 16;

static inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
static inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
static inline void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
static inline __m512 splat(float x) { return _mm512_set1_ps(x); }
static inline __m512i splat(uint32_t x) { return _mm512_set1_epi32((int)x); }
static inline uint32_t at_least(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline uint32_t at_least(__m512i a, __m512i b) { return _mm512_cmpge_epu32_mask(a, b); }
static inline __m512i minus(__m512i a, __m512i b) { return _mm512_sub_epi32(a, b); }
static inline __m512i pack(__m512i v, uint32_t mask) { return _mm512_maskz_compress_epi32((__mmask16)mask, v); }
static inline __m512i bits_of(__m512 v) { return _mm512_castps_si512(v); }

// Lane numbers that a mask marks, from `first` on.
static inline __m512i pack_lanes(uint32_t mask, int32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return pack(_mm512_add_epi32(lanes, splat((uint32_t)first)), mask);
}

static inline __m512i ordered(__m512 scores) {
    __m512i bits = bits_of(scores);
    bits = _mm512_maskz_mov_epi32(_mm512_cmpneq_epi32_mask(bits, splat(SIGN)), bits);
    const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), splat(SIGN));
    return _mm512_maskz_xor_epi32(_mm512_cmp_ps_mask(scores, scores, _CMP_ORD_Q), bits, flip);
}

// Stores two packed vectors of which `number` lanes count; half of them, as most often, crosses fewer cache lines.
static inline void store_packed(void* p, __m512i v, void* q, __m512i w, int number) {
    if (number <= 8) {
        _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(v));
        _mm256_storeu_si256((__m256i*)q, _mm512_castsi512_si256(w));
    } else {
        store(p, v);
        store(q, w);
    }
}

// ---- memory of a thread ----

struct Scratch {
    float* values;     // scores that reach the floor, in their order
    int32_t* indices;  // where they stand
    uint32_t* keys;    // the same scores as integers, of which a search keeps fewer and fewer
    int32_t* row;      // where rows are united, the selection of one of them
    uint8_t* members;  // and for every column whether some row selects it
};

static int64_t list_elements(const Arguments& a) {
    return (larger(a.columns, SAMPLED) + SLACK + 15) / 16 * 16;
}

// Of a column each, and 0 up to whole vectors.
static int64_t member_bytes(const Arguments& a) { return ((int64_t)a.columns + 63) / 64 * 64; }

static int64_t scratch_bytes(const Arguments& a) {
    return (a.united > 1 ? 4 : 3) * 4 * list_elements(a) + (a.united > 1 ? member_bytes(a) : 0);
}

static Scratch scratch_of(const Arguments& a, int thread) {
    int32_t* at = (int32_t*)(a.workspace + thread * scratch_bytes(a));
    const int64_t list = list_elements(a);
    return {(float*)at, at + list, (uint32_t*)(at + 2 * list), at + 3 * list, (uint8_t*)(at + 4 * list)};
}

// ---- passes over scores ----

// Keeps the scores of at least `floor`, with their indices, and returns how many; a floor of NaN keeps all.
static int64_t keep(const float* scores, int64_t count, float floor, int32_t first, const Scratch& s) {
    const bool all = floor != floor;
    int64_t kept = 0, i = 0;
    const uint32_t any = all ? (1u << LANES) - 1 : 0;
    for (; i + LANES <= count; i += LANES) {
        const auto score = load(scores + i);
        const uint32_t take = at_least(score, splat(floor)) | any;
        const int number = __builtin_popcount(take);
        const auto indices = pack_lanes(take, first + (int32_t)i);
        store_packed(s.values + kept, pack(bits_of(score), take), s.indices + kept, indices, number);
        kept += number;
    }
    for (; i < count; i++) {
        s.values[kept] = scores[i];
        s.indices[kept] = first + (int32_t)i;
        kept += all || scores[i] >= floor;
    }
    return kept;
}

// The sum of mass(0 .. count - 1) in an order that only their number fixes. Fours are added in float32, which costs a
// share of 2^-23 and halves the time; where that overflows they are added one by one.
template <typename Mass> static double add_up(int64_t count, Mass mass) {
    double sums[SUMS] = {}, sum = 0.0, slow = 0.0;
    int64_t i = 0;
    for (; i + 4 * SUMS <= count; i += 4 * SUMS)
        for (int j = 0; j < SUMS; j++)
            sums[j] += (mass(i + j) + mass(i + SUMS + j)) + (mass(i + 2 * SUMS + j) + mass(i + 3 * SUMS + j));
    for (; i < count; i++) sums[0] += mass(i);
    for (int j = 0; j < SUMS; j++) sum += sums[j];
    if (sum < INFINITY) return sum;
    for (i = 0; i < count; i++) slow += mass(i);
    return slow;
}

static double mass_from(const float* scores, int64_t count, float floor) {
    return add_up(count, [=](int64_t i) { return scores[i] >= floor ? scores[i] : 0.0f; });
}

// Whether all scores are masses, finite and not negative, and the largest of them.
struct Masses { bool valid; float largest; };

static Masses look_at(const float* scores, int64_t count) {
    const auto bits = [&](int64_t i) { uint32_t b; memcpy(&b, scores + i, 4); return b; };
    const auto greater = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
    uint32_t most[SUMS] = {};  // of the bits, which stand in the order of the scores where none has a sign
    int64_t i = 0;
    for (; i + 4 * SUMS <= count; i += 4 * SUMS)
        for (int j = 0; j < SUMS; j++) {
            const uint32_t first = greater(bits(i + j), bits(i + SUMS + j));
            most[j] = greater(most[j], greater(first, greater(bits(i + 2 * SUMS + j), bits(i + 3 * SUMS + j))));
        }
    for (; i < count; i++) most[0] = greater(most[0], bits(i));
    for (int j = 1; j < SUMS; j++) most[0] = greater(most[0], most[j]);
    if (most[0] < INFINITY_BITS) return {true, score_of(most[0] | SIGN)};
    Masses m = {true, 0.0f};  // a sign, which a zero may have
    for (i = 0; i < count; i++) {
        m.valid = m.valid && scores[i] >= 0.0f && scores[i] < INFINITY;
        m.largest = scores[i] > m.largest ? scores[i] : m.largest;
    }
    return m;
}

// ---- the search ----

// What a search takes: every key above `key` and the first `ties` equal to it, `taken` in all.
constexpr int64_t EVERY = INT64_MAX;
struct Limit { uint32_t key; int64_t ties, taken; bool reached; };

// Keys from some key on: how many, and what they weigh: as much as they number, or as their scores sum up to.
struct Weight { int64_t number; double weight; };

template <bool BY_MASS> static Weight weigh(const uint32_t* keys, int64_t count, uint32_t from) {
    int32_t number = 0;
    for (int64_t i = 0; i < count; i++) number += keys[i] >= from;
    if (!BY_MASS) return {number, (double)number};
    const float* scores = (const float*)keys;
    return {number, add_up(count, [=](int64_t i) { return keys[i] >= from ? -scores[i] : 0.0f; })};
}

// Keeps the keys of [lowest, highest], in place.
static int64_t keep_range(uint32_t* keys, int64_t count, uint32_t lowest, uint32_t highest) {
    int64_t kept = 0, i = 0;
    const auto size = splat(highest - lowest);
    for (; i + LANES <= count; i += LANES) {
        const auto key = load((const void*)(keys + i));
        const uint32_t take = at_least(size, minus(key, splat(lowest)));
        store(keys + kept, pack(key, take));
        kept += __builtin_popcount(take);
    }
    for (; i < count; i++) {
        const uint32_t key = keys[i];
        keys[kept] = key;
        kept += lowest <= key && key <= highest;
    }
    return kept;
}

// Makes keys of the first `count` kept values and gives their range.
struct KeyRange { uint32_t lowest, highest; };

static KeyRange make_keys(int64_t count, const Scratch& s) {
    const float* values = s.values;
    uint32_t* keys = s.keys;
    uint32_t lowest = UINT32_MAX, highest = 0;
    for (int64_t i = 0; i < count; i++) keys[i] = ordered(values[i]);
    for (int64_t i = 0; i < count; i++) {
        lowest = keys[i] < lowest ? keys[i] : lowest;
        highest = keys[i] > highest ? keys[i] : highest;
    }
    return {lowest, highest};
}

// A search among a few keys: sorted, they are taken one by one.
template <bool BY_MASS> static Limit take_from_few(uint32_t* keys, int64_t count, double needed) {
    for (int64_t i = 1; i < count; i++) {
        const uint32_t key = keys[i];
        int64_t j = i;
        for (; j > 0 && keys[j - 1] < key; j--) keys[j] = keys[j - 1];
        keys[j] = key;
    }
    Limit limit = {0, 0, 0, false};
    while (!limit.reached && limit.taken < count) {
        const uint32_t key = keys[limit.taken++];
        limit.ties = key == limit.key ? limit.ties + 1 : 1;
        limit.key = key;
        needed -= BY_MASS ? score_of(key) : 1.0;
        limit.reached = needed <= 0.0;
    }
    if (limit.taken == count || keys[limit.taken] < limit.key) limit.ties = EVERY;
    return limit;
}

// Finds the smallest key to take of the kept values, so that those taken number, or BY_MASS weigh, at least `needed`.
// Halves the range of keys in which it lies, and drops the keys outside once they are most of them.
template <bool BY_MASS> static Limit search(int64_t count, double needed, const Scratch& s) {
    const KeyRange range = make_keys(count, s);
    uint64_t low = range.lowest, high = (uint64_t)range.highest + 1;
    Weight upper = {0, 0.0}, lower = {count, 0.0};  // of the keys from high on, and from low on
    int64_t taken = 0;
    while (lower.number - upper.number > FEW && high - low > 1) {
        const uint64_t middle = low + (high - low) / 2;
        const Weight w = weigh<BY_MASS>(s.keys, count, (uint32_t)middle);
        if (w.weight >= needed) low = middle, lower = w;
        else high = middle, upper = w;
        if (4 * (lower.number - upper.number) > count) continue;
        count = keep_range(s.keys, count, (uint32_t)low, (uint32_t)(high - 1));
        needed -= upper.weight;
        taken += upper.number;
        lower = {count, 0.0}, upper = {0, 0.0};
    }
    count = keep_range(s.keys, count, (uint32_t)low, (uint32_t)(high - 1));
    needed -= upper.weight;
    Limit limit = {(uint32_t)low, 0, 0, true};
    if (count <= FEW) limit = take_from_few<BY_MASS>(s.keys, count, needed);
    else {
        const double ties = BY_MASS ? ceil(needed / score_of(limit.key)) : needed;
        limit.reached = ties <= count;
        limit.ties = limit.taken = limit.reached ? larger(1, (int64_t)ties) : count;
    }
    limit.taken += taken + upper.number;
    return limit;
}

// Writes, ascending, the indices of the kept values [first, last) whose keys are at least `from`, until `wanted` are
// written in all; places up to there may be written early.
static int64_t write_from(int64_t first, int64_t last, uint32_t from, const Scratch& s, int32_t* out, int64_t taken,
                          int64_t wanted) {
    int64_t i = first;
    for (; i + LANES <= last && taken + LANES <= wanted; i += LANES) {
        const uint32_t take = at_least(ordered(load(s.values + i)), splat(from));
        store(out + taken, pack(load((const void*)(s.indices + i)), take));
        taken += __builtin_popcount(take);
    }
    for (; i < last && taken < wanted; i++) {
        out[taken] = s.indices[i];
        taken += ordered(s.values[i]) >= from;
    }
    return taken;
}

// Writes, ascending, the indices of the kept values that the limit takes; returns how many.
static int64_t emit(int64_t count, const Limit& limit, const Scratch& s, int32_t* out) {
    int64_t tied = limit.ties == EVERY ? count : 0;  // the kept values up to the last equal one that is taken
    for (int64_t ties = limit.ties; tied < count && ties > 0; tied++) ties -= ordered(s.values[tied]) == limit.key;
    const int64_t taken = write_from(0, tied, limit.key, s, out, 0, limit.taken);
    return write_from(tied, count, limit.key + 1, s, out, taken, limit.taken);
}

// ---- floors ----

// Fills the kept values with evenly spread runs of a row.
static void sample(const float* scores, int64_t count, const Scratch& s) {
    for (int64_t run = 0; run < SAMPLED / RUN; run++)
        memcpy(s.values + run * RUN, scores + run * (count - RUN) / (SAMPLED / RUN), RUN * sizeof(float));
}

// A floor that some more than the `wanted` largest scores most likely reach: by three standard deviations of a sample.
static float floor_of_count(const float* scores, int64_t count, int64_t wanted, const Scratch& s) {
    const double expected = (double)wanted * SAMPLED / count, rank = ceil(expected + 3.0 * sqrt(expected) + 2.0);
    if (count < 2 * SAMPLED || rank >= SAMPLED) return NAN;
    sample(scores, count, s);
    return score_of(search<false>(SAMPLED, rank, s).key);
}

// A floor under which most likely lies less than the mass that may be left out: three quarters of it in a sample.
static float floor_of_mass(const float* scores, int64_t count, double left_out, const Scratch& s) {
    if (count < 2 * SAMPLED || left_out <= 0.0) return LEAST_MASS;
    sample(scores, count, s);
    const double below = 0.75 * left_out * SAMPLED / count, above = mass_from(s.values, SAMPLED, 0.0f) - below;
    const float floor = score_of(search<true>(SAMPLED, above > LEAST_MASS ? above : LEAST_MASS, s).key);
    return floor > LEAST_MASS ? floor : LEAST_MASS;
}

// ---- one row ----

// A row of scores: its prefix, of which columns [0, head) and [tail, prefix) are forced, and its budgets in columns.
struct Row {
    const float* scores;
    const int32_t* histogram;
    float threshold;
    int64_t prefix, head, tail, least, most;

    const float* free() const { return scores + head; }
    int64_t free_count() const { return tail - head; }
    int64_t forced() const { return head + prefix - tail; }
};

static int64_t blocks_of(const Arguments& a, int64_t keys) { return (keys + a.block - 1) / a.block; }

static int64_t budget_of(const Arguments& a, int64_t keys) {
    if (a.policy != TOP_K) return smaller(a.max_keys, keys);
    if (a.k) return smaller(a.k, keys);
    const int64_t wanted = (a.ratio_ppm * keys + 999999) / 1000000;
    return smaller(smaller(larger(wanted, a.min_keys), a.max_keys), keys);
}

static Row describe(const Arguments& a, int64_t item) {
    const int64_t row = item % a.rows, request = item / a.rows % a.batch, layer = item / a.rows / a.batch;
    const int64_t limit = layer * a.threshold_layer + request * a.threshold_request + row * a.threshold_row;
    const int64_t keys = larger(0, smaller(a.prefix_lens[request], a.columns * a.block));
    Row r;
    r.scores = a.scores + layer * a.score_layer + request * a.score_request + row * a.score_row;
    r.histogram = a.histogram ? a.histogram + item * HISTOGRAM_BINS : nullptr;
    r.threshold = a.thresholds ? a.thresholds[limit] : a.threshold;
    r.prefix = blocks_of(a, keys);
    r.head = smaller(blocks_of(a, a.sink), r.prefix);
    r.tail = a.recent ? larger(r.head, larger(0, keys - a.recent) / a.block) : r.prefix;
    r.least = blocks_of(a, smaller(a.min_keys, keys));
    r.most = blocks_of(a, budget_of(a, keys));
    return r;
}

// The edge of the bin in which the `wanted` largest of a row's scores end; NaN where the histogram counts fewer.
static float floor_of_histogram(const int32_t* histogram, int64_t wanted) {
    for (int bin = HISTOGRAM_BINS - 1; bin >= 0; bin--)
        if ((wanted -= histogram[bin]) <= 0) return score_of((uint32_t)bin << HISTOGRAM_SHIFT | SIGN);
    return NAN;
}

// What is chosen of a row's free scores: all of them, or what a limit takes of those kept in the scratch.
struct Choice { bool whole; int64_t kept; Limit limit; };

static Choice choose_count(const Row& r, int64_t wanted, const Scratch& s) {
    if (wanted >= r.free_count()) return {true, 0, {}};
    if (wanted <= 0) return {false, 0, {}};
    // A histogram counts the forced keys, too; were they all above the floor, enough others would still be.
    const float floor = r.histogram ? floor_of_histogram(r.histogram, wanted + r.forced())
                                    : floor_of_count(r.free(), r.free_count(), wanted, s);
    int64_t kept = keep(r.free(), r.free_count(), floor, (int32_t)r.head, s);
    if (kept < wanted) kept = keep(r.free(), r.free_count(), NAN, (int32_t)r.head, s);
    return {false, kept, search<false>(kept, (double)wanted, s)};
}

static Choice choose_from(const Row& r, float threshold, const Scratch& s) {
    const int64_t kept = keep(r.free(), r.free_count(), threshold, (int32_t)r.head, s);
    return {false, kept, {0, EVERY, kept, true}};
}

static Choice choose_mass(const Row& r, double needed, double left_out, const Scratch& s) {
    if (needed <= 0.0) return {false, 0, {}};
    const float floor = floor_of_mass(r.free(), r.free_count(), left_out, s);
    const int64_t kept = keep(r.free(), r.free_count(), floor, (int32_t)r.head, s);
    const Limit limit = search<true>(kept, needed, s);
    if (limit.reached || floor == LEAST_MASS) return {false, kept, limit};
    return choose_mass(r, needed, 0.0, s);
}

// SpecAttn's search (arXiv 2510.27641): the threshold that a fixed number of halvings shows to hold the mass.
static float bisect(const Row& r, double needed, float high, int steps) {
    float low = 0.0f;
    while (steps--) {
        const float middle = (float)(0.5 * ((double)low + high));
        (mass_from(r.free(), r.free_count(), middle) >= needed ? low : high) = middle;
    }
    return low;
}

// Returns whether the row's scores are masses. Where they are all 0, the newest keys are forced up to the least.
static bool choose_share(const Arguments& a, Row& r, const Scratch& s, Choice* choice) {
    const Masses head = look_at(r.scores, r.head), free = look_at(r.free(), r.free_count());
    const Masses tail = look_at(r.scores + r.tail, r.prefix - r.tail);
    if (!head.valid || !free.valid || !tail.valid) return false;
    const double forced = mass_from(r.scores, r.head, 0.0f) + mass_from(r.scores + r.tail, r.prefix - r.tail, 0.0f);
    const double all = forced + mass_from(r.free(), r.free_count(), 0.0f), target = a.share * all;
    if (all == 0.0) {
        r.tail = larger(r.head, smaller(r.tail, r.prefix - (r.least - r.head)));
        return true;
    }
    if (a.bisection_steps) *choice = choose_from(r, bisect(r, target - forced, free.largest, a.bisection_steps), s);
    else if (a.share < 1.0) *choice = choose_mass(r, target - forced, all - target, s);
    else *choice = choose_from(r, LEAST_MASS, s);
    const int64_t taken = r.forced() + choice->limit.taken;
    if (taken < r.least) *choice = choose_count(r, r.least - r.forced(), s);
    if (taken > r.most) *choice = choose_count(r, r.most - r.forced(), s);
    return true;
}

static int64_t write_run(int32_t* out, int64_t taken, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j++) out[taken++] = (int32_t)j;
    return taken;
}

// Where the paged cache holds the chosen columns; -1 for one whose page the table does not name.
template <typename Slot> static void write_slots(const Arguments& a, const int32_t* table, const int32_t* indices,
                                                 int64_t taken, Slot* slots) {
    int64_t page = 0, first = -1;  // of the cache, or -1; and the first index in the table's page
    for (int64_t i = 0; i < taken; i++) {
        if (first < 0 || indices[i] >= first + a.slots_per_page) {
            const int64_t entry = indices[i] / a.slots_per_page;
            first = entry * a.slots_per_page;
            page = entry < a.pages ? table[entry] : -1;
        }
        slots[i] = (Slot)(page < 0 ? -1 : page * a.slots_per_page + indices[i] - first);
    }
    memset(slots + taken, -1, (a.width - taken) * sizeof(Slot));
}

// Writes the ascending indices that one row of scores selects; returns how many, or -1 where its scores are no masses.
static int64_t select_row(const Arguments& a, int64_t item, const Scratch& s, int32_t* out) {
    Row r = describe(a, item);
    Choice choice = {};
    bool valid = true;
    if (a.policy == TOP_K) choice = choose_count(r, r.most - r.forced(), s);
    else if (a.policy == THRESHOLD) choice = choose_from(r, r.threshold, s);
    else valid = choose_share(a, r, s, &choice);
    if (!valid) return -1;
    int64_t taken = write_run(out, 0, 0, r.head);
    if (choice.whole) taken = write_run(out, taken, r.head, r.tail);
    else taken += emit(choice.kept, choice.limit, s, out + taken);
    return write_run(out, taken, r.tail, r.prefix);
}

// Which of eight columns are members, a bit for each: the product moves the lowest bit of byte i to bit 56 + i.
static inline uint32_t eight_members(const uint8_t* members) {
    uint64_t bytes;
    memcpy(&bytes, members, 8);
    return (uint32_t)(bytes * 0x0102040810204080ull >> 56);
}

static int64_t write_members(const Arguments& a, const uint8_t* members, int32_t* out) {
    int64_t taken = 0, i = 0;
    for (; i < a.columns && taken + LANES <= a.width; i += LANES) {
        uint32_t take = eight_members(members + i);
        if (LANES == 16) take |= eight_members(members + i + 8) << 8;
        store(out + taken, pack_lanes(take, (int32_t)i));
        taken += __builtin_popcount(take);
    }
    for (; i < a.columns; i += 8)
        for (uint32_t take = eight_members(members + i); take; take &= take - 1)
            out[taken++] = (int32_t)i + __builtin_ctz(take);
    return taken;
}

// The same for what any of some neighbouring rows selects.
static int64_t select_united(const Arguments& a, int64_t first_item, const Scratch& s, int32_t* out) {
    memset(s.members, 0, member_bytes(a));
    for (int64_t item = first_item; item < first_item + a.united; item++) {
        const int64_t taken = select_row(a, item, s, s.row);
        if (taken < 0) return -1;
        for (int64_t i = 0; i < taken; i++) s.members[s.row[i]] = 1;
    }
    return write_members(a, s.members, out);
}

// Returns whether the scores were such as the policy takes.
static bool select_item(const Arguments& a, int64_t item, const Scratch& s) {
    int32_t* out = a.indices + item * a.width;
    const int64_t selected = a.united > 1 ? select_united(a, item * a.united, s, out) : select_row(a, item, s, out);
    const int64_t taken = larger(0, selected);
    memset(out + taken, -1, (a.width - taken) * sizeof(int32_t));
    a.counts[item] = (int32_t)taken;
    if (a.slots) {
        const int32_t* table = a.page_table + item * a.united / a.rows % a.batch * a.table_request;
        if (a.slot_bytes == 8) write_slots(a, table, out, taken, (int64_t*)a.slots + item * a.width);
        else write_slots(a, table, out, taken, (int32_t*)a.slots + item * a.width);
    }
    return selected >= 0;
}

constexpr int64_t SCORES_PER_THREAD = 64 << 10;  // a thread is worth waking for about 20 microseconds of work

static int useful_threads(const Arguments& a) {
    const int64_t rows = (int64_t)a.layers * a.batch * a.rows;
    return (int)smaller(smaller(a.threads, larger(rows / a.united, 1)), 1 + rows * a.columns / SCORES_PER_THREAD);
}

extern "C" int64_t workspace_bytes(const Arguments* a) { return useful_threads(*a) * scratch_bytes(*a); }

// Returns 0, or 1 where a share of the mass was asked for and a row holds a negative score or one that is not finite.
extern "C" int run(const Arguments* arguments) {
    const Arguments& a = *arguments;
    const int64_t items = (int64_t)a.layers * a.batch * a.rows / a.united;
    int invalid = 0;
#pragma omp parallel num_threads(useful_threads(a)) reduction(| : invalid)
    {
        const Scratch s = scratch_of(a, omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < items; item++) invalid |= !select_item(a, item, s);
    }
    return invalid;
}
