// Blocks of bf16 matrices in the forms that instructions for sums of pairs take, AMX's tdpbf16ps and AVX-512's vdpbf16ps.
//
//   A: rows as they are, 32 of depth a row (64 bytes); 16 rows are a tile.
//   B: VNNI form: 16 pairs of rows, each the 16 columns of two rows interleaved; that is a tile, too.
//
// A block is 32 x 32, two tiles one after the other: of 16 rows of A, or of 16 columns of B.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "core/types.h"

namespace llmfast::LLMFAST_TARGET {

constexpr int kTileRows = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kTileElements = 512;  // bf16 in a tile
constexpr int64_t kBlock = 32;          // rows and columns of a block of two operand tiles
constexpr int64_t kBlockElements = kBlock * kBlock;

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

// Each packs a block of up to 32 x 32 into two tiles; what lies beyond `rows`, `cols` or `depth` (32 at
// most) is not read and becomes zero. dst: kBlockElements, aligned to 64. Strides count elements.

// kRows rows of A, m: src[m * stride + k] -> dst[m][k].
template <int kRows>
inline void a_rows_from_rows(bf16* dst, const bf16* src, int64_t stride, int64_t rows, int64_t depth) {
  const __mmask32 lanes = first_bf16_lanes(depth);
  for (int64_t m = 0; m < rows; ++m)
    _mm512_store_si512(dst + m * kBlock, _mm512_maskz_loadu_epi16(lanes, src + m * stride));
  for (int64_t m = rows; m < kRows; ++m) _mm512_store_si512(dst + m * kBlock, _mm512_setzero_si512());
}

// A tiles of rows m: src[m * stride + k] -> dst[m][k].
inline void a_block_from_rows(bf16* dst, const bf16* src, int64_t stride, int64_t rows, int64_t depth) {
  a_rows_from_rows<kBlock>(dst, src, stride, rows, depth);
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

// kRows <= 16 rows of A, m: src[k * stride + m] -> dst[m][k].
template <int kRows>
inline void a_rows_from_columns(bf16* dst, const bf16* src, int64_t stride, int64_t rows, int64_t depth) {
  static_assert(kRows <= kTileRows);
  const __mmask32 lanes = first_bf16_lanes(rows);
  __m512i r[kTileRows];
  for (int64_t pair = 0; pair < kTileRows; ++pair) {
    const bf16* even = src + 2 * pair * stride;
    const __m512i x = 2 * pair < depth ? _mm512_maskz_loadu_epi16(lanes, even) : _mm512_setzero_si512();
    const __m512i y = 2 * pair + 1 < depth ? _mm512_maskz_loadu_epi16(lanes, even + stride) : _mm512_setzero_si512();
    __m512i beyond;
    interleave_rows(x, y, &r[pair], &beyond);
  }
  transpose_dwords(r);
  for (int m = 0; m < kRows; ++m) _mm512_store_si512(dst + m * kBlock, r[m]);
}

}  // namespace llmfast::LLMFAST_TARGET
