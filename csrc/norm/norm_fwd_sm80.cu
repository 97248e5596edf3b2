// Residual sum + norm, forward; see norm.h for the formula.
//
//   1. load x and residual (all 16-byte loads of the row before the first use), total = x + residual in float32
//   2. summed = total, rounded; mean = sum(total) / C over the threads of the row
//   3. variance from a second pass over the registers: E[x^2] - mean^2 cancels for large means
//   4. normed = (total - mean) * rstd * weight + bias, rounded once
//
// A row belongs to one warp (up to 1024 columns, no barrier) or to one block; a thread holds up to four groups of eight
// columns, neighbours in neighbouring threads. Memory is read and written once. Rows above 16384 columns do not fit
// into registers: there each step reads x and residual again. Which dtypes there is code for: cuda/kinds.h. Registers of
// three groups a lane (nvcc 13.0.88): 62.
#include "core/cuda_elements.h"
#include "core/cuda_launch.h"
#include "core/cuda_row_sum.h"
#include "norm/cuda/kinds.h"
#include "norm/norm_cuda.h"

namespace llmfast::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;       // where a row belongs to a warp
constexpr int kMostThreads = 512;       // of a block that owns a row: 128 registers each
constexpr int kWarpColumns = 4 * kEight * kWarpSize;
constexpr int kBlockColumns = 4 * kEight * kMostThreads;

struct Operands {
  RowSet x, residual, weight, bias, normed, summed;
  float *mean, *rstd;
  uint32_t M;
  int C;
  float per_column;  // 1 / C
  float eps;
  bool centred;
};

__device__ __forceinline__ void store_statistics(const Operands& o, uint32_t row, float mean, float rstd) {
  if (o.mean) o.mean[row] = mean;
  if (o.rstd) o.rstd[row] = rstd;
}

// total = x + residual at `index`, rounded -> summed
__device__ __forceinline__ void add(const Eight& x, const Eight& residual, const RowPointer& x_row,
                                    const RowPointer& residual_row, const RowPointer& summed_row, Columns columns,
                                    float (&total)[kEight]) {
  widen(x, x_row.dtype, total);
  if (!residual_row) return;
  float addend[kEight];
  widen(residual, residual_row.dtype, addend);
#pragma unroll
  for (int j = 0; j < kEight; ++j) total[j] += addend[j];
  if (summed_row) store_floats(summed_row, columns, total);
}

// The part of eight elements in the sum (kSquares: of squared distances from `centre`).
template <bool kSquares>
__device__ __forceinline__ float part_of_sum(const float (&total)[kEight], Columns columns, int C, float centre) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    const float gap = columns.at(j) < C ? total[j] - centre : 0.0f;
    sum = kSquares ? fmaf(gap, gap, sum) : sum + gap;
  }
  return sum;
}

template <class Kinds>
__device__ __forceinline__ void normalize(const Operands& o, const RowPointer& normed, Columns columns, float mean,
                                          float rstd, const float (&total)[kEight]) {
  float weight[kEight], bias[kEight], y[kEight];
  load_floats(Kinds::Weights::row(o.weight, 0), columns, 1.0f, weight);
  load_floats(Kinds::Weights::row(o.bias, 0), columns, 0.0f, bias);
#pragma unroll
  for (int j = 0; j < kEight; ++j) y[j] = fmaf((total[j] - mean) * rstd, weight[j], bias[j]);
  store_floats(normed, columns, y);
}

template <class Kinds, int kGroups, bool kWarpPerRow>
__global__ void __launch_bounds__(kWarpPerRow ? kWarpsPerBlock * kWarpSize : kMostThreads, 1)
    norm_forward_kernel(const __grid_constant__ Operands o) {
  const uint32_t row = kWarpPerRow ? blockIdx.x * kWarpsPerBlock + warp() : blockIdx.x;
  const int first = kWarpPerRow ? lane() : thread(), threads = kWarpPerRow ? kWarpSize : static_cast<int>(blockDim.x);
  if (kWarpPerRow && row >= o.M) return;
  const RowPointer x_row = Kinds::X::row(o.x, row), normed_row = Kinds::Normed::row(o.normed, row);
  const RowPointer residual_row = Kinds::Stream::row(o.residual, row), summed_row = Kinds::Stream::row(o.summed, row);
  const auto columns = [&](int k) { return Columns(k, threads, first, Kinds::kApart); };
  RowSum<kWarpPerRow, kMostThreads, 1> row_sum;

  Eight x[kGroups], residual[kGroups];
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    x[k] = load_eight<true>(x_row, columns(k));
    if (residual_row) residual[k] = load_eight<true>(residual_row, columns(k));
  }
  float total[kGroups][kEight], sum[1] = {0}, squares[1] = {0};
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    add(x[k], residual[k], x_row, residual_row, summed_row, columns(k), total[k]);
    sum[0] += part_of_sum<false>(total[k], columns(k), o.C, 0.0f);
  }
  if (o.centred) row_sum(sum);
  const float mean = o.centred ? sum[0] * o.per_column : 0.0f;
