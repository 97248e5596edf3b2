// Sums of pairs in vector registers: AVX512_BF16's vdpbf16ps, which adds two products to each of sixteen float32 lanes.
// Denormals are taken as zero.
#pragma once
#include "simd/bf16_blocks.h"
#include "simd/vec.h"

namespace llmfast::LLMFAST_TARGET {

constexpr int kBlockVecs = 2;  // registers that hold a row of a block's product
constexpr int kPairs = kBlock / 2;

// sum[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
inline __attribute__((always_inline)) Vec dot_pairs(Vec sum, __m512i a, __m512i b) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b)};
}

// Two values of one row of A in every lane.
inline __attribute__((always_inline)) __m512i broadcast_pair(const bf16* pair) {
  int bits;
  __builtin_memcpy(&bits, pair, 4);
  return _mm512_set1_epi32(bits);
}

// sums += a * b for the first kRows rows of an A block and a B block (see bf16_blocks.h). For every pair of depth two loads
// of B and kRows broadcasts of A feed 2 kRows instructions, so 8 to 14 rows keep the unit busy and fill the registers.
template <int kRows>
inline __attribute__((always_inline)) void dot_block(Vec (&sums)[kRows][kBlockVecs], const bf16* a, const bf16* b) {
#pragma GCC unroll 4
  for (int pair = 0; pair < kPairs; ++pair) {
    const __m512i b0 = _mm512_load_si512(b + pair * kBlock);
    const __m512i b1 = _mm512_load_si512(b + pair * kBlock + kTileElements);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = broadcast_pair(a + r * kBlock + 2 * pair);
      sums[r][0] = dot_pairs(sums[r][0], x, b0);
      sums[r][1] = dot_pairs(sums[r][1], x, b1);
    }
  }
}

}  // namespace llmfast::LLMFAST_TARGET
