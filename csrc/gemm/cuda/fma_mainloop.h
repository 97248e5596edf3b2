// The float32 product of one 64x128 tile of C by fused multiply-adds, accurate to float32: 256 threads, each 4 rows by
// 8 neighbouring columns (8 by 8 spills at two blocks a multiprocessor). Depth goes 8 at a time through two
// shared-memory buffers, [k][mn], the next 8 waiting in registers. Any strides; the side with stride 1 is walked by
// neighbouring threads.
#pragma once
#include "gemm/cuda/operand.h"

namespace llmfast::cuda {

struct FmaTile {
  static constexpr int kM = 64, kN = 128, kK = 8, kThreads = 256;
  static constexpr int kPad = 4;  // floats between depths in shared memory: stores of neighbouring k do not collide
  static constexpr int kFloats = kK * (kM + kN + 2 * kPad);
  static constexpr int kBytes = 2 * kFloats * 4;
};

// A thread's share of the copies of one operand: kCopies elements of each tile, the same step apart.
template <int kMn>
class FmaLoader {
 public:
  static constexpr int kCopies = kMn * FmaTile::kK / FmaTile::kThreads, kRow = kMn + FmaTile::kPad;

  __device__ FmaLoader(const Operand& operand, int64_t first_mn, int64_t mn, int64_t first_k, int64_t end_k) {
    const bool along_k = operand.stride_k == 1;
    const int my_mn = along_k ? thread() / FmaTile::kK : thread() % kMn;
    const int my_k = along_k ? thread() % FmaTile::kK : thread() / kMn;
    step_mn_ = along_k ? FmaTile::kThreads / FmaTile::kK : 0;
    step_k_ = along_k ? 0 : FmaTile::kThreads / kMn;
    mn_left_ = static_cast<int>(mn - first_mn) - my_mn;
    k_left_ = static_cast<int>(end_k - first_k) - my_k;
    from_ = static_cast<const float*>(operand.data) + (first_mn + my_mn) * operand.stride_mn +
            (first_k + my_k) * operand.stride_k;
    step_ = step_mn_ * operand.stride_mn + step_k_ * operand.stride_k;
    advance_ = FmaTile::kK * operand.stride_k;
    to_ = my_k * kRow + my_mn;
    to_step_ = step_k_ * kRow + step_mn_;
  }

  // The elements of the next tile.
  __device__ void fetch_next(float (&x)[kCopies]) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      x[i] = i * step_mn_ < mn_left_ && i * step_k_ < k_left_ ? from_[i * step_] : 0.0f;
    from_ += advance_;
    k_left_ -= FmaTile::kK;
  }
  __device__ void put(float* tile, const float (&x)[kCopies]) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) tile[to_ + i * to_step_] = x[i];
  }

 private:
  const float* from_;
  int64_t step_, advance_;
  int step_mn_, step_k_, mn_left_, k_left_, to_, to_step_;
};

// Where a thread's 4x8 piece lies: eight neighbouring lanes hold neighbouring columns.
__device__ inline int fma_row() { return (warp() / 2 * 4 + lane() / 8) * 4; }
__device__ inline int fma_col() { return (warp() % 2 * 8 + lane() % 8) * 8; }

// Eight floats at `from`, a multiple of 16 bytes. Lanes whose numbers differ in bit 2 read their halves in opposite
// order, so that eight neighbours, 32 bytes apart, cover all banks.
__device__ inline void load_eight(float (&x)[8], const float* from) {
  const bool swapped = lane() / 4 % 2;
  const float4 first = load<float4>(from + (swapped ? 4 : 0)), second = load<float4>(from + (swapped ? 0 : 4));
  const float4 low = swapped ? second : first, high = swapped ? first : second;
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ inline void multiply_fma_tile(const Operand& a, const Operand& b, int64_t M, int64_t N, int64_t first_m,
                                         int64_t first_n, int64_t first_k, int64_t end_k, float* shared,
                                         float (&acc)[4][8]) {
  using LoaderA = FmaLoader<FmaTile::kM>;
  using LoaderB = FmaLoader<FmaTile::kN>;
  LoaderA load_a(a, first_m, M, first_k, end_k);
  LoaderB load_b(b, first_n, N, first_k, end_k);
  float next_a[LoaderA::kCopies], next_b[LoaderB::kCopies];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) acc[i][j] = 0.0f;

  load_a.fetch_next(next_a);
  load_b.fetch_next(next_b);
  int buffer = 0;
  for (int64_t k = first_k; k < end_k; k += FmaTile::kK, buffer ^= 1) {
    float *tile_a = shared + buffer * FmaTile::kFloats, *tile_b = tile_a + FmaTile::kK * LoaderA::kRow;
    load_a.put(tile_a, next_a);
    load_b.put(tile_b, next_b);
    __syncthreads();  // one is enough: the other buffer's readers have passed the barrier before this one
    if (k + FmaTile::kK < end_k) {
      load_a.fetch_next(next_a);
      load_b.fetch_next(next_b);
    }
#pragma unroll 2
    for (int depth = 0; depth < FmaTile::kK; ++depth) {
      const float4 row = load<float4>(tile_a + depth * LoaderA::kRow + fma_row());
      float col[8];
      load_eight(col, tile_b + depth * LoaderB::kRow + fma_col());
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        acc[0][j] = fmaf(row.x, col[j], acc[0][j]);
        acc[1][j] = fmaf(row.y, col[j], acc[1][j]);
        acc[2][j] = fmaf(row.z, col[j], acc[2][j]);
        acc[3][j] = fmaf(row.w, col[j], acc[3][j]);
      }
    }
  }
}

}  // namespace llmfast::cuda
