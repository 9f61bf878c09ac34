// Verification attention: causal attention of a few rows per request over its whole paged KV cache
// that also emits one score for the whole layer and prefix key, the mean softmax weight
// over the first and the last row and all query heads.
//
// A task is one KV head (or all of them) over split_keys keys. Splits have a fixed length, so a row's result does not
// depend on the other requests of its batch nor on the number of threads.
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <sys/syscall.h>
#include <unistd.h>
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
typedef bf16 Dumped;

// ---- vectors: amx-bf16 ----

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

constexpr int SCORE_ROWS = 1;  // of a request

// ---- scored rows: the first and the last, a single row counting once ----

static inline int scored_rows(int rows) { return smaller(2, rows); }
static inline int scored_row(int index, int rows) { return index == 0 ? 0 : rows - 1; }

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

// ---- the engine: AMX tiles of bfloat16 ----
//
// Logits are computed transposed, [key, row]: K's rows go into a tile as they lie in the cache, the queries are packed
// once per task, and the softmax runs down the keys with 16 rows to a vector. V is interleaved in pairs of keys.

constexpr int ROW_PAD = 16;  // packed rows of a head are padded to whole tiles
constexpr int D_STEPS = (HEAD_DIM + 31) / 32, D_TILED = D_STEPS * 32;
constexpr int TILE_BYTES = 1024, TILE_ELEMENTS = 512;  // 16 rows of 64 bytes
constexpr int KEY_STEPS = KEY_TILE / 32;

struct Scratch {
    Element* q;        // [HEADS_PER_TASK, row block, D_STEPS, 16 pairs of dims, 16 rows, 2]
    float* logits;     // [row block, KEY_TILE, 16 rows]
    Element* weights;  // [row block, KEY_STEPS, 16 rows, 32 keys]
    Element* k;        // [16, D_TILED] keys that do not lie at one stride in the cache
    Element* v;        // [KEY_STEPS, DV_PADDED / 16, 16 pairs of keys, 16 dims, 2]
    int row_blocks;

    Scratch after(int64_t) const { return *this; }  // heads come one by one
};

static inline int least_strip(int) { return KEY_TILE; }

static int64_t scratch_of(int rows, char* memory, Scratch& s) {
    char* at = memory;
    auto take = [&](int64_t bytes) {
        char* p = at;
        at += (bytes + 63) / 64 * 64;
        return p;
    };
    s.row_blocks = (rows + 15) / 16;
    s.q = (Element*)take((int64_t)HEADS_PER_TASK * s.row_blocks * D_STEPS * TILE_BYTES);
    s.logits = (float*)take((int64_t)s.row_blocks * KEY_TILE * 64);
    s.weights = (Element*)take((int64_t)s.row_blocks * KEY_STEPS * TILE_BYTES);
    s.k = (Element*)take(16 * D_TILED * sizeof(Element));
    s.v = (Element*)take((int64_t)KEY_STEPS * (DV_PADDED / 16) * TILE_BYTES);
    return at - memory;
}

// Rows of padding are zero: nobody reads their results, but NaN in them would be rescaled over and over.
static void clear_queries(const Scratch& s) {
    memset(s.q, 0, (int64_t)HEADS_PER_TASK * s.row_blocks * D_STEPS * TILE_BYTES);
}

static void pack_row(const Element* from, int row, const Scratch& s) {
    Element* block = s.q + (int64_t)(row / 16) * D_STEPS * TILE_ELEMENTS + row % 16 * 2;
    for (int d = 0; d < D_TILED; d++)
        block[d / 32 * TILE_ELEMENTS + d % 32 / 2 * 32 + d % 2] = d < HEAD_DIM ? from[d] : Element{0};
}

// 16 keys as tile rows: where they lie in the cache if they do so at one stride, else copied side by side.
static inline const Element* sixteen_keys(const Element* const* k, const Scratch& s, int64_t& stride_bytes) {
    const int64_t stride = (const char*)k[1] - (const char*)k[0];
    bool even = true;
    for (int j = 2; j < 16; j++) even &= (const char*)k[j] - (const char*)k[j - 1] == stride;
    if (even) {
        stride_bytes = stride;
        return k[0];
    }
    for (int j = 0; j < 16; j++) {
        memcpy(s.k + j * D_TILED, k[j], HEAD_DIM * sizeof(Element));
        if (D_TILED > HEAD_DIM) memset(s.k + j * D_TILED + HEAD_DIM, 0, (D_TILED - HEAD_DIM) * sizeof(Element));
    }
    stride_bytes = D_TILED * sizeof(Element);
    return s.k;
}

