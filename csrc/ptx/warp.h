// Sums and maxima over the lanes of a warp, or over aligned groups of kLanes of them; every lane gets the result. The
// order of the additions is fixed.
#pragma once
#include "ptx/cuda.h"

namespace llmfast::cuda {

template <int kLanes>
__device__ __forceinline__ float group_sum(float value) {
  static_assert(kLanes >= 1 && kLanes <= kWarpSize && (kLanes & (kLanes - 1)) == 0);
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

template <int kLanes>
__device__ __forceinline__ float group_max(float value) {
  static_assert(kLanes >= 1 && kLanes <= kWarpSize && (kLanes & (kLanes - 1)) == 0);
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, apart));
  return value;
}

__device__ __forceinline__ float warp_sum(float value) { return group_sum<kWarpSize>(value); }
__device__ __forceinline__ float warp_max(float value) { return group_max<kWarpSize>(value); }

}  // namespace llmfast::cuda
