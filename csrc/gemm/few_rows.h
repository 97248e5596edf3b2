// Products with few rows of A (decode, small batches), where B = W^T for a weight W[N,K] with contiguous rows: dot products
// straight from W, no packing. Memory-bound: W is read once for up to kFewRows rows.
#pragma once
#include "core/parallel.h"
#include "core/workspace.h"
#include "gemm/product.h"

namespace llmfast::LLMFAST_TARGET {

constexpr int kFewRows = 4;

// out[m][j] = sum_k x[m][k] * w[j][k] for kM rows of x (float32) and kJ rows of w.
template <int kM, int kJ, class T>
inline void dot_block(const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t K, float* out, int64_t ldo) {
  Vec acc[kM][kJ];
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kJ; ++j) acc[m][j] = Vec::zero();
  for_each_vec(K, [&](int64_t k, auto lanes) {
    Vec weights[kJ];
#pragma GCC unroll 4
    for (int j = 0; j < kJ; ++j) weights[j] = lanes.load(w + j * ldw + k);
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

template <int kM, class T>
void dot_columns(const float* x, const T* w, int64_t ldw, int64_t K, int64_t count, float* out, int64_t ldo) {
  constexpr int kJ = kM <= 2 ? 4 : 2;
  int64_t j = 0;
  for (; j + kJ <= count; j += kJ) dot_block<kM, kJ>(x, K, w + j * ldw, ldw, K, out + j, ldo);
  for (; j < count; ++j) dot_block<kM, 1>(x, K, w + j * ldw, ldw, K, out + j, ldo);
}

template <int kM, class T>
void few_rows(const float* x, const T* w, int64_t ldw, GemmSize size, EpilogueRef epilogue) {
  const int64_t panels = (size.N + Kernel::kCols - 1) / Kernel::kCols;
  parallel_for(panels, 1 + (int64_t{1} << 15) / (Kernel::kCols * size.K), [&](int64_t first, int64_t last) {
    float out[kM * Kernel::kCols];
    for (int64_t n = first * Kernel::kCols; n < last * Kernel::kCols && n < size.N; n += Kernel::kCols) {
      const int64_t count = size.N - n < Kernel::kCols ? size.N - n : Kernel::kCols;
      dot_columns<kM>(x, w + n * ldw, ldw, size.K, count, out, Kernel::kCols);
      epilogue(out, 0, n, kM, count);
    }
  });
}

template <class T>
void few_rows(const float* x, const T* w, int64_t ldw, GemmSize size, EpilogueRef epilogue) {
  switch (size.M) {
    case 1: return few_rows<1>(x, w, ldw, size, epilogue);
    case 2: return few_rows<2>(x, w, ldw, size, epilogue);
    case 3: return few_rows<3>(x, w, ldw, size, epilogue);
    case 4: return few_rows<4>(x, w, ldw, size, epilogue);
  }
}

inline void gemm_few_rows(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  float* x = workspace<float>(Slot::packed_a, size.M * size.K);
  for (int64_t m = 0; m < size.M; ++m)  // rows of A as contiguous float32
    for (int64_t k = 0; k < size.K; ++k) {
      const int64_t i = m * a.row_stride + k * a.col_stride;
      x[m * size.K + k] = a.dtype == DType::f32    ? static_cast<const float*>(a.data)[i]
                          : a.dtype == DType::bf16 ? to_float(static_cast<const bf16*>(a.data)[i])
                                                   : to_float(static_cast<const fp16*>(a.data)[i]);
    }
  switch (b.dtype) {
    case DType::bf16: return few_rows(x, static_cast<const bf16*>(b.data), b.col_stride, size, epilogue);
    case DType::f16: return few_rows(x, static_cast<const fp16*>(b.data), b.col_stride, size, epilogue);
    default: return few_rows(x, static_cast<const float*>(b.data), b.col_stride, size, epilogue);
  }
}

}  // namespace llmfast::LLMFAST_TARGET
