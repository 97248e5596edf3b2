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

inline void allow_shared(const void* kernel, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (bytes > kWithoutAsking)
    require_success(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "shared memory of a kernel");
}

// Arguments are converted to the kernel's parameter types here. A launch error is thrown; nothing waits.
template <class... Parameters, class... Arguments>
void launch(const Stream& stream, Grid grid, unsigned threads, size_t shared_bytes, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, shared_bytes);
  [&](Parameters... values) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))...};
    require_success(cudaLaunchKernel(function, dim3(grid.x, grid.y, grid.z), dim3(threads), pointers, shared_bytes,
                                     static_cast<cudaStream_t>(stream.handle)),
                    "kernel launch");
  }(static_cast<Arguments&&>(arguments)...);
}

// Whether a device runs this file's code for compute capability 9.0: made from PTX for less, kernels would not wait.
constexpr bool compiled_for_9_0() {
#ifdef __CUDA_ARCH_LIST__
  for (const int arch : {__CUDA_ARCH_LIST__})
    if (arch == 900) return true;
#endif
  return false;
}

// As launch(), for a kernel that calls wait_for_previous_kernel() (ptx/grid.h) before anything else: on compute
// capability 9.0 it starts as soon as the kernel before lets it, so that its launch is not waited for.
template <class... Parameters, class... Arguments>
void launch_early(const Stream& stream, Grid grid, unsigned threads, size_t shared_bytes,
                  void (*kernel)(Parameters...), Arguments&&... arguments) {
  const DeviceInfo& device = device_info(stream.device);
  if (!compiled_for_9_0() || device.major != 9 || device.minor != 0)
    return launch(stream, grid, threads, shared_bytes, kernel, static_cast<Arguments&&>(arguments)...);
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, shared_bytes);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &early;
  config.numAttrs = 1;
  [&](Parameters... values) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))...};
    require_success(cudaLaunchKernelExC(&config, function, pointers), "kernel launch");
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

template <class... Parameters, class... Arguments>
void launch_early(const Stream& stream, Grid grid, unsigned threads, size_t shared_bytes,
                  void (*kernel)(Parameters...), Arguments&&... arguments) {
  launch(stream, grid, threads, shared_bytes, kernel, static_cast<Arguments&&>(arguments)...);
}

template <class... Parameters>
int blocks_per_multiprocessor(void (*)(Parameters...), unsigned, size_t) {
  return 2;
}

#endif

}  // namespace llmfast
