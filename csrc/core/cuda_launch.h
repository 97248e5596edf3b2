// Launches a kernel on the caller's stream: nvcc's runtime, or the emulated machine in a plain C++ build.
#pragma once
#include <cstddef>

#include "core/cuda_stream.h"
#include "ptx/cuda.h"
#ifndef __CUDACC__
#include <tuple>
#endif

namespace llmfast {

struct Grid {
  unsigned x, y = 1, z = 1;
};

#ifdef __CUDACC__

inline void require_success(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw CudaError(std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// Arguments are converted to the kernel's parameter types here. A launch error is thrown; nothing waits.
template <class... Parameters, class... Arguments>
void launch(const Stream& stream, Grid grid, unsigned threads, size_t shared_bytes, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  constexpr size_t kSharedWithoutAsking = 48 << 10;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedWithoutAsking)
    require_success(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared_bytes)),
                    "shared memory of a kernel");
  [&](Parameters... values) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))...};
    require_success(cudaLaunchKernel(function, dim3(grid.x, grid.y, grid.z), dim3(threads), pointers, shared_bytes,
                                     static_cast<cudaStream_t>(stream.handle)),
                    "kernel launch");
  }(static_cast<Arguments&&>(arguments)...);
}

// How many blocks of this kernel a multiprocessor holds at once.
template <class... Parameters>
int blocks_per_multiprocessor(void (*kernel)(Parameters...), unsigned threads, size_t shared_bytes) {
  int blocks = 0;
  require_success(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel),
                                                                static_cast<int>(threads), shared_bytes),
                  "occupancy of a kernel");
  return blocks;
}

#else

template <class... Parameters, class... Arguments>
void launch(const Stream&, Grid grid, unsigned threads, size_t shared_bytes, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  const std::tuple<Parameters...> values(static_cast<Arguments&&>(arguments)...);
  emulated::run({grid.x, grid.y, grid.z}, {threads}, shared_bytes, [&] { std::apply(kernel, values); });
}

template <class... Parameters>
int blocks_per_multiprocessor(void (*)(Parameters...), unsigned, size_t) {
  return 2;
}

#endif

}  // namespace llmfast