static void dot_tile(const Element* q, const Strip& strip, const Scratch& s) {
    Fetcher<HEAD_DIM> fetcher(strip, KEY_TILE / 16 * (int)divide_up(s.row_blocks, 4) * D_STEPS);
    for (int key = 0; key < KEY_TILE; key += 16) {
        int64_t stride;
        const Element* keys = sixteen_keys(strip.here + key, s, stride);
        for (int block = 0; block < s.row_blocks; block += 4) {  // tiles 0-3 accumulate, 4 holds keys, 5 queries
            const int blocks = smaller(4, s.row_blocks - block);
            const Element* rows = q + (int64_t)block * D_STEPS * TILE_ELEMENTS;
            float* to = s.logits + ((int64_t)block * KEY_TILE + key) * 16;
            _tile_zero(0);
            if (blocks > 1) _tile_zero(1);
            if (blocks > 2) _tile_zero(2);
            if (blocks > 3) _tile_zero(3);
            for (int d = 0; d < D_STEPS; d++) {
                fetcher.advance();
                _tile_loadd(4, keys + d * 32, stride);
                const Element* step = rows + d * TILE_ELEMENTS;
                _tile_loadd(5, step, 64);
                _tile_dpbf16ps(0, 4, 5);
                if (blocks > 1) { _tile_loadd(6, step + D_STEPS * TILE_ELEMENTS, 64); _tile_dpbf16ps(1, 4, 6); }
                if (blocks > 2) { _tile_loadd(5, step + 2 * D_STEPS * TILE_ELEMENTS, 64); _tile_dpbf16ps(2, 4, 5); }
                if (blocks > 3) { _tile_loadd(6, step + 3 * D_STEPS * TILE_ELEMENTS, 64); _tile_dpbf16ps(3, 4, 6); }
            }
            _tile_stored(0, to, 64);
            if (blocks > 1) _tile_stored(1, to + KEY_TILE * 16, 64);
            if (blocks > 2) _tile_stored(2, to + 2 * KEY_TILE * 16, 64);
            if (blocks > 3) _tile_stored(3, to + 3 * KEY_TILE * 16, 64);
        }
    }
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

// Scales the logits of one block of 16 rows and hides what a row does not see.
static void finish_block(const Request& r, const Tile& tile, const Scratch& s, int block) {
    float* logits = s.logits + (int64_t)block * KEY_TILE * 16;
    const Vec scale = splat(Q_SCALE);
    for (int j = 0; j < KEY_TILE; j++) store(logits + j * 16, load(logits + j * 16) * scale);
    if (!tile.masked) return;
    alignas(64) int last[16];  // the newest key each row sees
    for (int i = 0; i < 16; i++) last[i] = r.first_position + (block * 16 + i) / GROUP;
    const __m512i newest = _mm512_load_si512(last);
    for (int j = 0; j < KEY_TILE; j++) {
        const __m512i position = _mm512_set1_epi32(tile.position[j]);
        __mmask16 hidden = _mm512_cmpgt_epi32_mask(position, newest);
        _mm512_mask_storeu_ps(logits + j * 16, hidden, _mm512_set1_ps(-INFINITY));
    }
}

// Logits of one block of 16 rows -> weights relative to the running maxima; rescales what was accumulated before.
static void soften(const Scratch& s, int block, float* acc, float* row_max, float* row_sum) {
    const float* logits = s.logits + (int64_t)block * KEY_TILE * 16;
    const Vec old_max = load(row_max + block * 16);
    Vec best[4] = {old_max, old_max, old_max, old_max};
    for (int j = 0; j < KEY_TILE; j += 4)
        for (int i = 0; i < 4; i++) best[i] = maximum(best[i], load(logits + (j + i) * 16));
    const Vec new_max = maximum(maximum(best[0], best[1]), maximum(best[2], best[3]));
    const Vec nothing = splat(-INFINITY), offset = new_max == nothing ? Vec{} : new_max;
    const Vec rescale = new_max == old_max ? splat(1.0f) : exp2_of(old_max - offset);
    Vec sum[2] = {};
    for (int step = 0; step < KEY_STEPS; step++) {
        __m512i pairs[16];  // [16 pairs of keys, 16 rows]
        const __m512i neighbours = _mm512_set_epi32(
            0x001f000f, 0x001e000e, 0x001d000d, 0x001c000c, 0x001b000b, 0x001a000a, 0x00190009, 0x00180008,
            0x00170007, 0x00160006, 0x00150005, 0x00140004, 0x00130003, 0x00120002, 0x00110001, 0x00100000);
        for (int pair = 0; pair < 16; pair++) {
            const float* at = logits + (step * 32 + pair * 2) * 16;
            const Vec even = exp2_of(load(at) - offset), odd = exp2_of(load(at + 16) - offset);
            sum[0] += even;
            sum[1] += odd;
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            pairs[pair] = _mm512_permutexvar_epi16(neighbours, both);
        }
        transpose(pairs);
        Element* to = s.weights + ((int64_t)block * KEY_STEPS + step) * TILE_ELEMENTS;
        for (int row = 0; row < 16; row++) _mm512_storeu_si512(to + row * 32, pairs[row]);
    }
    store(row_sum + block * 16, multiply_add(load(row_sum + block * 16), rescale, sum[0] + sum[1]));
    store(row_max + block * 16, new_max);
    if (_mm512_cmpneq_ps_mask((__m512)rescale, _mm512_set1_ps(1.0f)) == 0) return;  // the usual case after a few tiles
    float factors[16];
    store(factors, rescale);
    for (int i = 0; i < 16; i++) {
        if (factors[i] == 1.0f) continue;
        float* row = acc + (block * 16 + i) * DV_PADDED;
        for (int d = 0; d < DV_PADDED; d += LANES) store(row + d, load(row + d) * splat(factors[i]));
    }
}

// Pairs of keys, element by element, as the second operand of a tile product wants them.
static void interleave_values(const Strip& strip, const Scratch& s) {
    Fetcher<V_HEAD_DIM> fetcher(strip, KEY_TILE / 2);
    for (int j = 0; j < KEY_TILE; j += 2) {
        fetcher.advance();
        Element* to = s.v + (int64_t)(j / 32) * (DV_PADDED / 16) * TILE_ELEMENTS + j % 32 / 2 * 32;
        for (int d = 0; d < V_HEAD_DIM; d += 32) {
            const __m512i even = load_pairs<V_HEAD_DIM>(strip.here[j], d);
            const __m512i odd = load_pairs<V_HEAD_DIM>(strip.here[j + 1], d);
            _mm512_storeu_si512(to + d / 16 * TILE_ELEMENTS, interleave(even, odd, 0));
            if (d + 16 < DV_PADDED) _mm512_storeu_si512(to + (d / 16 + 1) * TILE_ELEMENTS, interleave(even, odd, 1));
        }
    }
}

// acc[16 rows, TILES * 16 dims] += weights x V.
template <int TILES> static inline void weigh_dims(float* acc, const Element* weights, const Element* v) {
    constexpr int64_t ROW = DV_PADDED * sizeof(float), STEP = (DV_PADDED / 16) * TILE_ELEMENTS;
    _tile_loadd(0, acc, ROW);
    if (TILES > 1) _tile_loadd(1, acc + 16, ROW);
    if (TILES > 2) _tile_loadd(2, acc + 32, ROW);
    if (TILES > 3) _tile_loadd(3, acc + 48, ROW);
    for (int step = 0; step < KEY_STEPS; step++) {
        _tile_loadd(4, weights + step * TILE_ELEMENTS, 64);
        const Element* values = v + step * STEP;
        _tile_loadd(5, values, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (TILES > 1) { _tile_loadd(6, values + TILE_ELEMENTS, 64); _tile_dpbf16ps(1, 4, 6); }
        if (TILES > 2) { _tile_loadd(5, values + 2 * TILE_ELEMENTS, 64); _tile_dpbf16ps(2, 4, 5); }
        if (TILES > 3) { _tile_loadd(6, values + 3 * TILE_ELEMENTS, 64); _tile_dpbf16ps(3, 4, 6); }
    }
    _tile_stored(0, acc, ROW);
    if (TILES > 1) _tile_stored(1, acc + 16, ROW);
    if (TILES > 2) _tile_stored(2, acc + 32, ROW);
    if (TILES > 3) _tile_stored(3, acc + 48, ROW);
}

static void weigh_tile(float* acc, const Scratch& s) {
    constexpr int TILES = DV_PADDED / 16, WHOLE = TILES / 4 * 4;
    for (int block = 0; block < s.row_blocks; block++) {
        float* rows = acc + (int64_t)block * 16 * DV_PADDED;
        const Element* weights = s.weights + (int64_t)block * KEY_STEPS * TILE_ELEMENTS;
        for (int tile = 0; tile < WHOLE; tile += 4)
            weigh_dims<4>(rows + tile * 16, weights, s.v + tile * TILE_ELEMENTS);
        if constexpr (TILES > WHOLE)
            weigh_dims<TILES - WHOLE>(rows + WHOLE * 16, weights, s.v + WHOLE * TILE_ELEMENTS);
    }
}

// The logits of one tile and head, whose first packed row is `first`.
template <bool>
static void logits_of_strip(int, const Strip& tile, const Scratch& s, int64_t first) {
    dot_tile(s.q + first * D_TILED, tile, s);
}

static void finish_logits(const Request& r, const Tile& tile, const Scratch& s) {
    for (int block = 0; block < s.row_blocks; block++) finish_block(r, tile, s, block);
}

static void soften_tile(const Request&, const Scratch& s, float* acc, float* row_max, float* row_sum) {
    for (int block = 0; block < s.row_blocks; block++) soften(s, block, acc, row_max, row_sum);
}

// Adds one softened tile to one head's running results.
template <bool>
static void weigh_strip(int, const Strip& tile, const Scratch& s, float* acc) {
    interleave_values(tile, s);
    weigh_tile(acc, s);
}

static inline const Element* weights_of(const Scratch& s, int row, int step) {
    return s.weights + ((int64_t)(row / 16) * KEY_STEPS + step) * TILE_ELEMENTS + row % 16 * 32;
}

static void dump_row(const Scratch& s, int row, Dumped* to) {
    for (int step = 0; step < KEY_STEPS; step++) memcpy(to + step * 32, weights_of(s, row, step), 64);
}

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
    Dumped* dumped;         // [shelf, tile, KV head, scored row, KEY_TILE] weights relative to tile_max
    float* tile_max;        // [shelf, tile, KV head, scored row]
    int32_t* shelf;         // [batch] where a request's weights are kept, or -1
    int32_t* free_shelves;  // [1 + shelves] how many no request has, and which
    int32_t* open_splits;   // [batch] splits of a request that are not done
    int32_t* piece_offset;  // [batch + 1] pieces of the scores, that all threads share out, before each request
    int32_t* next_split;    // the first that no thread has taken
    int64_t scratch_bytes, bytes;
};

// What is written more than this before it is read, by what is read and written in between, has left the caches then.
// Writing it past them, so that its lines are not read first, spared two fifths of what scores of all rows in float32
// over 32,768 keys had taken on an AMD EPYC of 2026-11 (Zen 4), and more where heads are small.
constexpr int64_t NEAR_BYTES = 24 << 20;

// Kept weights stay in a cache where the memory they have is soon used again: a request is finished by the thread that
// does its last split, and leaves its shelf to one that begins. The requests of the last splits, a thread's worth each,
// are finished by all threads together. Requests under way are then those of a split or a finish, and one newest.
static inline int shelves_of(const Arguments& a) { return smaller(a.batch, 2 * a.threads); }

static inline int tiles_of(const Arguments& a) { return (int)divide_up(a.max_kv, KEY_TILE); }

static inline int kept_rows(const Arguments& a) { return scored_rows(a.max_q) * GROUP; }  // of a tile and head

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
    const int64_t per_row = DV_PADDED * 4, task_rows = HEADS_PER_TASK * unit_rows;
    const int64_t to_attend = scratch_of(a.max_q * GROUP, nullptr, unused) + (task_rows + LANES) * per_row;
    const int64_t to_score = ((int64_t)NUM_KV_HEADS * kept_rows(a) + LANES) * 4;
    const int64_t scratch = larger(to_attend, to_score);
    w.scratch_bytes = divide_up(scratch, 4096) * 4096;
    w.scratch = take(w.scratch_bytes * a.threads);
    const int64_t kept = (int64_t)shelves_of(a) * tiles_of(a) * NUM_KV_HEADS * kept_rows(a);
    w.shelf = (int32_t*)take(a.batch * 4);
    w.free_shelves = (int32_t*)take((1 + shelves_of(a)) * 4);
    w.open_splits = (int32_t*)take(a.batch * 4);
    w.piece_offset = (int32_t*)take((a.batch + 1) * 4);
    w.next_split = (int32_t*)take(4);
    w.tile_max = (float*)take((kept + LANES) * 4);
    w.dumped = (Dumped*)take(kept * KEY_TILE * sizeof(Dumped));
    w.bytes = at;
    return w;
}

