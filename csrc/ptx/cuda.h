// The CUDA language for kernels: nvcc's own, or the emulation of it (ptx/emulated/) when a plain C++ compiler reads the
// same source. Kernels live in namespace llmfast::cuda, contain no asm and include no header of the CUDA toolkit.
// `extern __shared__` cannot be emulated: dynamic_shared() stands for it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/types.h"
#ifndef __CUDACC__
#include "ptx/emulated/language.h"
#endif

namespace llmfast::cuda {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

#ifdef __CUDACC__

// The block's dynamic shared memory, which all kernels of a launch see as one array.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}

// The address that ldmatrix and cp.async take, of something in dynamic shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#else

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulated::shared_memory());
}
inline uint32_t shared_address(const void* pointer) { return emulated::shared_address(pointer); }

#endif

// Number of this thread in its block; its warp and its place there. Blocks are one-dimensional.
__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kWarpSize); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / kWarpSize); }

}  // namespace llmfast::cuda
