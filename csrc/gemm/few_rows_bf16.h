// Few rows of A and a weight with contiguous rows, bf16: both operands hold their pairs along K side by side, so a register
// of one times a register of the other is 32 products of the dot product, and nothing is packed or widened.
//
// Up to kDotRows rows of A take one row of W at a time, one stream for the prefetcher; W's bytes are what the time goes
// into. More rows take squares of 4 x 4 dot products, sixteen sums from eight loads; four rows of W stay in L1 for all of A.
// Sums of lanes are made for sixteen dot products at once.
#pragma once
#include "core/parallel.h"
#include "gemm/gather.h"
#include "simd/dot_bf16.h"

namespace llmfast::LLMFAST_TARGET {

constexpr int kDotRows = 4;
constexpr int kSquare = 4;
constexpr int64_t kDepthOfSquares = 2048;  // kSquare rows of W of this length are half of L1

// Row m of x from x.data + m * x.stride.
struct Rows {
  const bf16* data;
  int64_t stride;

  const bf16* operator[](int64_t row) const { return data + row * stride; }
};

// sums[m] = x[m] . w, lane by lane, for kM rows of x; several sums along K hide the latency of additions.
template <int kM>
inline __attribute__((always_inline)) void dot_row(Rows x, const bf16* w, int64_t K, Vec* sums) {
  constexpr int kSums = kM == 1 ? 4 : 2;
  Vec acc[kM][kSums];
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) acc[m][s] = Vec::zero();
  const auto add = [&](int64_t k, int s, __mmask32 lanes) __attribute__((always_inline)) {
    const __m512i weights = _mm512_maskz_loadu_epi16(lanes, w + k);
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) acc[m][s] = dot_pairs(acc[m][s], _mm512_maskz_loadu_epi16(lanes, x[m] + k), weights);
  };
  int64_t k = 0;
  for (; k + kSums * kBlock <= K; k += kSums * kBlock) {
    prefetch_ahead(w + k, kSums * kBlock);
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) add(k + s * kBlock, s, ~__mmask32{0});
  }
  for (; k < K; k += kBlock) add(k, 0, first_bf16_lanes(K - k));
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) {
    Vec sum = acc[m][0];
#pragma GCC unroll 4
    for (int s = 1; s < kSums; ++s) sum = sum + acc[m][s];
    sums[m] = sum;
  }
}

// out[m][j] = x[m] . w[j] for kM <= kDotRows rows of x and `count` rows of w.
template <int kM>
void dot_columns(Rows x, Rows w, int64_t K, int64_t count, float* out, int64_t ldo) {
  constexpr int kAtOnce = 16 / kM;  // rows of w, kM = 3: one sum is left out
  for (int64_t j = 0; j < count; j += kAtOnce) {
    Vec sums[16];
    for (Vec& sum : sums) sum = Vec::zero();
    const int64_t rows = count - j < kAtOnce ? count - j : kAtOnce;
    for (int64_t i = 0; i < rows; ++i) dot_row<kM>(x, w[j + i], K, sums + i * kM);
    float totals[16];
    sum_each(sums).store(totals);
    for (int64_t i = 0; i < rows; ++i)
      for (int m = 0; m < kM; ++m) out[m * ldo + j + i] = totals[i * kM + m];
  }
}

