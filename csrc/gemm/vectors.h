// Row vectors that go with a product: biases as float32, and column sums for their gradients.
#pragma once
#include "core/parallel.h"
#include "core/workspace.h"
#include "gemm/epilogue.h"

namespace llmfast::LLMFAST_TARGET {

// A vector as float32: in place if it is contiguous float32, else converted into `buffer` (shape[0] + kLanes floats);
// nullptr if undefined.
inline const float* as_float(const TensorView& v, float* buffer) {
  if (!v.defined) return nullptr;
  if (v.dtype == DType::f32 && v.contiguous()) return v.as<const float>();
  visit_float(v.dtype, [&](auto type) {
    const auto* values = v.as<const decltype(type)>();
    for (int64_t i = 0; i < v.shape[0]; ++i) buffer[i] = to_float(values[i * v.stride[0]]);
  });
  return buffer;
}

// sums[n] = sum over m of x[m][n], in float32, then rounded to `sums`' dtype. Threads share the columns, so the order of
// additions does not depend on their number; rows go four at a time, in stretches long enough for the prefetchers.
template <class T>
void column_sums(const T* x, int64_t row_stride, int64_t col_stride, int64_t M, int64_t N, const TensorView& sums) {
  constexpr int64_t kColumns = 512, kFewColumns = 128, kRows = 4;  // accumulators of a column block stay in L1
  // narrower where there would not be one for each thread
  const int64_t columns = N >= kColumns * omp_get_max_threads() ? kColumns : kFewColumns;
  visit_float(sums.dtype, [&](auto type) {
    auto* out = sums.as<decltype(type)>();
    parallel_for((N + columns - 1) / columns, 1 + (int64_t{1} << 14) / (columns * (M + 1)), [&](int64_t first, int64_t last) {
      for (int64_t n0 = first * columns; n0 < last * columns && n0 < N; n0 += columns) {
        const int64_t count = N - n0 < columns ? N - n0 : columns;
        float acc[kColumns + Vec::kLanes] = {};
        int64_t m = 0;
        for (; col_stride == 1 && m + kRows <= M; m += kRows) {
          const T *a = x + m * row_stride + n0, *b = a + row_stride, *c = b + row_stride, *d = c + row_stride;
          for_each_vec(count, [&](int64_t i, auto lanes) {
            const Vec sum = (lanes.load(a + i) + lanes.load(b + i)) + (lanes.load(c + i) + lanes.load(d + i));
            (Vec::load(acc + i) + sum).store(acc + i);
          });
        }
        for (; m < M; ++m) {
          const T* row = x + m * row_stride + n0 * col_stride;
          if (col_stride == 1) {
            for_each_vec(count, [&](int64_t i, auto lanes) { (Vec::load(acc + i) + lanes.load(row + i)).store(acc + i); });
          } else {
            for (int64_t i = 0; i < count; ++i) acc[i] += to_float(row[i * col_stride]);
          }
        }
        for_each_vec(count, [&](int64_t i, auto lanes) { lanes.store(Vec::load(acc + i), out + n0 + i); });
      }
    });
  });
}

inline void column_sums(const TensorView& x, const TensorView& sums) {
  visit_float(x.dtype, [&](auto type) {
    column_sums(x.as<const decltype(type)>(), x.stride[0], x.stride[1], x.shape[0], x.shape[1], sums);
  });
}

}  // namespace llmfast::LLMFAST_TARGET
