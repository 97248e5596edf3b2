// linear_cross_entropy's epilogues on Hopper: a row of a tile lies in the four lanes of a quad, so that its sum of
// powers needs no shared memory; gradients of logits go out by boxes (gemm/cuda/hopper_boxes.h).
#pragma once
#include "gemm/cuda/hopper_boxes.h"
#include "linear_cross_entropy/cuda/driver.h"

namespace llmfast::cuda {

struct LogSumRows {
  static constexpr bool kRows = true;
  cross_entropy::LogSum* parts;  // [tile column][M]
  float* target_logits;
  const int64_t* target;
  int64_t M, N, first;  // as in LogSumEpilogue

  template <int kN>
  __device__ __forceinline__ void rows(float (&acc)[kN / 2], int m, int n) const {
    const int64_t first_row = m + warp() % 4 * 16 + lane() / 4;
    int64_t targets[2];  // asked for before the sums that hide their latency
#pragma unroll
    for (int half = 0; half < 2; ++half) targets[half] = first_row + half * 8 < M ? target[first_row + half * 8] : -1;
    // That exist, from this lane's first.
    const int columns = static_cast<int>(N - n < kN ? N - n : kN) - lane() % 4 * 2;
    if (columns < kN - 6) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i)
        if (i / 4 * 8 + i % 2 >= columns) acc[i] = cross_entropy::kLowest;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + half * 8;
      float top = acc[2 * half], sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kN / 4; ++i) top = fmaxf(top, acc[i / 2 * 4 + 2 * half + i % 2]);
      top = group_max<4>(top) * cross_entropy::kLog2E;
#pragma unroll
      for (int i = 0; i < kN / 4; ++i)
        sum += exp2_approx(fmaf(acc[i / 2 * 4 + 2 * half + i % 2], cross_entropy::kLog2E, -top));
      sum = group_sum<4>(sum);
      if (row >= M) continue;
      if (lane() % 4 == 0) parts[n / kN * M + row] = {top, sum};
      const int64_t here = targets[half] - first - n - lane() % 4 * 2;
      if (here >= 0 && here < columns && here % 8 < 2) {
#pragma unroll
        for (int i = 0; i < kN / 4; ++i)
          if (here == i / 2 * 8 + i % 2) target_logits[row] = acc[i / 2 * 4 + 2 * half + i % 2];
      }
    }
  }
};

template <>
struct OnHopper<cross_entropy::LogSumEpilogue> {
  template <class Body>
  static void visit(const cross_entropy::LogSumEpilogue& e, GemmShape shape, const Body& body) {
    body(LogSumRows{e.parts, e.target_logits, e.target, e.M, shape.N, e.first});
  }
};

template <class T>
struct LogitGradientBoxes {
  static constexpr int kSlabs = 2;
  TensorMap d_logits;
  const float *lse, *grad;
  const int64_t* target;
  int64_t M, first, ignore_index;

  __device__ __forceinline__ void box(float (&x)[32], int m, int n, Slabs<kSlabs>& slabs) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = m + warp() % 4 * 16 + lane() / 4 + half * 8, row = at < M ? at : M - 1;
      const int64_t t = target[row], here = t - first - n - lane() % 4 * 2;
      const float weight = t == ignore_index ? 0.0f : grad[row], shift = lse[row] * cross_entropy::kLog2E;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& logit = x[i / 2 * 4 + 2 * half + i % 2];
        logit = weight * exp2_approx(fmaf(logit, cross_entropy::kLog2E, -shift));
      }
      if (here >= 0 && here < 64 && here % 8 < 2) {
#pragma unroll
        for (int i = 0; i < 16; ++i)
          if (here == i / 2 * 8 + i % 2) x[i / 2 * 4 + 2 * half + i % 2] -= weight;
      }
    }
    slabs.store<T>(&d_logits, x, m, n);
  }
};

template <class T>
struct OnHopper<cross_entropy::LogitGradientEpilogue<T>> {
  template <class Body>
  static void visit(const cross_entropy::LogitGradientEpilogue<T>& e, GemmShape shape, const Body& body) {
    const TensorMap d_logits = make_tensor_map(mapped_boxes(e.d_logits, half_dtype<T>(), e.ld, shape));
    body(LogitGradientBoxes<T>{d_logits, e.lse, e.grad, e.target, shape.M, e.first, e.ignore_index});
  }
};

}  // namespace llmfast::cuda
