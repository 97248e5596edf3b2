// Products of blocks in vector registers, on AVX512_BF16: three strips of rows whose sums stay in 20 or 22 registers.
#pragma once
#include "simd/dot_bf16.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

struct BlockState {};

// kRows rows of c. Out of line: inlined beside vector work, gcc spills the sums.
template <int kRows, Sum kSum>
__attribute__((noinline)) void multiply_strip(float* c, Blocks a, Blocks b, int64_t depth) {
  Vec sums[kRows][kBlockVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kBlockVecs; ++v)
      sums[r][v] = kSum == Sum::fresh ? Vec::zero() : Vec::load(c + r * kBlock + v * Vec::kLanes);
  for (int64_t i = 0; i < depth; ++i) dot_block<kRows>(sums, a.first + i * a.step, b.first + i * b.step);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kBlockVecs; ++v) sums[r][v].store(c + r * kBlock + v * Vec::kLanes);
}

template <Sum kSum, class Work>
inline __attribute__((always_inline)) void multiply_blocks(float* c, Blocks a, Blocks b, int64_t depth, Work& work,
                                                           int64_t share) {
  constexpr int kStrip = 11, kRest = static_cast<int>(kBlock) - 2 * kStrip;
  const auto rows_from = [&](int64_t row) { return Blocks{a.first + row * kBlock, a.step}; };
  multiply_strip<kStrip, kSum>(c, a, b, depth);
  multiply_strip<kStrip, kSum>(c + kStrip * kBlock, rows_from(kStrip), b, depth);
  multiply_strip<kRest, kSum>(c + 2 * kStrip * kBlock, rows_from(2 * kStrip), b, depth);
  work.step(depth * share);
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
