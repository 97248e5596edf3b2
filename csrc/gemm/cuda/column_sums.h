// Sums over the rows of a matrix [M, N] with any strides: bias gradients. Two passes in a fixed order: blocks sum
// kSumRows rows of a group of columns each, contiguous rows by 16-byte loads; then eight warps of a kernel that is
// launched early add the blocks' sums.
// `Product`: as in gemm.h's add_parts.
#pragma once
#include "core/cuda_launch.h"
#include "core/types.h"
#include "gemm/cuda/schedule.h"
#include "ptx/convert.h"
#include "ptx/grid.h"
#include "ptx/memory.h"

namespace llmfast::cuda {

constexpr int kSumRows = 256, kSumThreads = 256, kSumLanes = kSumThreads / 32;

constexpr int64_t column_sums_workspace(int64_t M, int64_t N) { return ceil_div(M, kSumRows) * N; }  // floats

template <class Product, class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_rows_kernel(const T* x, int64_t stride_m, int64_t stride_n, int64_t M, int64_t N, float* parts) {
  let_next_kernel_start();
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

// Eight lanes read 128 bytes of a row, the others of a warp the next three rows, the other warps those after.
template <class Product, class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_row_chunks_kernel(const T* x, int64_t stride_m, int64_t M, int64_t N, float* parts) {
  let_next_kernel_start();
  constexpr int kColumns = 16 / sizeof(T), kRowsAtOnce = kSumThreads / 8;
  const int64_t n = (blockIdx.x * int64_t{8} + lane() % 8) * kColumns;
  const int64_t first = blockIdx.y * int64_t{kSumRows} + warp() * 4 + lane() / 8;
  float sum[kColumns] = {};
  if (n < N) {
    Bytes16 rows[kSumRows / kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kSumRows / kRowsAtOnce; ++i) {
      const int64_t m = first + i * kRowsAtOnce;
      rows[i] = m < M ? load<Bytes16>(x + m * stride_m + n) : Bytes16{};
    }
#pragma unroll
    for (int i = 0; i < kSumRows / kRowsAtOnce; ++i)
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        if constexpr (sizeof(T) == 2) {
          float low, high;
          unpack_pair<T>(rows[i].word[word], low, high);
          sum[2 * word] += low, sum[2 * word + 1] += high;
        } else {
          sum[word] += __uint_as_float(rows[i].word[word]);
        }
      }
  }
  float* sums = dynamic_shared<float>();
#pragma unroll
  for (int e = 0; e < kColumns; ++e) {
    sum[e] += __shfl_xor_sync(kAllLanes, sum[e], 8);
    sum[e] += __shfl_xor_sync(kAllLanes, sum[e], 16);
    if (lane() < 8) sums[warp() * 8 * kColumns + lane() * kColumns + e] = sum[e];
  }
  __syncthreads();
  const int64_t column = blockIdx.x * int64_t{8 * kColumns} + thread();
  if (static_cast<int>(thread()) >= 8 * kColumns || column >= N) return;
  float total = sums[thread()];
#pragma unroll
  for (int i = 1; i < kSumLanes; ++i) total += sums[i * 8 * kColumns + thread()];
  parts[blockIdx.y * N + column] = total;
}

template <class Product, class T>
__global__ void __launch_bounds__(kSumThreads)
    add_column_parts_kernel(const float* parts, int64_t count, int64_t N, T* out) {
  const int64_t n = blockIdx.x * int64_t{32} + lane(), each = ceil_div(count, kSumLanes), first = warp() * each;
  const int64_t end = first + each < count ? first + each : count;
  float sum = 0.0f;
  wait_for_previous_kernel();
  if (n < N) {
#pragma unroll 8
    for (int64_t p = first; p < end; ++p) sum += parts[p * N + n];
  }
  float* sums = dynamic_shared<float>();
  sums[thread()] = sum;
  __syncthreads();
  if (warp() != 0 || n >= N) return;
#pragma unroll
  for (int i = 1; i < kSumLanes; ++i) sum += sums[i * 32 + lane()];
  out[n] = from_float<T>(sum);
}

// out[N] = sums of parts [count][N].
template <class Product, class T>
void add_column_parts(const float* parts, int64_t count, int64_t N, T* out, const Stream& stream) {
  launch_early(stream, {static_cast<unsigned>(ceil_div(N, 32))}, kSumThreads, kSumThreads * sizeof(float),
               add_column_parts_kernel<Product, T>, parts, count, N, out);
}

// out[N] = sums; `workspace`: column_sums_workspace(M, N) floats.
template <class Product, class T>
void column_sums(const T* x, int64_t stride_m, int64_t stride_n, int64_t M, int64_t N, T* out, float* workspace,
                 const Stream& stream) {
  constexpr int kColumns = 16 / sizeof(T);
  const auto parts = static_cast<unsigned>(ceil_div(M, kSumRows));
  if (stride_n == 1 && N % kColumns == 0 && stride_m % kColumns == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0)
    launch(stream, {static_cast<unsigned>(ceil_div(N, 8 * kColumns)), parts}, kSumThreads,
           kSumLanes * 8 * kColumns * sizeof(float), sum_row_chunks_kernel<Product, T>, x, stride_m, M, N, workspace);
  else
    launch(stream, {static_cast<unsigned>(ceil_div(N, 32)), parts}, kSumThreads, kSumThreads * sizeof(float),
           sum_rows_kernel<Product, T>, x, stride_m, stride_n, M, N, workspace);
  add_column_parts<Product>(workspace, parts, N, out, stream);
}

}  // namespace llmfast::cuda
