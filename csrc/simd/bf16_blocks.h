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

// Dword i of the 16 rows of 64 bytes at src, `stride` elements apart -> row i of dst, for the first kRows of 16; dst aligned to
// 64. Masked loads put each 128-bit quarter into its place, so only the shuffles within quarters are left: the same from
// registers takes twice as many (measured on Zen 5, a block of two tiles: 34 ns instead of 85; copying it takes 36).
template <int kRows = kTileRows>
__attribute__((noinline)) void transpose_dwords(bf16* dst, const bf16* src, int64_t stride) {
  const auto load = [&](int64_t row, int64_t quarter) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + row * stride + quarter * 8));
  };
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    __m512i r[4];  // row i + 4 j in quarter j
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_broadcast_i32x4(load(i, q));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00f0, load(i + 4, q));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0f00, load(i + 8, q));
      r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xf000, load(i + 12, q));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]), high01 = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]), high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    const __m512i rows[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                             _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      if (4 * q + i < kRows) _mm512_store_si512(dst + (4 * q + i) * kBlock, rows[i]);
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
  int64_t m = 0;
  for (; m < rows; ++m) _mm512_store_si512(dst + m * kBlock, _mm512_maskz_loadu_epi16(lanes, src + m * stride));
  for (; m < kRows; ++m) _mm512_store_si512(dst + m * kBlock, _mm512_setzero_si512());
}

// A tiles of rows m: src[m * stride + k] -> dst[m][k].
inline void a_block_from_rows(bf16* dst, const bf16* src, int64_t stride, int64_t rows, int64_t depth) {
  a_rows_from_rows<kBlock>(dst, src, stride, rows, depth);
}

// VNNI tiles of columns n: src[k * stride + n] -> dst[n / 16][k / 2][n % 16][k % 2].
inline void b_block_from_rows(bf16* dst, const bf16* src, int64_t stride, int64_t depth, int64_t cols) {
  const __mmask32 lanes = first_bf16_lanes(cols);
  const auto store_pair = [&](int64_t k, __m512i even, __m512i odd) __attribute__((always_inline)) {
    __m512i first, second;
    interleave_rows(even, odd, &first, &second);
    _mm512_store_si512(dst + k * kTileRows, first);
    _mm512_store_si512(dst + k * kTileRows + kTileElements, second);
  };
  const auto row = [&](int64_t k) __attribute__((always_inline)) {
    return _mm512_maskz_loadu_epi16(lanes, src + k * stride);
  };
  int64_t k = 0;
#pragma GCC unroll 4
  for (; k + 1 < depth; k += 2) store_pair(k, row(k), row(k + 1));
  if (k < depth) {
    store_pair(k, row(k), _mm512_setzero_si512());
    k += 2;
  }
  for (; k < kBlock; k += 2) store_pair(k, _mm512_setzero_si512(), _mm512_setzero_si512());
}

// VNNI tiles of columns n: src[n * stride + k] -> dst[n / 16][k / 2][n % 16][k % 2].
inline void b_block_from_columns(bf16* dst, const bf16* src, int64_t stride, int64_t depth, int64_t cols) {
  for (int64_t tile = 0; tile < 2; ++tile, src += kTileRows * stride, dst += kTileElements, cols -= kTileRows) {
    const bool whole = depth == kBlock && cols >= kTileRows;
    alignas(64) bf16 padded[kTileElements];
    if (!whole) a_rows_from_rows<kTileRows>(padded, src, stride, cols < kTileRows ? cols : kTileRows, depth);
    transpose_dwords(dst, whole ? src : padded, whole ? stride : kBlock);
  }
}

// A tiles of rows m: src[k * stride + m] -> dst[m][k]. Pairs of source rows, interleaved, are dwords to transpose.
inline void a_block_from_columns(bf16* dst, const bf16* src, int64_t stride, int64_t rows, int64_t depth) {
  alignas(64) bf16 pairs[kBlockElements];
  b_block_from_rows(pairs, src, stride, depth, rows);
  for (int64_t tile = 0; tile < kBlockElements; tile += kTileElements) transpose_dwords(dst + tile, pairs + tile, kBlock);
}

// kRows <= 16 rows of A, m: src[k * stride + m] -> dst[m][k].
template <int kRows>
inline void a_rows_from_columns(bf16* dst, const bf16* src, int64_t stride, int64_t rows, int64_t depth) {
  static_assert(kRows <= kTileRows);
  const __mmask32 lanes = first_bf16_lanes(rows);
  alignas(64) bf16 pairs[kTileElements];
  for (int64_t pair = 0; pair < kTileRows; ++pair) {
    const bf16* even = src + 2 * pair * stride;
    const __m512i x = 2 * pair < depth ? _mm512_maskz_loadu_epi16(lanes, even) : _mm512_setzero_si512();
    const __m512i y = 2 * pair + 1 < depth ? _mm512_maskz_loadu_epi16(lanes, even + stride) : _mm512_setzero_si512();
    __m512i first, beyond;
    interleave_rows(x, y, &first, &beyond);
    _mm512_store_si512(pairs + pair * kBlock, first);
  }
  transpose_dwords<kRows>(dst, pairs, kBlock);
}

}  // namespace llmfast::LLMFAST_TARGET
