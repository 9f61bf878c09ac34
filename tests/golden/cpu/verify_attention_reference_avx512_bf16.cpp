// Verification attention: causal attention of a few rows per request over its whole paged KV cache
// that also emits one score per KV head and prefix key, the mean softmax weight
// over all rows and the head group.
//
// A task is one KV head (or all of them) over split_keys keys. Splits have a fixed length, so a row's result does not
// depend on the other requests of its batch nor on the number of threads.
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <immintrin.h>

static inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

// Conversions round to nearest, ties to even.
template <typename T> static inline T from_float(float x);
static inline float to_float(float x) { return x; }
template <> inline float from_float<float>(float x) { return x; }

struct bf16 { uint16_t bits; };
static inline float to_float(bf16 x) { return from_bits((uint32_t)x.bits << 16); }
template <> inline bf16 from_float<bf16>(float x) {
    const uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16{0x7fc0};
    return bf16{(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- the model's heads ----
constexpr int NUM_Q_HEADS = 32;
constexpr int NUM_KV_HEADS = 8;
constexpr int GROUP = NUM_Q_HEADS / NUM_KV_HEADS;
constexpr int HEAD_DIM = 128;
constexpr int V_HEAD_DIM = 128;
constexpr float LOG2_E = 1.44269504f;
constexpr float Q_SCALE = 0.0883883476f * LOG2_E;  // logits are kept in base 2
typedef bf16 Element;  // of q and out
typedef bf16 Cached;  // of the KV cache

// ---- the plan ----
constexpr int KEY_TILE = 64;
constexpr int HEADS_PER_TASK = NUM_KV_HEADS;

// ---- vectors: avx512-bf16 ----

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(LANES * 4), may_alias));

static inline Vec splat(float x) { return x - Vec{}; }
static inline Vec load(const float* p) { Vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

static inline Vec load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)p);
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline Vec round_to_int(Vec x) { return (Vec)_mm512_roundscale_ps((__m512)x, 0); }
static inline Vec times_power_of_two(Vec x, Vec n) { return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n); }

// Sums each of 16 vectors; lane i of the result is the sum of v[i].
static inline Vec sum_each(const Vec* v) {
    __m512 quads[4];  // quads[i] holds, in each 128-bit lane, partial sums of v[4i .. 4i+3]
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 a = v[4 * i], b = v[4 * i + 1], c = v[4 * i + 2], d = v[4 * i + 3];
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
        quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
    }
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                                     _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                                      _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
    return (Vec)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

