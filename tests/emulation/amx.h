// AMX tiles of bfloat16 in plain C++, so that the tile engine is proved on processors without them (and by them, where
// they are: the same kernel then also runs on the real instructions). Included after <immintrin.h> and <unistd.h>.
#include <math.h>

namespace emulated_amx {
constexpr int TILES = 8, ROWS = 16, ROW_BYTES = 64;
static thread_local uint8_t tiles[TILES][ROWS][ROW_BYTES];

static inline void load(int tile, const void* base, int64_t stride) {
    for (int row = 0; row < ROWS; row++) memcpy(tiles[tile][row], (const char*)base + row * stride, ROW_BYTES);
}
static inline void store(int tile, void* base, int64_t stride) {
    for (int row = 0; row < ROWS; row++) memcpy((char*)base + row * stride, tiles[tile][row], ROW_BYTES);
}
static inline float wide(const uint8_t* at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
// sum[row, column] += a[row, pair, 2] . b[pair, column, 2]
static inline void multiply_add(int sum, int a, int b) {
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < ROW_BYTES / 4; column++) {
            float total;
            memcpy(&total, &tiles[sum][row][column * 4], 4);
            for (int pair = 0; pair < ROW_BYTES / 4; pair++)
                for (int half = 0; half < 4; half += 2)
                    total += wide(&tiles[a][row][pair * 4 + half]) * wide(&tiles[b][pair][column * 4 + half]);
            memcpy(&tiles[sum][row][column * 4], &total, 4);
        }
}
}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef syscall
#define _tile_loadconfig(shapes) (void)(shapes)
#define _tile_release() (void)0
#define _tile_zero(tile) memset(emulated_amx::tiles[tile], 0, sizeof emulated_amx::tiles[tile])
#define _tile_loadd(tile, base, stride) emulated_amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_amx::store(tile, base, stride)
#define _tile_dpbf16ps(sum, a, b) emulated_amx::multiply_add(sum, a, b)
#define syscall(...) 0  // the request for tile registers
