// Top-k selection over attention scores: exact on every input, ties to the smaller index, indices ascending.
//
// A radix select over the order-preserving integers of the scores finds the k-th largest; each pass looks only at the
// candidates that share the bits found so far. One last pass over the row emits indices. A task is one row.
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <immintrin.h>

// ---- the plan ----
constexpr int RADIX_BITS = 11;
constexpr int BUCKETS = 1 << RADIX_BITS;

constexpr int SLACK = 16;  // elements a vector store may write past the last one that counts

struct Arguments {
    const float* scores;         // [batch, rows, columns]
    const int32_t* prefix_lens;  // [batch]
    int32_t *indices, *counts;   // [batch, rows, width], [batch, rows]
    char* workspace;
    int64_t score_request, score_row, index_request, index_row, count_request;  // strides, in elements
    int64_t fixed_k, ratio_ppm, min_k, max_k;  // fixed_k is 0 where the budget is a ratio of the prefix
    int32_t batch, rows, columns, width, sink, recent, threads;
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t budget_of(const Arguments& a, int64_t prefix) {
    if (a.fixed_k) return smaller(a.fixed_k, prefix);
    const int64_t wanted = (a.ratio_ppm * prefix + 999999) / 1000000;
    return smaller(smaller(larger(wanted, a.min_k), a.max_k), prefix);
}

// Integers in the order of the scores: NaN below -infinity, -0 equal to +0.
static inline uint32_t ordered(float score) {
    uint32_t bits;
    memcpy(&bits, &score, 4);
    if (score != score) return 0;
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline __m512i ordered(__m512 scores) {
    const __m512i sign = _mm512_set1_epi32((int)0x80000000u);
    __m512i bits = _mm512_castps_si512(scores);
    bits = _mm512_maskz_mov_epi32(_mm512_cmpneq_epi32_mask(bits, sign), bits);
    const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign);
    return _mm512_maskz_xor_epi32(_mm512_cmp_ps_mask(scores, scores, _CMP_ORD_Q), bits, flip);
}

struct Scratch {
    uint32_t *keys, *candidates;
    int32_t* chosen;
    uint32_t* histogram;  // four interleaved copies, so that equal neighbours do not wait for each other
};

static int64_t scratch_bytes(const Arguments& a) {
    return ((int64_t)(2 * a.columns + a.width + 3 * SLACK) * 4 + BUCKETS * 16 + 63) / 64 * 64;
}

static Scratch scratch_of(const Arguments& a, int thread) {
    uint32_t* at = (uint32_t*)(a.workspace + thread * scratch_bytes(a));
    Scratch s;
    s.histogram = at;
    s.keys = at + 4 * BUCKETS;
    s.candidates = s.keys + a.columns + SLACK;
    s.chosen = (int32_t*)(s.candidates + a.columns + SLACK);
    return s;
}

// The k-th largest of keys[0 .. count) and how many equal to it belong to the k.
struct Threshold { uint32_t key; int64_t ties; };

static Threshold kth_largest(const Scratch& s, int64_t count, int64_t k) {
    const uint32_t* keys = s.keys;
    uint32_t found = 0;
    for (int shift = 32; shift > 0;) {
        const int bits = shift < RADIX_BITS ? shift : RADIX_BITS;
        shift -= bits;
        const uint32_t mask = (1u << bits) - 1;
        memset(s.histogram, 0, BUCKETS * 16);
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            s.histogram[(keys[i] >> shift & mask) * 4]++;
            s.histogram[(keys[i + 1] >> shift & mask) * 4 + 1]++;
            s.histogram[(keys[i + 2] >> shift & mask) * 4 + 2]++;
            s.histogram[(keys[i + 3] >> shift & mask) * 4 + 3]++;
        }
        for (; i < count; i++) s.histogram[(keys[i] >> shift & mask) * 4]++;
        uint32_t bucket = mask;
        for (;; bucket--) {
            const uint32_t* h = s.histogram + bucket * 4;
            const int64_t in_bucket = (int64_t)h[0] + h[1] + h[2] + h[3];
            if (in_bucket >= k) break;
            k -= in_bucket;
        }
        found |= bucket << shift;
        int64_t kept = 0;  // candidates move in place after the first pass: kept never overtakes i
        i = 0;
        const __m512i wanted = _mm512_set1_epi32((int)bucket), all = _mm512_set1_epi32((int)mask);
        for (; i + 16 <= count; i += 16) {
            const __m512i key = _mm512_loadu_si512(keys + i);
            const __m512i digit = _mm512_and_epi32(_mm512_srli_epi32(key, shift), all);
            const __mmask16 keep = _mm512_cmpeq_epi32_mask(digit, wanted);
            _mm512_storeu_si512(s.candidates + kept, _mm512_maskz_compress_epi32(keep, key));
            kept += __builtin_popcount(keep);
        }
        for (; i < count; i++) {
            const uint32_t key = keys[i];
            s.candidates[kept] = key;
            kept += (key >> shift & mask) == bucket;
        }
        keys = s.candidates;
        count = kept;
    }
    return {found, k};
}

