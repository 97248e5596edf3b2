// Sums over the rows of a matrix [M, N] with any strides: bias gradients. Two passes in a fixed order: blocks sum
// kSumRows rows of 32 columns each, then one thread a column adds the blocks' sums. `Product`: as in gemm.h's
// add_parts.
#pragma once
#include "core/cuda_launch.h"
#include "core/types.h"
#include "gemm/cuda/schedule.h"
#include "ptx/convert.h"

namespace llmfast::cuda {

constexpr int kSumRows = 256, kSumThreads = 256, kSumLanes = kSumThreads / 32;

constexpr int64_t column_sums_workspace(int64_t M, int64_t N) { return ceil_div(M, kSumRows) * N; }  // floats

template <class Product, class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_rows_kernel(const T* x, int64_t stride_m, int64_t stride_n, int64_t M, int64_t N, float* parts) {
  const int64_t n = blockIdx.x * int64_t{32} + lane(), first = blockIdx.y * int64_t{kSumRows};
  const int64_t end = first + kSumRows < M ? first + kSumRows : M;
  float sum = 0.0f;
  if (n < N) {
#pragma unroll 4
    for (int64_t m = first + warp(); m < end; m += kSumLanes) sum += to_float(x[m * stride_m + n * stride_n]);
  }
  float* sums = dynamic_shared<float>();
  sums[thread()] = sum;
  __syncthreads();
  if (warp() != 0 || n >= N) return;
#pragma unroll
  for (int i = 1; i < kSumLanes; ++i) sum += sums[i * 32 + lane()];
  parts[blockIdx.y * N + n] = sum;
}

template <class Product, class T>
__global__ void __launch_bounds__(kSumThreads)
    add_column_parts_kernel(const float* parts, int64_t count, int64_t N, T* out) {
  const int64_t n = blockIdx.x * int64_t{kSumThreads} + thread();
  if (n >= N) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t p = 0; p < count; ++p) sum += parts[p * N + n];
  out[n] = from_float<T>(sum);
}

// out[N] = sums; `workspace`: column_sums_workspace(M, N) floats.
template <class Product, class T>
void column_sums(const T* x, int64_t stride_m, int64_t stride_n, int64_t M, int64_t N, T* out, float* workspace,
                 const Stream& stream) {
  const int64_t parts = ceil_div(M, kSumRows);
  launch(stream, {static_cast<unsigned>(ceil_div(N, 32)), static_cast<unsigned>(parts)}, kSumThreads,
         kSumThreads * sizeof(float), sum_rows_kernel<Product, T>, x, stride_m, stride_n, M, N, workspace);
  launch(stream, {static_cast<unsigned>(ceil_div(N, kSumThreads))}, kSumThreads, 0, add_column_parts_kernel<Product, T>,
         static_cast<const float*>(workspace), parts, N, out);
}

}  // namespace llmfast::cuda
