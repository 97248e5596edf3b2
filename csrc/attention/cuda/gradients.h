// What the backward kernels share: two numbers a query row that a small kernel computes before them, and the step from
// products to weights and score gradients.
#pragma once
#include "attention/cuda/rows.h"
#include "attention/cuda/scores.h"
#include "core/cuda_launch.h"
#include "gemm/cuda/epilogue.h"
#include "gemm/cuda/schedule.h"
#include "ptx/warp.h"

namespace llmfast::cuda {

// Of a query row; [head][token of all sequences].
struct RowStatistics {
  float lse;    // in the log2 domain; +inf where the row passes no gradient: its weights are then 2^-inf = 0
  float delta;  // grad_out . out
};

__host__ __device__ inline int64_t rows_of_head(const AttentionParams& p) { return p.first_q ? p.Tq : p.B * p.Tq; }

__device__ inline const RowStatistics* statistics_of(const AttentionParams& p, int64_t head, const Sequence& sequence) {
  const int64_t first = p.first_q ? sequence.first_q : sequence.index * p.Tq;
  return reinterpret_cast<const RowStatistics*>(p.workspace) + head * rows_of_head(p) + first;
}

constexpr int kStatisticsThreads = 256;

// A warp a row, eight elements a lane: Dv <= 256.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads) row_statistics_kernel(const AttentionBackwardParams p) {
  const int64_t rows = rows_of_head(p), index = blockIdx.x * int64_t{kStatisticsThreads / kWarpSize} + warp();
  if (index >= rows * p.Hq) return;
  const int64_t head = index / rows, row = index % rows;
  const int64_t sequence = p.first_q ? 0 : row / p.Tq, token = p.first_q ? row : row % p.Tq;
  const int left = static_cast<int>(p.Dv) - lane() * 8, count = left < 0 ? 0 : left < 8 ? left : 8;
  float a[8], b[8], delta = 0.0f;
  load_columns(a, row_of<const T>(p.grad_out, sequence, head, token) + lane() * 8, count);
  load_columns(b, row_of<const T>(p.out, sequence, head, token) + lane() * 8, count);
#pragma unroll
  for (int i = 0; i < 8; ++i) delta = fmaf(a[i], b[i], delta);
  delta = warp_sum(delta);
  const float lse = *row_of<const float>(p.lse, sequence, head, token);
  const bool absent = lse < kNoGradient;
  if (lane() == 0)
    reinterpret_cast<RowStatistics*>(p.workspace)[index] = {absent ? infinity() : lse * kLog2E, absent ? 0.0f : delta};
}

template <class T>
void launch_row_statistics(const AttentionBackwardParams& p, const Stream& stream) {
  const int64_t blocks = ceil_div(rows_of_head(p) * p.Hq, kStatisticsThreads / kWarpSize);
  if (blocks > 0)
    launch(stream, {static_cast<unsigned>(blocks)}, kStatisticsThreads, 0, row_statistics_kernel<T>, p);
}

// products q . k -> scores, and products grad_out . v -> (grad_out . v - delta) * slope of the softcap: everything of
// the gradient but the weight.
__device__ inline void scale_pair(float& score, float& gradient, float delta, const ScoreScale& scale) {
  gradient -= delta;
  if (!scale.finished) return;
  score *= scale.product;
  if (scale.cap > 0.0f) {
    const float t = tanh_of(score);
    score = scale.cap * t;
    gradient *= fmaf(-t, t, 1.0f);
  }
}

}  // namespace llmfast::cuda