#pragma unroll
  for (int k = 0; k < kGroups; ++k) squares[0] += part_of_sum<true>(total[k], columns(k), o.C, mean);
  row_sum(squares);
  const float rstd = rsqrtf(fmaf(squares[0], o.per_column, o.eps));
  if (first == 0) store_statistics(o, row, mean, rstd);
#pragma unroll
  for (int k = 0; k < kGroups; ++k) normalize<Kinds>(o, normed_row, columns(k), mean, rstd, total[k]);
}

// Any number of columns; every step reads the row again.
__global__ void __launch_bounds__(kMostThreads, 1) norm_forward_long_kernel(const __grid_constant__ Operands o) {
  const uint32_t row = blockIdx.x;
  const RowPointer x_row = o.x.row(row), residual_row = o.residual.row(row), normed_row = o.normed.row(row);
  RowSum<false, kMostThreads, 1> row_sum;
  const auto total_at = [&](int index, const RowPointer& summed_row, float(&total)[kEight]) {
    const Eight x = load_eight(x_row, index), residual = residual_row ? load_eight(residual_row, index) : Eight{};
    add(x, residual, x_row, residual_row, summed_row, index, total);
  };
  const RowPointer unwanted{};
  float total[kEight], sum[1] = {0}, squares[1] = {0};
  for (int index = thread() * kEight; index < o.C; index += kMostThreads * kEight) {
    total_at(index, o.summed.row(row), total);
    sum[0] += part_of_sum<false>(total, index, o.C, 0.0f);
  }
  row_sum(sum);
  const float mean = o.centred ? sum[0] * o.per_column : 0.0f;
  for (int index = thread() * kEight; index < o.C; index += kMostThreads * kEight) {
    total_at(index, unwanted, total);
    squares[0] += part_of_sum<true>(total, index, o.C, mean);
  }
  row_sum(squares);
  const float rstd = rsqrtf(fmaf(squares[0], o.per_column, o.eps));
  if (thread() == 0) store_statistics(o, row, mean, rstd);
  for (int index = thread() * kEight; index < o.C; index += kMostThreads * kEight) {
    total_at(index, unwanted, total);
    normalize<AnyKinds>(o, normed_row, index, mean, rstd, total);
  }
}

}  // namespace

void norm_forward_sm80(const NormParams& p, const Stream& stream) {
  const RowSet x(p.x);
  const Operands o{x,
                   RowSet(p.residual),
                   RowSet(p.weight),
                   RowSet(p.bias),
                   RowSet(p.normed),
                   RowSet(p.summed),
                   p.mean.as<float>(),
                   p.rstd.as<float>(),
                   static_cast<uint32_t>(x.rows.count),
                   x.C,
                   1.0f / static_cast<float>(x.C),
                   p.eps,
                   p.centred};
  if (o.C > kBlockColumns) return launch(stream, Grid{o.M}, kMostThreads, 0, norm_forward_long_kernel, o);
  visit_kinds(o.x, {&o.residual, &o.summed}, o.normed, {&o.weight, &o.bias}, [&](auto kinds) {
    using Kinds = decltype(kinds);
    if (o.C <= kWarpColumns) {
      const Grid grid{(o.M + kWarpsPerBlock - 1) / kWarpsPerBlock};
      const int groups = (o.C + kEight * kWarpSize - 1) / (kEight * kWarpSize);
      const auto kernel = groups == 1   ? norm_forward_kernel<Kinds, 1, true>
                          : groups == 2 ? norm_forward_kernel<Kinds, 2, true>
                          : groups == 3 ? norm_forward_kernel<Kinds, 3, true>
                                        : norm_forward_kernel<Kinds, 4, true>;
      launch(stream, grid, kWarpsPerBlock * kWarpSize, 0, kernel, o);
    } else {
      const int groups = o.C <= kBlockColumns / 2 ? 2 : 4;
      const int threads = (o.C + groups * kEight * kWarpSize - 1) / (groups * kEight * kWarpSize) * kWarpSize;
      const auto kernel = groups == 2 ? norm_forward_kernel<Kinds, 2, false> : norm_forward_kernel<Kinds, 4, false>;
      launch(stream, Grid{o.M}, threads, 0, kernel, o);
    }
  });
}

}  // namespace llmfast::cuda