// Whether a request's first weights have left the caches when its scores are made of them.
static inline bool kept_far(const Arguments& a, const Workspace& w) {
    const int64_t kept = kept_rows(a) * sizeof(Dumped), cached = (HEAD_DIM + V_HEAD_DIM) * sizeof(Cached);
    return a.max_kv * NUM_KV_HEADS * (kept + cached) > NEAR_BYTES && (uintptr_t)w.dumped % 64 == 0;
}

// Where the weights of one tile, counted from first_key, and one head are kept: their first row.
static inline int64_t kept_at(const Arguments& a, const Workspace& w, int request, int tile, int head) {
    return (((int64_t)w.shelf[request] * tiles_of(a) + tile) * NUM_KV_HEADS + head) * kept_rows(a);
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

// Keeps the scored rows' weights of one tile and head, relative to their running maxima.
static void keep_weights(
    const Arguments& a, const Workspace& w, const Request& r, const Scratch& s, int request, int head, int tile,
    const float* row_max
) {
    const int scored = scored_rows(r.rows) * GROUP;
    const int64_t first = kept_at(a, w, request, tile, head);
    const bool far = kept_far(a, w);
    for (int i = 0; i < scored; i++) {
        const int row = scored_row(i / GROUP, r.rows) * GROUP + i % GROUP;
        Dumped weights[KEY_TILE], *to = w.dumped + (first + i) * KEY_TILE;
        w.tile_max[first + i] = row_max[row];
        dump_row(s, row, far ? weights : to);
        if (far) store_far(to, weights);
    }
}

// Scores of the tiles [first, last) of one request: the kept weights, renormalised by each row's log-sum-exp and
// averaged. row_lse is memory for one float a head and scored row.
static void score_tiles(
    const Arguments& a, const Workspace& w, int request, int first, int last, bool far, float* row_lse
) {
    const Request r = request_of(a, request);
    const int prefix = prefix_of(a, r), scored = scored_rows(r.rows) * GROUP;
    const Vec share = splat(1.0f / (scored * NUM_KV_HEADS));
    for (int head = 0; head < NUM_KV_HEADS; head++)
        for (int i = 0; i < scored; i++) {
            const int64_t row = r.first_row + scored_row(i / GROUP, r.rows);
            const float lse = a.lse[row * NUM_Q_HEADS + head * GROUP + i % GROUP];
            row_lse[head * scored + i] = lse == -INFINITY ? INFINITY : lse * LOG2_E;  // that row saw no key at all
        }
    for (int begin = first * KEY_TILE; begin < smaller(prefix, last * KEY_TILE); begin += KEY_TILE) {
        const int count = smaller(KEY_TILE, prefix - begin);
        Vec sums[KEY_TILE / LANES] = {};
        for (int head = 0; head < NUM_KV_HEADS; head++) {
            const int64_t at = kept_at(a, w, request, begin / KEY_TILE, head);
            for (int i = 0; i < scored; i += LANES) {
                float factors[LANES];  // those past the last row are not used
                store(factors, exp2_of(load(w.tile_max + at + i) - load(row_lse + head * scored + i)) * share);
                for (int j = 0; j < smaller(LANES, scored - i); j++) {
                    const Dumped* from = w.dumped + (at + i + j) * KEY_TILE;
#pragma GCC unroll 8
                    for (int v = 0; v < KEY_TILE / LANES; v++)
                        sums[v] = multiply_add(splat(factors[j]), load(from + v * LANES), sums[v]);
                }
            }
        }
        store_scores(sums, count, far, key_scores_of(a, w, request, 0) + begin);
    }
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
    clear_queries(s);
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
                    keep_weights(
                        a, w, r, of_head, task.request, first_head + head, (tile.position[0] - r.first_key) / KEY_TILE,
                        row_max + at);
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

// ---- from a request's kept weights to its scores ----

constexpr int PIECE_TILES = 8;  // of a request's scores, for one thread at a time

static inline int splits_of(const Workspace& w, int request) {
    return w.split_offset[(request + 1) * NUM_KV_HEADS] - w.split_offset[request * NUM_KV_HEADS];
}

// Whether the thread that does a request's last split finishes it: the others then still have one each to do.
static inline bool finished_by_one(const Arguments& a, const Workspace& w, int request) {
    const int splits = w.split_offset[a.batch * NUM_KV_HEADS], end = w.split_offset[(request + 1) * NUM_KV_HEADS];
    return splits_of(w, request) > 0 && end + a.threads <= splits;
}

static void take_shelf(const Workspace& w, int request) {
#pragma omp critical
    if (w.shelf[request] < 0) w.shelf[request] = w.free_shelves[w.free_shelves[0]--];
}

static void return_shelf(const Workspace& w, int request) {
#pragma omp critical
    w.free_shelves[++w.free_shelves[0]] = w.shelf[request];
}

static void finish_request(const Arguments& a, const Workspace& w, int request, char* memory) {
    for (int row = 0; row < request_of(a, request).rows; row++)
        for (int head = 0; head < NUM_Q_HEADS; head++) merge_row(a, w, request, row, head);
    score_tiles(a, w, request, 0, tiles_of(a), scores_far(a), (float*)memory);
    fence_far();
    return_shelf(w, request);
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

// Linux lends the tile registers on request, once for a whole process; each thread then says which shapes it uses.
static bool request_tiles() {
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16};
};

// Returns 0; 1 where the system does not lend the registers that the kernel needs; 2 where a key's page is not there,
// and then what was written means nothing.
extern "C" int run(const Arguments* arguments) {
    const Arguments& a = *arguments;
    static const bool lent = request_tiles();
    if (!lent) return 1;
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
    *w.next_split = w.piece_offset[0] = 0;
    w.free_shelves[0] = shelves_of(a);
    for (int shelf = 0; shelf < shelves_of(a); shelf++) w.free_shelves[1 + shelf] = shelf;
    for (int request = 0; request < a.batch; request++) {
        const bool shared = !finished_by_one(a, w, request);
        const int tiles = shared ? (int)divide_up(prefix_of(a, request_of(a, request)), KEY_TILE) : 0;
        w.piece_offset[request + 1] = w.piece_offset[request] + (int)divide_up(tiles, PIECE_TILES);
        w.open_splits[request] = splits_of(w, request);
        w.shelf[request] = -1;
    }

#pragma omp parallel num_threads(useful_threads(a, keys_in_all))
    {
        char* scratch = w.scratch + omp_get_thread_num() * w.scratch_bytes;
        const TileShapes shapes;
        _tile_loadconfig(&shapes);
        for (int split; (split = __atomic_fetch_add(w.next_split, 1, __ATOMIC_RELAXED)) < splits;) {
            const Task task = task_of(a, w, split);
            take_shelf(w, task.request);
            attend(a, w, task, scratch);
            fence_far();
            const int open = __atomic_sub_fetch(w.open_splits + task.request, 1, __ATOMIC_ACQ_REL);
            if (open == 0 && finished_by_one(a, w, task.request)) finish_request(a, w, task.request, scratch);
        }
#pragma omp barrier
        _tile_release();
#pragma omp for schedule(static, NUM_Q_HEADS)
        for (int64_t item = 0; item < (int64_t)rows * NUM_Q_HEADS; item++) {
            const int row = (int)(item / NUM_Q_HEADS);
            int request = 0;
            while (a.cu_q[request + 1] <= row) request++;
            if (finished_by_one(a, w, request)) continue;
            merge_row(a, w, request, row - a.cu_q[request], (int)(item % NUM_Q_HEADS));
        }
#pragma omp for schedule(static)
        for (int piece = 0; piece < w.piece_offset[a.batch]; piece++) {
            int request = 0;
            while (w.piece_offset[request + 1] <= piece) request++;
            const int first = (piece - w.piece_offset[request]) * PIECE_TILES;
            score_tiles(a, w, request, first, first + PIECE_TILES, false, (float*)scratch);
        }
    }
    return a.stray_page ? 2 : 0;
}
