// A kernel's start under the end of the one before it on the stream (programmatic dependent launch, compute capability
// 9.0; see launch_early() in core/cuda_launch.h). Elsewhere, and for kernels launched otherwise, both do nothing.
#pragma once
#include "ptx/cuda.h"

namespace llmfast::cuda {

#ifdef __CUDACC__

// A kernel that is launched early may start once every block of this one has called this, or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernel before has ended; then its writes are seen. All threads of an early kernel call it before they touch
// global memory.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#else

inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

#endif

}  // namespace llmfast::cuda
