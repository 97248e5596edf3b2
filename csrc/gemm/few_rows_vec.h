// Products with few rows of A (decode, small batches), where B = W^T for a weight W[N,K] with contiguous rows: dot products
// straight from W, no packing. W is read from memory once for up to Kernel::kFewRows rows; with 1 to kDotRows of them that is
// what the time goes into.
//
// Up to kDotRows rows take one row of W at a time: one stream is what the prefetcher follows (Zen 3, bf16, K = 576,
// two threads: 26 GB/s; four rows of W side by side 8 to 15). More rows are bound by fma, and take two rows of W, which
// stay in L1 for all of them.
#pragma once
#include "core/parallel.h"
#include "gemm/gather.h"

namespace llmfast::LLMFAST_TARGET {

constexpr int kDotRows = 4;

// sums[m] = x[m] . w, lane by lane, for kM rows of x (float32); several sums along K hide the latency of fma.
template <int kM, class T>
inline void dot_row(const float* x, int64_t ldx, const T* w, int64_t K, Vec* sums) {
  constexpr int kSums = kM == 1 ? 4 : 2;
  constexpr int64_t kStep = kSums * Vec::kLanes;
  Vec acc[kM][kSums];
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) acc[m][s] = Vec::zero();
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) {
    prefetch_ahead(w + k, kStep);
    Vec weights[kSums];
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) weights[s] = Vec::load(w + k + s * Vec::kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s)
        acc[m][s] = fma(Vec::load(x + m * ldx + k + s * Vec::kLanes), weights[s], acc[m][s]);
  }
  for_each_vec(K - k, [&](int64_t i, auto lanes) {
    const Vec weights = lanes.load(w + k + i);
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) acc[m][0] = fma(lanes.load(x + m * ldx + k + i), weights, acc[m][0]);
  });
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) {
    Vec sum = acc[m][0];
#pragma GCC unroll 4
    for (int s = 1; s < kSums; ++s) sum = sum + acc[m][s];
    sums[m] = sum;
  }
}

// out[m][j] = sum_k x[m][k] * w[j][k] for kM rows of x and kJ rows of w. kFetches: reads the rows of W two tiles on, between the
// sums. A burst of prefetches before them fills the buffers that their loads need (M=8 from memory, K = 576: 1.4 times as
// long); 4 KiB on in place of those rows is up to a fifth slower at K = 4096. float32 gains too, unlike a single row's.
template <int kM, int kJ, bool kFetches, class T>
inline void dot_block(const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t K, float* out, int64_t ldo) {
  Vec acc[kM][kJ];
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kJ; ++j) acc[m][j] = Vec::zero();
  for_each_vec(K, [&](int64_t k, auto lanes) {
    Vec weights[kJ];
#pragma GCC unroll 4
    for (int j = 0; j < kJ; ++j) {
      if (kFetches) __builtin_prefetch(w + (2 * kJ + j) * ldw + k, 0, 2);
      weights[j] = lanes.load(w + j * ldw + k);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) {
      const Vec values = lanes.load(x + m * ldx + k);
#pragma GCC unroll 4
      for (int j = 0; j < kJ; ++j) acc[m][j] = fma(values, weights[j], acc[m][j]);
    }
  });
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kJ; ++j) out[m * ldo + j] = reduce_add(acc[m][j]);
}

// kM rows of x with `count` rows of w, whose lanes are summed for a register of results at once.
template <int kM, class T>
void dot_columns(const float* x, const T* w, int64_t ldw, int64_t K, int64_t count, float* out, int64_t ldo) {
  constexpr int kL = Vec::kLanes, kAtOnce = kL / kM;  // rows of w
  static_assert(kAtOnce > 0);
  for (int64_t j = 0; j < count; j += kAtOnce) {
    Vec sums[kL];
    for (int i = 0; i < kL; ++i) sums[i] = Vec::zero();
    const int64_t rows = count - j < kAtOnce ? count - j : kAtOnce;
    for (int64_t i = 0; i < rows; ++i) dot_row<kM>(x, K, w + (j + i) * ldw, K, sums + i * kM);
    float totals[kL];
    sum_each(sums).store(totals);
    for (int64_t i = 0; i < rows; ++i)
      for (int m = 0; m < kM; ++m) out[m * ldo + j + i] = totals[i * kM + m];
  }
}

// M > kDotRows rows of x with `count` rows of w.
template <class T>
void dot_tiles(const float* x, int64_t M, const T* w, int64_t ldw, int64_t K, int64_t count, float* out, int64_t ldo) {
  for (int64_t j = 0; j < count; j += 2) {
    const T* rows = w + j * ldw;
    int64_t m = 0;
    if (j + 2 <= count) {
      dot_block<kDotRows, 2, true>(x, K, rows, ldw, K, out + j, ldo);
      for (m = kDotRows; m + kDotRows <= M; m += kDotRows)
        dot_block<kDotRows, 2, false>(x + m * K, K, rows, ldw, K, out + m * ldo + j, ldo);
      for (; m < M; ++m) dot_block<1, 2, false>(x + m * K, K, rows, ldw, K, out + m * ldo + j, ldo);
    } else {
      for (; m < M; ++m) dot_columns<1>(x + m * K, rows, ldw, K, 1, out + m * ldo + j, ldo);
    }
  }
}

template <class T>
void few_rows(const float* x, const T* w, int64_t ldw, GemmSize size, EpilogueRef epilogue) {
  const int64_t panels = (size.N + Kernel::kCols - 1) / Kernel::kCols;
  parallel_for(panels, 1 + (int64_t{1} << 15) / (Kernel::kCols * size.K), [&](int64_t first, int64_t last) {
    float out[Kernel::kFewRows * Kernel::kCols];
    for (int64_t n = first * Kernel::kCols; n < last * Kernel::kCols && n < size.N; n += Kernel::kCols) {
      const int64_t count = size.N - n < Kernel::kCols ? size.N - n : Kernel::kCols;
      const T* rows = w + n * ldw;
      switch (size.M) {
        case 1: dot_columns<1>(x, rows, ldw, size.K, count, out, Kernel::kCols); break;
        case 2: dot_columns<2>(x, rows, ldw, size.K, count, out, Kernel::kCols); break;
        case 3: dot_columns<3>(x, rows, ldw, size.K, count, out, Kernel::kCols); break;
        case 4: dot_columns<4>(x, rows, ldw, size.K, count, out, Kernel::kCols); break;
        default: dot_tiles(x, size.M, rows, ldw, size.K, count, out, Kernel::kCols);
      }
      epilogue(out, 0, n, size.M, count);
    }
  });
}

inline void gemm_few_rows(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  const float* x = gather_rows(a, size);
  switch (b.dtype) {
    case DType::bf16: return few_rows(x, static_cast<const bf16*>(b.data), b.col_stride, size, epilogue);
    case DType::f16: return few_rows(x, static_cast<const fp16*>(b.data), b.col_stride, size, epilogue);
    default: return few_rows(x, static_cast<const float*>(b.data), b.col_stride, size, epilogue);
  }
}

}  // namespace llmfast::LLMFAST_TARGET
