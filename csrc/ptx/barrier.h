// Named barriers 1 to 15, for a part of the block; 0 is __syncthreads(). `threads` counts all that sync or arrive and
// is a multiple of 32. Pass constants: a barrier number known only at run time reserves all sixteen.
#pragma once
#include "ptx/cuda.h"

namespace llmfast::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#else

inline void barrier_sync(int barrier, int threads) { emulated::meet_block(barrier, threads, true, "barrier_sync", 0); }
inline void barrier_arrive(int barrier, int threads) {
  emulated::meet_block(barrier, threads, false, "barrier_arrive", 0);
}

#endif

}  // namespace llmfast::cuda
