// Sums over the threads that share a row, in a fixed order; every thread gets them.
#pragma once
#include "ptx/warp.h"

namespace llmfast::cuda {

// kCount sums at a time, over a warp or over a block of at most kMostThreads threads. A block's calls take turns with
// two places in shared memory: whoever writes a place has passed the barrier behind the last reads of it.
template <bool kWarpOnly, int kMostThreads, int kCount>
struct RowSum {
  int turn = 0;

  __device__ __forceinline__ void operator()(float (&value)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = warp_sum(value[i]);
    if (kWarpOnly) return;
    __shared__ float parts[2][kMostThreads / kWarpSize][kCount];
    if (lane() == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) parts[turn][warp()][i] = value[i];
    }
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = 0;
    for (int w = 0; w < warps; ++w) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] += parts[turn][w][i];
    }
    turn ^= 1;
  }
};

}  // namespace llmfast::cuda