static inline float largest(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
static inline float total(Vec v) { return _mm512_reduce_add_ps((__m512)v); }

// Writes KEY_TILE numbers past the caches, where nothing reads them soon, to an address that is a multiple of 64.
template <typename T> static inline void store_far(T* to, const T* from) {
    for (int j = 0; j < KEY_TILE; j += 64 / (int)sizeof(T))
        _mm512_stream_si512((__m512i*)(to + j), _mm512_loadu_si512(from + j));
}

// Other threads see what was stored far once they see what is written after this.
static inline void fence_far() { _mm_sfence(); }

// 2^x within 2 units in the last place for x <= 0; anything under -150, -infinity included, gives 0.
static inline Vec exp2_of(Vec x) {
    x = x < splat(-151.0f) ? splat(-151.0f) : x;       // NaN stays NaN
    const Vec whole = round_to_int(x), f = x - whole;  // |f| <= 1/2
    Vec p = splat(1.535336206e-4f);                    // minimax on [-1/2, 1/2] with p(0) = 1, error under 2^-28
    p = multiply_add(p, f, splat(1.339887459e-3f));
    p = multiply_add(p, f, splat(9.618437359e-3f));
    p = multiply_add(p, f, splat(5.550332471e-2f));
    p = multiply_add(p, f, splat(2.402264791e-1f));
    p = multiply_add(p, f, splat(6.931472029e-1f));
    p = multiply_add(p, f, splat(1.0f));
    return times_power_of_two(p, whole);
}

// The last, partly filled vector of a row; lanes past the end are 0.
template <int COUNT, typename T> static inline Vec load_first(const T* p) {
    if constexpr (COUNT >= LANES) return load(p);
    float lanes[LANES] = {};
    for (int i = 0; i < COUNT; i++) lanes[i] = to_float(p[i]);
    return load(lanes);
}

constexpr int D_VECS = (HEAD_DIM + LANES - 1) / LANES, D_PADDED = D_VECS * LANES;
constexpr int DV_VECS = (V_HEAD_DIM + LANES - 1) / LANES, DV_PADDED = DV_VECS * LANES;
constexpr int D_LAST = HEAD_DIM - (D_VECS - 1) * LANES, DV_LAST = V_HEAD_DIM - (DV_VECS - 1) * LANES;

struct Arguments {
    const Element* q;
    const Cached *k, *v;
    Element* out;
    float *lse, *scores;
    int32_t* histogram;
    const float *sinks, *lse_ref, *k_scale, *v_scale;
    const int32_t *page_table, *kv_lens, *cu_q, *indices, *counts;
    const void* slots;  // of slot_bytes, at the strides of indices; null where the page table says where keys are
    const int32_t *tail_start, *mode;
    char* workspace;
    int64_t q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, out_row, out_head;  // strides, in elements
    int64_t table_row, score_request, score_row, index_request, index_row, k_scale_head, v_scale_head;
    int32_t batch, num_pages, page_size, max_q, max_kv, selected_width;
    int32_t block, slot_bytes, split_keys, threads;  // block: keys per index; split_keys: a multiple of KEY_TILE
    mutable int32_t stray_page;  // whether some key's entry in the page table named no page of the cache
};

// Of floats too, where fminf and fmaxf would be calls into a library; NaN only where b is.
template <typename T> static inline T smaller(T a, T b) { return a < b ? a : b; }
template <typename T> static inline T larger(T a, T b) { return a > b ? a : b; }
static constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One request's rows and the virtual range of keys they go over.
struct Request {
    int first_row, rows, kv_len, first_position;  // first_position may be negative: such rows see nothing
    int first_key;  // keys before it are outside every row's window; a multiple of KEY_TILE
};

static Request request_of(const Arguments& a, int index) {
    Request r;
    r.first_row = a.cu_q[index];
    r.rows = a.cu_q[index + 1] - r.first_row;
    r.kv_len = larger(0, a.kv_lens[index]);
    r.first_position = r.kv_len - r.rows;
    r.first_key = 0;
    return r;
}

// KV heads that one task goes over: all of them, so that memory is read in order.
static inline int heads_per_task(const Request&) { return HEADS_PER_TASK; }

// Keys a request goes over: all that some row may see.
static int keys_of(const Arguments&, const Request& r, int, int) {
    if (r.rows <= 0 || r.kv_len <= 0) return 0;
    return r.kv_len - r.first_key;
}

constexpr int SCORE_ROWS = NUM_KV_HEADS;  // of a request

// ---- scored rows: all of them ----

static inline int scored_rows(int rows) { return rows; }
static inline int scored_row(int index, int) { return index; }

// ---- the tile: KEY_TILE keys against every packed row of one KV head ----

struct Tile {
    const Cached *k[KEY_TILE], *v[KEY_TILE];  // of the task's first head
    int position[KEY_TILE];
    int count;
    bool masked;  // whether some row does not see some key
};

struct Task {
    int request, first_head, unit, begin, end;  // begin and end count in the request's virtual keys
};

// The page that an entry of the page table names; where the cache has no such page its first, and the call fails.
static inline int64_t page_of(const Arguments& a, int32_t entry) {
    if ((uint32_t)entry < (uint32_t)a.num_pages) return entry;
    __atomic_store_n(&a.stray_page, 1, __ATOMIC_RELAXED);
    return 0;
}

static inline void set_key(
    const Arguments& a, const Task& task, Tile& tile, int j, int position, int64_t page, int64_t slot
) {
    tile.position[j] = position;
    tile.k[j] = a.k + task.first_head * a.k_head + page * a.k_page + slot * a.k_slot;
    tile.v[j] = a.v + task.first_head * a.v_head + page * a.v_page + slot * a.v_slot;
}

static void locate_in_order(const Arguments& a, const Request& r, const Task& task, int begin, Tile& tile) {
    const int32_t* pages = a.page_table + task.request * a.table_row;
    int page_index = (r.first_key + begin) / a.page_size, slot = (r.first_key + begin) % a.page_size;
    for (int j = 0; j < tile.count; j++) {
        set_key(a, task, tile, j, r.first_key + begin + j, page_of(a, pages[page_index]), slot);
        if (++slot == a.page_size) slot = 0, page_index++;
    }
}

static void locate(const Arguments& a, const Request& r, const Task& task, int begin, Tile& tile) {
    tile.count = smaller(KEY_TILE, task.end - begin);
    locate_in_order(a, r, task, begin, tile);
    int newest = 0;
    for (int j = 0; j < tile.count; j++) newest = larger(newest, tile.position[j]);
    for (int j = tile.count; j < KEY_TILE; j++) {  // padding: readable memory that the mask then hides
        tile.position[j] = INT32_MAX;
        tile.k[j] = tile.k[0];
        tile.v[j] = tile.v[0];
    }
    tile.masked = tile.count < KEY_TILE || newest > r.first_position;
}

// Some keys' rows of K, or of V, of one head, and those to fetch while one works on them.
struct Strip {
    const Cached *here[KEY_TILE], *ahead[KEY_TILE];
    int begin, count;  // which keys of the tile
};

static inline void set_rows(const Cached* const* keys, int64_t offset, int count, const Cached** rows) {
    for (int j = 0; j < count; j++) rows[j] = keys[j] + offset;
}

constexpr int LINE = 64 / (int)sizeof(Cached);  // elements of a cache line

// What is fetched waits in the second-level cache: a tile of every head is larger than the first.
// Inlined by force, as all that calls it: GCC drops calls of a function that does nothing but prefetch.
static inline __attribute__((always_inline)) void fetch_line(const Cached* line) {
    __builtin_prefetch(line, 0, 2);
}

struct FetchNothing {
    void read(int, int) {}
    void advance() {}
};

constexpr int ABREAST = 1;  // rows fetched together, line by line

template <int ELEMENTS> static inline __attribute__((always_inline)) void fetch_rows(const Cached* const* rows) {
#pragma GCC unroll 16
    for (int at = 0; at < ELEMENTS; at += LINE)
#pragma GCC unroll 8
        for (int row = 0; row < ABREAST; row++) fetch_line(rows[row] + at);
}

// Fetches the next tile's rows evenly over `blocks` blocks of work, as few lines can be under way at once.
template <int ELEMENTS> struct Fetcher {
    static constexpr int STEPS = KEY_TILE / ABREAST;

    const Cached* const* rows;
    uint32_t steps_per_block, due = 0, done = 0;  // the first two in units of 2^-16 steps

    Fetcher(const Strip& strip, int blocks)
        : rows(strip.ahead), steps_per_block(((uint32_t)STEPS << 16) / (uint32_t)blocks + 1) {}

    // After each block.
    __attribute__((always_inline)) void advance() {
        due += steps_per_block;
        for (; done < due >> 16 && done < STEPS; done++) fetch_rows<ELEMENTS>(rows + done * ABREAST);
    }

    void read(int, int) {}
};

// Fetches each line of the next tile when the same line of this one is read, which happens once a line: memory then
// works all the while that the products do. A strip's rows fetched in one go took one row a tenth more time on an AMD
// EPYC of 2026-11 (Zen 4).
struct Beside {
    const Cached* const* rows;

    explicit Beside(const Strip& strip) : rows(strip.ahead) {}

    // With the vector that begins at element `at` of the strip's row j.
    __attribute__((always_inline)) void read(int j, int at) {
        if (at % LINE == 0) fetch_line(rows[j] + at);
    }

    void advance() {}
};

// Calls work(what fetches beside it) for a block of rows: lines of a strip are fetched with the first block that reads
// them.
template <typename Fetching, typename Work>
static inline __attribute__((always_inline)) void fetching_beside(Fetching& fetcher, int first_row, Work work) {
    FetchNothing nothing;
    if (!std::is_same<Fetching, Beside>::value || first_row == 0) work(fetcher);
    else work(nothing);
}

// ---- the order in which a tile is read ----
//
// Memory is read fastest as it lies: all heads of a key, then the next key. Where rows are few, the running results of
// every head stay in the first-level cache, and a task takes all its heads for one strip of keys before the next strip.
// Where they are many it takes its heads one by one, each over the whole tile. On an AMD EPYC of 2026-11 (Zen 4) strips
// of 8 keys took one row 15 to 25 % less time, beside near results; strips of 16 half of that.

constexpr int NEAR_ROWS = (32 << 10) / (DV_PADDED * (int)sizeof(float));  // packed rows whose results stay near
constexpr int STRIP_KEYS = 8;

// ---- the engine: dot products of bfloat16 pairs ----
//
// A pair is two dims of a key in the first product, two keys of a dim in the second. Where rows are many, keys are
// transposed once per tile, so that a lane is a key and no sum runs across lanes.

constexpr int ROW_PAD = 1;  // packed rows of a head are padded to a multiple of this
constexpr int D_STEPS = (HEAD_DIM + 31) / 32, D_PAIRS = D_STEPS * 16;

struct Scratch {
    uint32_t* q;       // [HEADS_PER_TASK, row, D_PAIRS]
    uint32_t* k;       // [D_PAIRS, KEY_TILE]
    float* logits;     // [row, KEY_TILE]
    Element* weights;  // [row, KEY_TILE]
    float* rescale;    // [row]

    // The place of a head whose rows come after `rows` of other heads.
    Scratch after(int64_t rows) const {
        Scratch s = *this;
        s.logits += rows * KEY_TILE;
        s.weights += rows * KEY_TILE;
        s.rescale += rows;
        return s;
    }
};

// Packed rows whose logits wait at once: one head's, or all heads' where they are few.
static inline int64_t waiting_rows(int rows) { return larger(rows, smaller(HEADS_PER_TASK * rows, NEAR_ROWS)); }

static int64_t scratch_of(int rows, char* memory, Scratch& s) {
    char* at = memory;
    auto take = [&](int64_t bytes) {
        char* p = at;
        at += (bytes + 63) / 64 * 64;
        return p;
    };
    s.q = (uint32_t*)take((int64_t)HEADS_PER_TASK * rows * D_PAIRS * 4);
    s.k = (uint32_t*)take((int64_t)D_PAIRS * KEY_TILE * 4);
    s.logits = (float*)take(waiting_rows(rows) * KEY_TILE * 4);
    s.weights = (Element*)take(waiting_rows(rows) * KEY_TILE * sizeof(Element));
    s.rescale = (float*)take(waiting_rows(rows) * 4);
    return at - memory;
}

static void pack_row(const Element* from, int row, const Scratch& s) {
    uint32_t* to = s.q + (int64_t)row * D_PAIRS;
    memset(to, 0, D_PAIRS * 4);
    memcpy(to, from, HEAD_DIM * sizeof(Element));
}

// Transposes 16 rows of 16 elements of 32 bits.
static inline void transpose(__m512i* rows) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {  // row i of each 128-bit lane, lanes still to be gathered from the four b[. + i]
        const __m512i low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
        rows[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
        rows[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        rows[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

// 32 elements of two rows -> pairs of them: elements 0-15 (`half` 0) or 16-31 (`half` 1).
static inline __m512i interleave(__m512i even, __m512i odd, int half) {
    const __m512i low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(even, half ? _mm512_add_epi16(low, _mm512_set1_epi16(16)) : low, odd);
}

// Elements [d, d + 32) of a row of ELEMENTS; those past its end are 0.
template <int ELEMENTS> static inline __m512i load_pairs(const Element* row, int d) {
    if (ELEMENTS - d >= 32) return _mm512_loadu_si512(row + d);
    return _mm512_maskz_loadu_epi16((1u << (ELEMENTS - d) % 32) - 1, row + d);
}

static inline Vec multiply_add_pairs(Vec sum, __m512i a, __m512i b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

static void transpose_keys(const Cached* const* keys, const Scratch& s, Fetcher<HEAD_DIM>& fetcher) {
    for (int key = 0; key < KEY_TILE; key += 16)
        for (int step = 0; step < D_STEPS; step++) {
            fetcher.advance();
            __m512i rows[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++) rows[j] = load_pairs<HEAD_DIM>(keys[key + j], step * 32);
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(s.k + (step * 16 + i) * KEY_TILE + key, rows[i]);
        }
}

// Packed rows go through in blocks of 8, then 4, 2 and 1.
template <int COUNT> struct RowBlock {
    static constexpr int ROWS = COUNT;
    int first;
};

static inline int row_blocks(int rows) { return rows / 8 + (rows >> 2 & 1) + (rows >> 1 & 1) + (rows & 1); }

template <typename Work> static inline void for_row_blocks(int rows, Work work) {
    int first = 0;
    for (; first + 8 <= rows; first += 8) work(RowBlock<8>{first});
    if (rows & 4) { work(RowBlock<4>{first}); first += 4; }
    if (rows & 2) { work(RowBlock<2>{first}); first += 2; }
    if (rows & 1) work(RowBlock<1>{first});
}

// Rows that are multiplied with keys as they lie, which costs a sum across lanes per row and key, but no transposing.
constexpr int DIRECT_ROWS = 4;

// Keys that rows can be multiplied with at once: a block of r rows takes LANES / r of them directly.
static inline int least_strip(int rows) {
    if (rows > DIRECT_ROWS) return KEY_TILE;
    return rows & 1 ? LANES : rows & 2 ? LANES / 2 : LANES / 4;
}

// Logits of ROWS packed rows against LANES / ROWS keys, the strip's from `first` on; as many accumulators as lanes,
// summed together at the end.
template <int ROWS, typename Fetching>
static inline __attribute__((always_inline)) void dot_block(
    const uint32_t* q, const Cached* const* k, int first, float* logits, Fetching& fetcher
) {
    constexpr int KEYS = LANES / ROWS;
    Vec sums[LANES] = {};
#pragma GCC unroll 1
    for (int step = 0; step < D_STEPS; step++) {
        __m512i key[KEYS];
#pragma GCC unroll 16
        for (int j = 0; j < KEYS; j++) {
            key[j] = load_pairs<HEAD_DIM>(k[first + j], step * 32);
            fetcher.read(first + j, step * 32);
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const __m512i row = _mm512_loadu_si512(q + r * D_PAIRS + step * 16);
#pragma GCC unroll 16
            for (int j = 0; j < KEYS; j++) sums[r * KEYS + j] = multiply_add_pairs(sums[r * KEYS + j], key[j], row);
        }
    }
    float flat[LANES];
    store(flat, sum_each(sums) * splat(Q_SCALE));
    for (int r = 0; r < ROWS; r++) memcpy(logits + r * KEY_TILE, flat + r * KEYS, KEYS * sizeof(float));
}

// Logits of ROWS packed rows against 32 transposed keys at a time.
template <int ROWS>
static inline void dot_rows(const uint32_t* q, const uint32_t* k, float* logits, Fetcher<HEAD_DIM>& fetcher) {
    for (int key = 0; key < KEY_TILE; key += 2 * LANES) {
        Vec sums[ROWS][2] = {};
#pragma GCC unroll 2
        for (int pair = 0; pair < D_PAIRS; pair++) {
            if (pair % 16 == 0) fetcher.advance();
            const __m512i low = _mm512_loadu_si512(k + pair * KEY_TILE + key);
            const __m512i high = _mm512_loadu_si512(k + pair * KEY_TILE + key + LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const __m512i row = _mm512_set1_epi32(q[r * D_PAIRS + pair]);
                sums[r][0] = multiply_add_pairs(sums[r][0], low, row);
                sums[r][1] = multiply_add_pairs(sums[r][1], high, row);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            store(logits + r * KEY_TILE + key, sums[r][0] * splat(Q_SCALE));
            store(logits + r * KEY_TILE + key + LANES, sums[r][1] * splat(Q_SCALE));
        }
    }
}

// acc = acc * rescale + weights x V for ROWS rows and VECS vectors of V from vector `first`, which is even, on.
template <int ROWS, int VECS, typename Fetching>
static inline __attribute__((always_inline)) void weigh_block(
    float* acc, const float* rescale, const Element* weights, const Cached* const* v, int count, int first,
    Fetching& fetcher
) {
    Vec sums[ROWS][VECS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < VECS; c++) sums[r][c] = load(acc + r * DV_PADDED + (first + c) * LANES) * splat(rescale[r]);
#pragma GCC unroll 1
    for (int j = 0; j < count; j += 2) {  // where count is odd, the last key's partner has weight 0
        fetcher.advance();
        __m512i value[VECS];
#pragma GCC unroll 4
        for (int c = 0; c < VECS; c++) {
            const int d = (first + c) / 2 * 32;
            const __m512i even = load_pairs<V_HEAD_DIM>(v[j], d), odd = load_pairs<V_HEAD_DIM>(v[j + 1], d);
            value[c] = interleave(even, odd, c & 1);
            if (c & 1) continue;
            fetcher.read(j, d);
            fetcher.read(j + 1, d);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t both;
            memcpy(&both, weights + r * KEY_TILE + j, 4);
            const __m512i weight = _mm512_set1_epi32(both);
#pragma GCC unroll 4
            for (int c = 0; c < VECS; c++) sums[r][c] = multiply_add_pairs(sums[r][c], value[c], weight);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < VECS; c++) store(acc + r * DV_PADDED + (first + c) * LANES, sums[r][c]);
}

// 16 accumulators: 8 rows x 2 vectors, as what V is interleaved for then serves more rows, else 4 x 4.
template <int ROWS, typename Fetching>
static inline __attribute__((always_inline)) void weigh_rows(
    float* acc, const float* rescale, const Element* weights, const Cached* const* v, int count, Fetching& fetcher
) {
    constexpr int VECS = ROWS == 8 ? 2 : 4, LAST = (DV_VECS - 1) / VECS * VECS;
    for (int first = 0; first < LAST; first += VECS)
        weigh_block<ROWS, VECS>(acc, rescale, weights, v, count, first, fetcher);
    weigh_block<ROWS, DV_VECS - LAST>(acc, rescale, weights, v, count, LAST, fetcher);
}

// Hides what a row does not see.
static void finish_logits(const Request& r, const Tile& tile, const Scratch& s) {
    float* logits = s.logits;
    if (!tile.masked) return;
    for (int row = 0; row < r.rows * GROUP; row++) {
        const int last = r.first_position + row / GROUP;
        for (int j = 0; j < KEY_TILE; j++)
            if (tile.position[j] > last) logits[row * KEY_TILE + j] = -INFINITY;
    }
}

// Turns a tile's logits into weights relative to each row's running maximum; updates maximum, sum and rescale.
static void soften(const Scratch& s, int rows, float* row_max, float* row_sum) {
    for (int row = 0; row < rows; row++) {
        const float* logits = s.logits + row * KEY_TILE;
        Element* weights = s.weights + row * KEY_TILE;
        Vec best = load(logits);
        for (int j = LANES; j < KEY_TILE; j += LANES) best = maximum(best, load(logits + j));
        const float new_max = larger(row_max[row], largest(best));
        const Vec offset = splat(new_max == -INFINITY ? 0.0f : new_max);
        Vec sum = {};
        for (int j = 0; j < KEY_TILE; j += 2 * LANES) {
            const Vec low = exp2_of(load(logits + j) - offset), high = exp2_of(load(logits + j + LANES) - offset);
            _mm512_storeu_si512(weights + j, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
            sum += low + high;
        }
        s.rescale[row] = row_max[row] == new_max ? 1.0f : exp2f(row_max[row] - new_max);
        row_sum[row] = row_sum[row] * s.rescale[row] + total(sum);
        row_max[row] = new_max;
    }
}

template <typename Fetching>
static inline __attribute__((always_inline)) void dot_directly(
    const uint32_t* q, int rows, const Cached* const* k, int keys, float* logits, Fetching fetcher
) {
    for_row_blocks(rows, [&](auto block) {
        if constexpr (block.ROWS <= DIRECT_ROWS) {
            fetching_beside(fetcher, block.first, [&](auto& fetching) __attribute__((always_inline)) {
                for (int j = 0; j < keys; j += LANES / block.ROWS) {
                    float* to = logits + block.first * KEY_TILE + j;
                    dot_block<block.ROWS>(q + block.first * D_PAIRS, k, j, to, fetching);
                    fetching.advance();
                }
            });
        }
    });
}

// The logits of one head, whose first packed row is `first`.
template <bool STRIPS>
static inline void logits_of_strip(int rows, const Strip& strip, const Scratch& s, int64_t first) {
    const uint32_t* q = s.q + first * D_PAIRS;
    float* to = s.logits + strip.begin;
    if constexpr (STRIPS) return dot_directly(q, rows, strip.here, strip.count, to, Beside(strip));
    if (rows <= DIRECT_ROWS)
        return dot_directly(q, rows, strip.here, KEY_TILE, to, Fetcher<HEAD_DIM>(strip, rows * KEY_TILE / LANES));
    Fetcher<HEAD_DIM> fetcher(strip, D_STEPS * (KEY_TILE / 16 + KEY_TILE / 32 * row_blocks(rows)));
    transpose_keys(strip.here, s, fetcher);
    for_row_blocks(rows, [&](auto block) {
        dot_rows<block.ROWS>(q + block.first * D_PAIRS, s.k, to + block.first * KEY_TILE, fetcher);
    });
}

static inline void soften_tile(const Request& r, const Scratch& s, float*, float* row_max, float* row_sum) {
    soften(s, r.rows * GROUP, row_max, row_sum);
}

// Adds a strip of a softened tile to one head's running results.
template <bool STRIPS>
static inline void weigh_strip(int rows, const Strip& strip, const Scratch& s, float* acc) {
    auto weigh = [&](auto fetcher) {
        for_row_blocks(rows, [&](auto block) {
            const Element* weights = s.weights + block.first * KEY_TILE + strip.begin;
            float* to = acc + block.first * DV_PADDED;
            fetching_beside(fetcher, block.first, [&](auto& fetching) __attribute__((always_inline)) {
                weigh_rows<block.ROWS>(to, s.rescale + block.first, weights, strip.here, strip.count, fetching);
            });
        });
    };
    if constexpr (STRIPS) {
        weigh(Beside(strip));
        for (int row = 0; row < rows; row++) s.rescale[row] = 1.0f;  // done, once a tile
    } else {
        const int wide_steps = (DV_VECS + 1) / 2 * (rows / 8);
        const int steps = (DV_VECS + 3) / 4 * (row_blocks(rows) - rows / 8);
        weigh(Fetcher<V_HEAD_DIM>(strip, (wide_steps + steps) * ((strip.count + 1) / 2)));
    }
}

static inline Vec weights_at(const Scratch& s, int row, int key) { return load(s.weights + row * KEY_TILE + key); }

static inline int64_t padded(int64_t rows) { return divide_up(rows, ROW_PAD) * ROW_PAD; }

static inline int strip_keys(int rows) { return larger(STRIP_KEYS, least_strip(rows)); }

static inline bool in_strips(int rows, int task_heads) {
    return HEADS_PER_TASK > 1 && task_heads > 1 && task_heads * rows <= NEAR_ROWS && strip_keys(rows) < KEY_TILE;
}

// ---- workspace: everything a call writes besides its outputs, in one piece of caller's memory ----

struct Workspace {
    int32_t* split_offset;  // [batch * NUM_KV_HEADS + 1] splits before each block: a request's task heads
    int32_t* unit_offset;   // [batch * NUM_KV_HEADS + 1] units before each block: a unit is one head of one split
    float* partial_acc;     // [unit, row, DV_PADDED] unnormalised outputs; a row is (query row, group member)
    float* partial_max;     // [unit, row] base-2 running maximum
    float* partial_sum;     // [unit, row]
    char* scratch;          // [thread, scratch_bytes]
    int64_t scratch_bytes, bytes;
};

// What is written more than this before it is read, by what is read and written in between, has left the caches then.
// Writing it past them, so that its lines are not read first, spared two fifths of what scores of all rows in float32
// over 32,768 keys had taken on an AMD EPYC of 2026-11 (Zen 4), and more where heads are small.
constexpr int64_t NEAR_BYTES = 24 << 20;

static Workspace plan_workspace(const Arguments& a) {
    Workspace w;
    int64_t at = 0;
    auto take = [&](int64_t bytes) {
        char* p = a.workspace + at;
        at += (bytes + 63) / 64 * 64;
        return p;
    };
    const int64_t blocks = (int64_t)a.batch * NUM_KV_HEADS;
    const int64_t longest = a.max_kv;
    const int64_t unit_rows = padded((int64_t)a.max_q * GROUP);
    const int64_t rows = blocks * divide_up(longest + KEY_TILE, a.split_keys) * unit_rows;
    w.split_offset = (int32_t*)take((blocks + 1) * 4);
    w.unit_offset = (int32_t*)take((blocks + 1) * 4);
    w.partial_max = (float*)take(rows * 4);
    w.partial_sum = (float*)take(rows * 4);
    w.partial_acc = (float*)take(rows * DV_PADDED * 4);
    Scratch unused;
    const int64_t per_row = DV_PADDED * 4 + 4, task_rows = HEADS_PER_TASK * unit_rows;
    const int64_t scratch = scratch_of(a.max_q * GROUP, nullptr, unused) + (task_rows + LANES) * per_row;
    w.scratch_bytes = divide_up(scratch, 4096) * 4096;
    w.scratch = take(w.scratch_bytes * a.threads);
    w.bytes = at;
    return w;
}

// ---- scores ----

static inline int prefix_of(const Arguments& a, const Request& r) {
    return r.rows > 0 ? larger(0, smaller(r.first_position, a.max_kv)) : 0;
}

// The scores of a request's prefix keys.
static inline float* key_scores_of(const Arguments& a, const Workspace&, int request, int row) {
    return a.scores + request * a.score_request + row * a.score_row;
}

// Whether a call reads so much that the scores it writes on the way have left the caches when somebody selects by them.
static inline bool scores_far(const Arguments& a) {
    const int64_t key = NUM_KV_HEADS * (HEAD_DIM + V_HEAD_DIM) * sizeof(Cached);
    return a.batch * (int64_t)a.max_kv * key > NEAR_BYTES;
}

// Writes the scores of a tile's first `count` keys.
static inline void store_scores(const Vec* sums, int count, bool far, float* to) {
    if (count < KEY_TILE) memcpy(to, sums, count * sizeof(float));
    else if (far && (uintptr_t)to % 64 == 0) store_far(to, (const float*)sums);
    else memcpy(to, sums, KEY_TILE * sizeof(float));
}

// Where one head's share of the scores goes: they are final.
static inline float* head_scores_of(const Arguments& a, const Workspace& w, int request, int head) {
    return key_scores_of(a, w, request, head);
}

constexpr float REFERENCE_CEILING = 64.0f;  // powers of two by which a weight may pass its reference

// The references of one head's scored rows in base 2; a row whose reference is not finite counts as nothing.
static void load_references(const Arguments& a, const Request& r, int head, float* references) {
    for (int i = 0; i < scored_rows(r.rows) * GROUP; i++) {
        const int64_t row = r.first_row + scored_row(i / GROUP, r.rows);
        const float reference = a.lse_ref[row * NUM_Q_HEADS + head * GROUP + i % GROUP];
        references[i] = fabsf(reference) < INFINITY ? reference * LOG2_E : INFINITY;
    }
}

// Scores of one tile and head: the weights at hand, each row's carried over from its running maximum to its reference.
static void score_tile(
    const Arguments& a, const Workspace& w, const Request& r, const Tile& tile, const Scratch& s, int request, int head,
    const float* row_max, const float* references
) {
    const int scored = scored_rows(r.rows) * GROUP;
    const Vec share = splat(1.0f / (scored * 1));
    Vec sums[KEY_TILE / LANES] = {};
    for (int first = 0; first < scored; first += LANES) {
        const int count = smaller(LANES, scored - first);
        const Vec excess = load(row_max + first) - load(references + first);  // rows past the last are not used
        const Vec ceiling = splat(REFERENCE_CEILING);
        float factors[LANES];
        store(factors, exp2_of(excess < ceiling ? excess : ceiling) * share);
        for (int i = 0; i < count; i++)
#pragma GCC unroll 8
            for (int v = 0; v < KEY_TILE / LANES; v++) {
                const Vec weights = weights_at(s, first + i, v * LANES);
                sums[v] = multiply_add(splat(factors[i]), weights, sums[v]);
            }
    }
    const int count = smaller(KEY_TILE, prefix_of(a, r) - tile.position[0]);
    store_scores(sums, count, scores_far(a), head_scores_of(a, w, request, head) + tile.position[0]);
}

constexpr int HISTOGRAM_BINS = 1024;

// Counts a request's scores by their upper 11 bits, of which the sign of a weight is never set.
static void count_scores(const Arguments& a, int request, int row) {
    const int prefix = prefix_of(a, request_of(a, request));
    const int columns = prefix;
    const float* scores = a.scores + request * a.score_request + row * a.score_row;
    int32_t* counts = a.histogram + ((int64_t)request * SCORE_ROWS + row) * HISTOGRAM_BINS;
    memset(counts, 0, HISTOGRAM_BINS * sizeof(int32_t));
    for (int j = 0; j < columns; j++) counts[to_bits(scores[j]) >> 21 & (HISTOGRAM_BINS - 1)]++;
}

// ---- one task: every packed row of its KV heads over one split of the keys ----

// Calls work(tile, the tile to fetch meanwhile) for every tile of a task.
template <typename Work>
static inline void for_tiles(const Arguments& a, const Request& r, const Task& task, Work work) {
    Tile tiles[2];
    locate(a, r, task, task.begin, tiles[0]);
    for (int begin = task.begin, parity = 0; begin < task.end; begin += KEY_TILE, parity ^= 1) {
        const Tile& tile = tiles[parity];
        Tile& next = tiles[parity ^ 1];
        if (begin + KEY_TILE < task.end) locate(a, r, task, begin + KEY_TILE, next);
        else next.count = 0;
        work(tile, next.count ? next : tile);
    }
}

// Calls work(strip, head) for the heads [first, first + heads) of a task over the first `count` keys of a tile, `keys`
// of them at a time; `rows` and `ahead` are its keys, or its values, and the next tile's.
template <typename Work>
static inline __attribute__((always_inline)) void for_strips(
    const Cached* const* rows, const Cached* const* ahead, int64_t head_stride, int first, int heads, int keys,
    int count, Work work
) {
    for (int begin = 0; begin < count; begin += keys)
        for (int head = first; head < first + heads; head++) {
            Strip strip;
            strip.begin = begin;
            strip.count = smaller(keys, count - begin);
            set_rows(rows + begin, head * head_stride, keys, strip.here);
            set_rows(ahead + begin, head * head_stride, keys, strip.ahead);
            work(strip, head);
        }
}

template <bool STRIPS>
static void attend_split(const Arguments& a, const Workspace& w, const Task& task, char* memory) {
    const Request r = request_of(a, task.request);
    const int rows = r.rows * GROUP, first_head = task.first_head, task_heads = heads_per_task(r);
    const int64_t head_rows = padded(rows), task_rows = task_heads * head_rows;
    Scratch s;
    // [task_rows, DV_PADDED]; the thread's own, which stays in its cache, until the split is done.
    float* acc = (float*)(memory + scratch_of(rows, memory, s));
    memset(acc, 0, task_rows * DV_PADDED * sizeof(float));
    float* references = acc + task_rows * DV_PADDED;  // [task_rows]
    for (int h = 0; h < task_heads; h++) load_references(a, r, first_head + h, references + h * head_rows);
    for (int h = 0; h < task_heads; h++)
        for (int row = 0; row < rows; row++) {
            const int query = r.first_row + row / GROUP, head = (first_head + h) * GROUP + row % GROUP;
            pack_row(a.q + query * a.q_row + head * a.q_head, (int)(h * head_rows) + row, s);
        }
    const int64_t slot = task.unit * padded((int64_t)a.max_q * GROUP);
    float *row_max = w.partial_max + slot, *row_sum = w.partial_sum + slot;
    for (int64_t row = 0; row < task_rows; row++) row_max[row] = -INFINITY, row_sum[row] = 0.0f;

    const int heads = STRIPS ? task_heads : 1, keys = STRIPS ? strip_keys(rows) : KEY_TILE;
    for_tiles(a, r, task, [&](const Tile& tile, const Tile& next) {
        for (int first = 0; first < task_heads; first += heads) {
            auto place = [&](int head) { return s.after((head - first) * rows); };
            for_strips(tile.k, next.k, a.k_head, first, heads, keys, KEY_TILE, [&](const Strip& strip, int head) {
                logits_of_strip<STRIPS>(rows, strip, place(head), head * head_rows);
            });
            for (int head = first; head < first + heads; head++) {
                const Scratch of_head = place(head);
                const int64_t at = head * head_rows;
                finish_logits(r, tile, of_head);
                soften_tile(r, of_head, acc + at * DV_PADDED, row_max + at, row_sum + at);
                if (tile.position[0] < r.first_position)
                    score_tile(
                        a, w, r, tile, of_head, task.request, first_head + head, row_max + at,
                        references + at);
            }
            for_strips(tile.v, next.v, a.v_head, first, heads, keys, tile.count, [&](const Strip& strip, int head) {
                weigh_strip<STRIPS>(rows, strip, place(head), acc + head * head_rows * DV_PADDED);
            });
        }
    });
    memcpy(w.partial_acc + slot * DV_PADDED, acc, task_rows * DV_PADDED * sizeof(float));
}

static void attend(const Arguments& a, const Workspace& w, const Task& task, char* memory) {
    const Request r = request_of(a, task.request);
    if (in_strips(r.rows * GROUP, heads_per_task(r))) attend_split<true>(a, w, task, memory);
    else attend_split<false>(a, w, task, memory);
}

// The task of one split, counted over all requests and heads.
static Task task_of(const Arguments& a, const Workspace& w, int split) {
    int block = 0;
    while (w.split_offset[block + 1] <= split) block++;
    const int request = block / NUM_KV_HEADS, index = split - w.split_offset[block];
    const Request r = request_of(a, request);
    const int task_heads = heads_per_task(r), first_head = block % NUM_KV_HEADS * task_heads;
    const int begin = index * a.split_keys, keys = keys_of(a, r, request, first_head);
    const int unit = w.unit_offset[block] + index * task_heads;
    return {request, first_head, unit, begin, smaller(keys, begin + a.split_keys)};
}

// ---- merging the splits of one query row and head ----

static void merge_row(const Arguments& a, const Workspace& w, int request, int row, int q_head) {
    const Request r = request_of(a, request);
    const int kv_head = q_head / GROUP, task_heads = heads_per_task(r);
    const int block = request * NUM_KV_HEADS + kv_head / task_heads;
    const int64_t unit_rows = padded((int64_t)a.max_q * GROUP), stride = task_heads * unit_rows;
    const int64_t first = w.unit_offset[block] * unit_rows + kv_head % task_heads * padded(r.rows * GROUP)
        + row * GROUP + q_head % GROUP;
    const int splits = w.split_offset[block + 1] - w.split_offset[block];
    float best = -INFINITY, sum = 0.0f;
    bool seen = false;
    for (int split = 0; split < splits; split++) {
        best = larger(best, w.partial_max[first + split * stride]);
        seen |= w.partial_sum[first + split * stride] != 0.0f;  // NaN counts: a row of NaN gives NaN, not nothing
    }
    if (a.sinks && seen) {
        const float sink = a.sinks[q_head] * LOG2_E;
        best = larger(best, sink);
        sum = exp2f(sink - best);
    }
    float merged[DV_PADDED] = {};
    for (int split = 0; split < splits && seen; split++) {
        const int64_t at = first + split * stride;
        const float weight = exp2f(w.partial_max[at] - best);
        const float* acc = w.partial_acc + at * DV_PADDED;
        sum += weight * w.partial_sum[at];
        for (int d = 0; d < DV_PADDED; d += LANES)
            store(merged + d, multiply_add(splat(weight), load(acc + d), load(merged + d)));
    }
    Element* out = a.out + (r.first_row + row) * a.out_row + q_head * a.out_head;
    const float normalise = seen ? 1.0f / sum : 0.0f;
    for (int d = 0; d < V_HEAD_DIM; d++) out[d] = from_float<Element>(merged[d] * normalise);
    a.lse[(int64_t)(r.first_row + row) * NUM_Q_HEADS + q_head] = seen ? (best + log2f(sum)) * 0.693147181f : -INFINITY;
}

// ---- entry points ----

// A thread is worth waking for this much: about 10 microseconds of reading or multiplying.
constexpr int64_t BYTES_PER_THREAD = 128 << 10;
constexpr int64_t PRODUCTS_PER_THREAD = 512 << 10;

// Results do not depend on the number of threads: splits have a fixed length.
static int useful_threads(const Arguments& a, int64_t keys) {
    const int64_t elements = keys * (HEAD_DIM + V_HEAD_DIM);
    const int64_t bytes = elements * (int64_t)sizeof(Cached), products = elements * GROUP * a.max_q;
    return smaller(a.threads, 1 + (int)(bytes / BYTES_PER_THREAD + products / PRODUCTS_PER_THREAD));
}

extern "C" int64_t workspace_bytes(const Arguments* a) { return plan_workspace(*a).bytes; }

// Returns 0; 1 where the system does not lend the registers that the kernel needs; 2 where a key's page is not there,
// and then what was written means nothing.
extern "C" int run(const Arguments* arguments) {
    const Arguments& a = *arguments;
    const Workspace w = plan_workspace(a);
    const int blocks = a.batch * NUM_KV_HEADS;
    int64_t keys_in_all = 0;
    w.split_offset[0] = w.unit_offset[0] = 0;
    for (int block = 0; block < blocks; block++) {
        const int request = block / NUM_KV_HEADS, index = block % NUM_KV_HEADS;
        const Request r = request_of(a, request);
        const int task_heads = heads_per_task(r), first_head = index * task_heads;
        const int keys = first_head < NUM_KV_HEADS ? keys_of(a, r, request, first_head) : 0;
        const int splits = (int)divide_up(keys, a.split_keys);
        w.split_offset[block + 1] = w.split_offset[block] + splits;
        w.unit_offset[block + 1] = w.unit_offset[block] + splits * task_heads;
        keys_in_all += (int64_t)keys * task_heads;
    }
    const int splits = w.split_offset[blocks], rows = a.cu_q[a.batch];
    a.stray_page = 0;
    if (splits > 0 && a.num_pages <= 0) return 2;

#pragma omp parallel num_threads(useful_threads(a, keys_in_all))
    {
        char* scratch = w.scratch + omp_get_thread_num() * w.scratch_bytes;
#pragma omp for schedule(dynamic, 1)
        for (int split = 0; split < splits; split++) {
            attend(a, w, task_of(a, w, split), scratch);
            fence_far();
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < (int64_t)rows * NUM_Q_HEADS; item++) {
            const int row = (int)(item / NUM_Q_HEADS);
            int request = 0;
            while (a.cu_q[request + 1] <= row) request++;
            merge_row(a, w, request, row - a.cu_q[request], (int)(item % NUM_Q_HEADS));
        }
#pragma omp for collapse(2) schedule(static)
        for (int request = 0; request < a.batch; request++)
            for (int row = 0; row < SCORE_ROWS; row++) count_scores(a, request, row);
    }
    return a.stray_page ? 2 : 0;
}
