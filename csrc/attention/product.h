// The small matrix product behind every step of attention: c[rows][kWidth] = a[rows][depth] * b[depth][kWidth] in
// float32. a is read element by element and broadcast, so its rows and depth may lie anyhow (K or V tiles in place); b
// and c hold kWidth lanes a row. Scores have queries in lanes (K * Q^T), sums over queries have head dims there (P^T *
// dO). Register blocks are those of the GEMM micro-kernel; their remainders are 4, 2 and 1 rows (8 too where 14 are the
// rule), which head dims and key blocks that are multiples of 4 rarely leave.
#pragma once
#include "simd/vec.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int kWidthVecs = 2;
constexpr int kWidth = kWidthVecs * Vec::kLanes;

struct Broadcast {
  const float* data;
  int64_t row_stride, depth_stride;

  Broadcast rows_from(int64_t row) const { return {data + row * row_stride, row_stride, depth_stride}; }
};

struct Lanes {  // rows of kWidth floats
  float* data;
  int64_t stride;
};

// c = a * b, or c * keep + a * b with one factor a lane. Out of line: inlined, gcc spills the accumulators.
template <int kRows, bool kUnitRowStride>
__attribute__((noinline)) void product_rows(Broadcast a, Lanes b, int64_t depth, Lanes c, const float* keep) {
  constexpr int kL = Vec::kLanes;
  const float* broadcast = a.data;
  const float* lanes = b.data;
  const int64_t row_stride = kUnitRowStride ? 1 : a.row_stride;
  const int64_t depth_stride = kUnitRowStride ? a.depth_stride : 1;
  Vec acc[kRows][kWidthVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = Vec::zero();
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = Vec::load(lanes), b1 = Vec::load(lanes + kL);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = Vec::set(broadcast[r * row_stride]);
      acc[r][0] = fma(x, b0, acc[r][0]);
      acc[r][1] = fma(x, b1, acc[r][1]);
    }
    broadcast += depth_stride;
    lanes += b.stride;
  }
  float* out = c.data;
  if (keep) {
    const Vec keep0 = Vec::load(keep), keep1 = Vec::load(keep + kL);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      fma(keep0, Vec::load(out + r * c.stride), acc[r][0]).store(out + r * c.stride);
      fma(keep1, Vec::load(out + r * c.stride + kL), acc[r][1]).store(out + r * c.stride + kL);
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      acc[r][0].store(out + r * c.stride);
      acc[r][1].store(out + r * c.stride + kL);
    }
  }
}

template <int kRows, bool kUnitRowStride>
inline int64_t product_blocks(Broadcast a, Lanes b, int64_t row, int64_t rows, int64_t depth, Lanes c,
                              const float* keep) {
  for (; row + kRows <= rows; row += kRows)
    product_rows<kRows, kUnitRowStride>(a.rows_from(row), b, depth, {c.data + row * c.stride, c.stride}, keep);
  return row;
}

// c[rows][kWidth] = a * b; with keep: c * keep + a * b, where keep holds a factor a lane.
template <bool kUnitRowStride>
inline void product(Broadcast a, Lanes b, int64_t rows, int64_t depth, Lanes c, const float* keep) {
  int64_t row = 0;
  if constexpr (Vec::kRegisters == 32) {
    row = product_blocks<14, kUnitRowStride>(a, b, row, rows, depth, c, keep);
    row = product_blocks<8, kUnitRowStride>(a, b, row, rows, depth, c, keep);
  } else {
    row = product_blocks<6, kUnitRowStride>(a, b, row, rows, depth, c, keep);
  }
  row = product_blocks<4, kUnitRowStride>(a, b, row, rows, depth, c, keep);
  row = product_blocks<2, kUnitRowStride>(a, b, row, rows, depth, c, keep);
  product_blocks<1, kUnitRowStride>(a, b, row, rows, depth, c, keep);
}

// Rows of a are apart, its depth is contiguous: K * Q^T, V * dO^T, P^T * dO, dS^T * Q.
inline void product_by_rows(const float* a, int64_t row_stride, Lanes b, int64_t rows, int64_t depth, Lanes c,
                            const float* keep = nullptr) {
  product<false>({a, row_stride, 1}, b, rows, depth, c, keep);
}

// Rows of a are contiguous, its depth is apart: V^T * P^T, K^T * dS^T.
inline void product_by_depth(const float* a, int64_t depth_stride, Lanes b, int64_t rows, int64_t depth, Lanes c,
                             const float* keep = nullptr) {
  product<true>({a, 1, depth_stride}, b, rows, depth, c, keep);
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
