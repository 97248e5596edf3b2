// AMX: eight tile registers of 16 rows x 64 bytes, and the product of bf16 tiles. One instruction a function; kernels
// contain no assembly. Tiles are numbered at compile time.
//
//   TileConfig                       every thread that touches tiles holds one, for the length of a parallel region
//   tile_load<t>(p, stride)          row r from p + r * stride bytes; rows of 64 bytes, best aligned to 64
//   tile_stream_load<t>(p, stride)   the same for data that lives in L2: displaces little of what is in L1
//   tile_store<t>(p, stride)   tile_zero<t>()
//   tile_dot<sum, a, b>()            sum[m][n] += sum over 16 pairs k of a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]
//
// The operands of tile_dot: a (16 x 32) holds rows of A as they are; b is in VNNI form: 16 pairs of rows of B, each the
// 16 columns of two rows interleaved. The functions at the end bring 32 x 32 blocks of bf16 matrices into these forms.
//
// Loads and stores are compiler barriers (gcc's own intrinsics are not), so memory is read and written in program
// order, and vector work written between tile instructions stays between them. Denormals are taken as zero.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "core/types.h"

#ifdef LLMFAST_EMULATED
#include "simd/emulated/tiles.h"
#endif

namespace llmfast::LLMFAST_TARGET {

constexpr int kTileRows = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileElements = 512;   // bf16 in a tile
constexpr int64_t kBlock = 32;           // rows and columns of a block of two operand tiles
constexpr int64_t kBlockElements = kBlock * kBlock;

// Layout fixed by LDTILECFG; whatever is not set must be zero.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

#ifdef LLMFAST_EMULATED
inline void tile_configure(const TileShapes& shapes) { emulated::ldtilecfg(&shapes); }
inline void tile_release() { emulated::tilerelease(); }
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  emulated::tileloadd(kTile, p, stride);
}
template <int kTile>
inline void tile_stream_load(const void* p, int64_t stride) {
  emulated::tileloadd(kTile, p, stride);
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  emulated::tilestored(kTile, p, stride);
}
template <int kTile>
inline void tile_zero() {
  emulated::tilezero(kTile);
}
template <int kSum, int kA, int kB>
inline void tile_dot() {
  emulated::tdpbf16ps(kSum, kA, kB);
}
#else
// All 64 bytes are the operand: with gcc 12's _tile_loadconfig, which names 8, stores to the others may be dropped.
inline void tile_configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }
inline void tile_release() { __asm__ volatile("tilerelease" : : : "memory"); }
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_stream_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kSum, int kA, int kB>
inline void tile_dot() {
  static_assert(kSum != kA && kA != kB && kSum != kB, "the instruction faults on equal tiles");
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}
#endif

// The calling thread's tiles, all eight of 16 rows x 64 bytes, from construction to destruction. Does not nest. (The
// process must hold the permission that core/isa.cpp asks for; threads share it.)
class TileConfig {
 public:
  TileConfig() {
    TileShapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = kTileRowBytes;
      shapes.rows[i] = kTileRows;
    }
    tile_configure(shapes);
  }
  ~TileConfig() { tile_release(); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

// ---- operand forms -------------------------------------------------------------------------------------------------

// r[i] dword j <-> r[j] dword i.
inline void transpose_dwords(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {  // pairs of rows within 128 bits
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // pairs of pairs
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // 128-bit quarters, twice
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// first = x0 y0 x1 y1 ... x15 y15, second = x16 y16 ... x31 y31: one row of two VNNI tiles from two rows of a matrix.
inline void interleave_rows(__m512i x, __m512i y, __m512i* first, __m512i* second) {
  const __m512i pair = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i twice = _mm512_mullo_epi32(pair, _mm512_set1_epi32(0x00010001));
  const __m512i low = _mm512_add_epi32(twice, _mm512_set1_epi32(0x00200000));  // 32 + i means y's lane i
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x00100010));
  *first = _mm512_permutex2var_epi16(x, low, y);
  *second = _mm512_permutex2var_epi16(x, high, y);
}

inline __mmask32 first_bf16_lanes(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

// Each of the four packs a block of up to 32 x 32 into two tiles; what lies beyond `rows`, `cols` or `depth` (32 at
// most) is not read and becomes zero. dst: kBlockElements, aligned to 64. Strides count elements.

// A tiles of rows m: src[m * stride + k] -> dst[m][k].
inline void a_block_from_rows(bf16* dst, const bf16* src, int64_t stride, int64_t rows, int64_t depth) {
  const __mmask32 lanes = first_bf16_lanes(depth);
  for (int64_t m = 0; m < rows; ++m)
    _mm512_store_si512(dst + m * kBlock, _mm512_maskz_loadu_epi16(lanes, src + m * stride));
  for (int64_t m = rows; m < kBlock; ++m) _mm512_store_si512(dst + m * kBlock, _mm512_setzero_si512());
}

// VNNI tiles of columns n: src[k * stride + n] -> dst[n / 16][k / 2][n % 16][k % 2].
inline void b_block_from_rows(bf16* dst, const bf16* src, int64_t stride, int64_t depth, int64_t cols) {
  const __mmask32 lanes = first_bf16_lanes(cols);
  for (int64_t k = 0; k < kBlock; k += 2) {
    const __m512i even = k < depth ? _mm512_maskz_loadu_epi16(lanes, src + k * stride) : _mm512_setzero_si512();
    const bf16* next = src + (k + 1) * stride;
    const __m512i odd = k + 1 < depth ? _mm512_maskz_loadu_epi16(lanes, next) : _mm512_setzero_si512();
    __m512i first, second;
    interleave_rows(even, odd, &first, &second);
    _mm512_store_si512(dst + k * kTileRows, first);
    _mm512_store_si512(dst + k * kTileRows + kTileElements, second);
  }
}

// VNNI tiles of columns n: src[n * stride + k] -> dst[n / 16][k / 2][n % 16][k % 2].
inline void b_block_from_columns(bf16* dst, const bf16* src, int64_t stride, int64_t depth, int64_t cols) {
  const __mmask32 lanes = first_bf16_lanes(depth);
  for (int64_t tile = 0; tile < 2; ++tile) {
    __m512i r[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t n = tile * kTileRows + i;
      r[i] = n < cols ? _mm512_maskz_loadu_epi16(lanes, src + n * stride) : _mm512_setzero_si512();
    }
    transpose_dwords(r);
    for (int i = 0; i < kTileRows; ++i) _mm512_store_si512(dst + tile * kTileElements + i * kBlock, r[i]);
  }
}

// A tiles of rows m: src[k * stride + m] -> dst[m][k]. Pairs of source rows, interleaved, are dwords to transpose.
inline void a_block_from_columns(bf16* dst, const bf16* src, int64_t stride, int64_t rows, int64_t depth) {
  b_block_from_rows(dst, src, stride, depth, rows);
  for (int64_t tile = 0; tile < 2; ++tile) {
    __m512i r[kTileRows];
    for (int i = 0; i < kTileRows; ++i) r[i] = _mm512_load_si512(dst + tile * kTileElements + i * kBlock);
    transpose_dwords(r);
    for (int i = 0; i < kTileRows; ++i) _mm512_store_si512(dst + tile * kTileElements + i * kBlock, r[i]);
  }
}

}  // namespace llmfast::LLMFAST_TARGET