// The same for kSquare rows of x and of w, of which the first `rows` and `cols` are real; others repeat the last. Meanwhile
// reads `ahead_rows` rows ahead into L2.
inline __attribute__((noinline)) void dot_square(Rows x, Rows w, int64_t rows, int64_t cols, int64_t K, Rows ahead,
                                                 int64_t ahead_rows, bool add_to_out, float* out, int64_t ldo) {
  const bf16 *left[kSquare], *right[kSquare];
  for (int i = 0; i < kSquare; ++i) {
    left[i] = x[i < rows ? i : rows - 1];
    right[i] = w[i < cols ? i : cols - 1];
  }
  Vec acc[kSquare][kSquare];
#pragma GCC unroll 4
  for (int m = 0; m < kSquare; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kSquare; ++j) acc[m][j] = Vec::zero();
  const auto add = [&](int64_t k, __mmask32 lanes) __attribute__((always_inline)) {
    __m512i weights[kSquare];
#pragma GCC unroll 4
    for (int j = 0; j < kSquare; ++j) weights[j] = _mm512_maskz_loadu_epi16(lanes, right[j] + k);
#pragma GCC unroll 4
    for (int m = 0; m < kSquare; ++m) {
      const __m512i values = _mm512_maskz_loadu_epi16(lanes, left[m] + k);
#pragma GCC unroll 4
      for (int j = 0; j < kSquare; ++j) acc[m][j] = dot_pairs(acc[m][j], values, weights[j]);
    }
  };
  int64_t k = 0;
  for (; k + kBlock <= K; k += kBlock) {
    for (int64_t i = 0; i < ahead_rows; ++i) __builtin_prefetch(ahead[i] + k, 0, 2);
    add(k, ~__mmask32{0});
  }
  if (k < K) add(k, first_bf16_lanes(K - k));
  Vec sums[16];
#pragma GCC unroll 4
  for (int m = 0; m < kSquare; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kSquare; ++j) sums[m * kSquare + j] = acc[m][j];
  float totals[16];
  sum_each(sums).store(totals);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t j = 0; j < cols; ++j)
      out[m * ldo + j] = totals[m * kSquare + j] + (add_to_out ? out[m * ldo + j] : 0.0f);
}

inline void dot_squares(Rows x, int64_t M, Rows w, int64_t K, int64_t count, float* out, int64_t ldo) {
  const auto at_most = [](int64_t left) { return left < kSquare ? left : kSquare; };
  const int64_t squares = (M + kSquare - 1) / kSquare, share = (kSquare + squares - 1) / squares;  // of the rows ahead
  for (int64_t j = 0; j < count; j += kSquare)
    for (int64_t k = 0; k < K; k += kDepthOfSquares)
      for (int64_t m = 0, ahead = 0; m < M; m += kSquare, ahead += share)
        dot_square({x[m] + k, x.stride}, {w[j] + k, w.stride}, at_most(M - m), at_most(count - j),
                   K - k < kDepthOfSquares ? K - k : kDepthOfSquares, {w[j + kSquare + ahead] + k, w.stride},
                   ahead < kSquare ? share : 0, k > 0, out + m * ldo + j, ldo);
}

// Rows of A with contiguous K: in place, or copied.
inline Rows gather_pairs(const MatrixRef& a, GemmSize size) {
  const auto* data = static_cast<const bf16*>(a.data);
  if (a.col_stride == 1) return {data, a.row_stride};
  bf16* x = workspace<bf16>(Slot::packed_a, size.M * size.K);
  for (int64_t m = 0; m < size.M; ++m)
    for (int64_t k = 0; k < size.K; ++k) x[m * size.K + k] = data[m * a.row_stride + k * a.col_stride];
  return {x, size.K};
}

// C = epilogue(A * B) for up to kMostRows rows of A.
template <int64_t kMostRows>
void gemm_by_dots(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  const Rows x = gather_pairs(a, size), w = {static_cast<const bf16*>(b.data), b.col_stride};
  constexpr int64_t kPanel = Kernel::kCols;
  const int64_t panels = (size.N + kPanel - 1) / kPanel;
  parallel_for(panels, 1 + (int64_t{1} << 15) / (kPanel * size.K), [&](int64_t first, int64_t last) {
    alignas(64) float out[kMostRows * kPanel];
    for (int64_t n = first * kPanel; n < last * kPanel && n < size.N; n += kPanel) {
      const int64_t count = size.N - n < kPanel ? size.N - n : kPanel;
      const Rows rows = {w[n], w.stride};
      switch (size.M) {
        case 1: dot_columns<1>(x, rows, size.K, count, out, kPanel); break;
        case 2: dot_columns<2>(x, rows, size.K, count, out, kPanel); break;
        case 3: dot_columns<3>(x, rows, size.K, count, out, kPanel); break;
        case 4: dot_columns<4>(x, rows, size.K, count, out, kPanel); break;
        default:
          if constexpr (kMostRows > kDotRows) dot_squares(x, size.M, rows, size.K, count, out, kPanel);
      }
      epilogue(out, 0, n, size.M, count);
    }
  });
}

}  // namespace llmfast::LLMFAST_TARGET
