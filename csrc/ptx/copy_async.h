// cp.async: global to shared memory without registers. A thread's copies since its last commit form a group; after
// copy_async_wait<N>() all but its N youngest groups have arrived for this thread, and a barrier shows them to others.
// `to` is a shared_address(). Of the piece's bytes the first `valid` are read and the rest become zeros, so that a tail
// costs nothing; with valid = 0 nothing is read, whatever `from` is.
#pragma once
#include "ptx/cuda.h"

namespace llmfast::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void copy_async_8(uint32_t to, const void* from, int valid = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(uint32_t to, const void* from, int valid = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kYoungest>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kYoungest) : "memory");
}

#else

inline void copy_async_16(uint32_t to, const void* from, int valid = 16) { emulated::copy_async(to, from, 16, valid); }
inline void copy_async_8(uint32_t to, const void* from, int valid = 8) { emulated::copy_async(to, from, 8, valid); }
inline void copy_async_4(uint32_t to, const void* from, int valid = 4) { emulated::copy_async(to, from, 4, valid); }
inline void copy_async_commit() { emulated::copy_async_commit(); }
template <int kYoungest>
inline void copy_async_wait() {
  emulated::copy_async_wait(kYoungest);
}

#endif

}  // namespace llmfast::cuda