// Appends first + i, ascending, for the keys above the threshold and the first `ties` equal to it; returns the count.
static int64_t emit(const uint32_t* keys, int64_t count, Threshold threshold, int32_t first, int32_t* chosen) {
    int64_t taken = 0, i = 0;
    const __m512i limit = _mm512_set1_epi32((int)threshold.key);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= count; i += 16) {
        const __m512i key = _mm512_loadu_si512(keys + i);
        uint32_t take = _mm512_cmpgt_epu32_mask(key, limit);
        uint32_t equal = _mm512_cmpeq_epi32_mask(key, limit);
        while (equal && threshold.ties) {
            take |= equal & -equal;
            equal &= equal - 1;
            threshold.ties--;
        }
        const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(first + (int32_t)i));
        _mm512_storeu_si512(chosen + taken, _mm512_maskz_compress_epi32((__mmask16)take, index));
        taken += __builtin_popcount(take);
    }
    for (; i < count; i++) {
        const bool equal = keys[i] == threshold.key && threshold.ties > 0;
        threshold.ties -= equal;
        chosen[taken] = first + (int32_t)i;
        taken += keys[i] > threshold.key || equal;
    }
    return taken;
}

static void select_row(const Arguments& a, int request, int row, const Scratch& s) {
    const int64_t prefix = larger(0, smaller(a.prefix_lens[request], a.columns));
    const int64_t head = smaller(a.sink, prefix), tail = larger(head, prefix - a.recent);
    // Forced are [0, head) and [tail, prefix); the rest of the budget is for those between.
    const int64_t wanted = smaller(larger(0, budget_of(a, prefix) - head - (prefix - tail)), tail - head);
    const float* scores = a.scores + request * a.score_request + row * a.score_row + head;
    int32_t* chosen = s.chosen;
    int64_t taken = 0;
    for (int64_t j = 0; j < head; j++) chosen[taken++] = (int32_t)j;
    if (wanted == tail - head) {
        for (int64_t j = head; j < tail; j++) chosen[taken++] = (int32_t)j;
    } else if (wanted > 0) {
        int64_t i = 0;
        for (; i + 16 <= tail - head; i += 16) _mm512_storeu_si512(s.keys + i, ordered(_mm512_loadu_ps(scores + i)));
        for (; i < tail - head; i++) s.keys[i] = ordered(scores[i]);
        taken += emit(s.keys, tail - head, kth_largest(s, tail - head, wanted), (int32_t)head, chosen + taken);
    }
    for (int64_t j = tail; j < prefix; j++) chosen[taken++] = (int32_t)j;
    int32_t* out = a.indices + request * a.index_request + row * a.index_row;
    memcpy(out, chosen, taken * 4);
    for (int64_t j = taken; j < a.width; j++) out[j] = -1;
    a.counts[request * a.count_request + row] = (int32_t)taken;
}

constexpr int64_t SCORES_PER_THREAD = 16 << 10;  // a thread is worth waking for about 10 microseconds of work

static int useful_threads(const Arguments& a) {
    return (int)smaller(a.threads, 1 + (int64_t)a.batch * a.rows * a.columns / SCORES_PER_THREAD);
}

extern "C" int64_t workspace_bytes(const Arguments* a) { return a->threads * scratch_bytes(*a); }

// Always returns 0: every processor runs it.
extern "C" int run(const Arguments* arguments) {
    const Arguments& a = *arguments;
#pragma omp parallel num_threads(useful_threads(a))
    {
        const Scratch s = scratch_of(a, omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < (int64_t)a.batch * a.rows; item++)
            select_row(a, (int)(item / a.rows), (int)(item % a.rows), s);
    }
    return 0;
}
