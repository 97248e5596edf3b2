// Mean and reciprocal standard deviation of a row: the forward pass needs those of the float32 sum, the backward pass
// those of the sum as it was rounded.
#pragma once
#include "norm/norm.h"
#include "simd/stream.h"
#include "simd/unrolled.h"

namespace llmfast::LLMFAST_TARGET {

using AddRow = float (*)(const void* x, const void* residual, void* summed, float* row, int64_t C, bool stream);

// row[C] = x + residual in float32, rounded -> summed; without residual row = x. Returns the sum of the row (centred),
// or that of its squares.
template <class X, class R, bool kCentred>
float add_row(const void* x_row, const void* residual_row, void* summed_row, float* row, int64_t C, bool stream) {
  const X* x = static_cast<const X*>(x_row);
  const R* residual = static_cast<const R*>(residual_row);
  R* summed = static_cast<R*>(summed_row);
  FourSums sum;
  for_each_vec_of_four(C, [&](int64_t i, auto lanes, int u) __attribute__((always_inline)) {
    Vec total = lanes.load(x + i);
    if (residual) {
      total = total + lanes.load(residual + i);
      put(total, summed + i, lanes, stream);
    }
    total.store(row + i);
    sum.part[u] = kCentred ? sum.part[u] + total : fma(total, total, sum.part[u]);
  });
  return sum.total();
}

inline AddRow choose_add_row(DType x, DType residual, bool centred) {
  AddRow chosen = nullptr;
  visit_float(x, [&](auto x_type) {
    visit_float(residual, [&](auto residual_type) {
      using X = decltype(x_type);
      using R = decltype(residual_type);
      chosen = centred ? &add_row<X, R, true> : &add_row<X, R, false>;
    });
  });
  return chosen;
}

inline float squared_gap(const float* row, float mean, int64_t C) {
  const Vec centre = Vec::set(mean);
  FourSums sum;
  for_each_vec_of_four(C, [&](int64_t i, auto lanes, int u) __attribute__((always_inline)) {
    const Vec gap = keep(Vec::load(row + i) - centre, lanes);
    sum.part[u] = fma(gap, gap, sum.part[u]);
  });
  return sum.total();
}

struct Statistics {
  float mean, rstd;
};

// From what add_row left. A second pass over the row, since E[x^2] - mean^2 cancels for large means.
inline Statistics statistics_of(const float* row, float sum, int64_t C, float eps, bool centred) {
  const float mean = centred ? sum / static_cast<float>(C) : 0.0f;
  const float squares = centred ? squared_gap(row, mean, C) : sum;
  return {mean, 1.0f / __builtin_sqrtf(squares / static_cast<float>(C) + eps)};
}

}  // namespace llmfast::LLMFAST_TARGET
