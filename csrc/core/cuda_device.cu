// Devices through the CUDA runtime, which is linked statically: the module loads on a machine without a driver too.
#include "core/cuda_launch.h"
#include "core/tensor_map.h"

#include <cuda.h>  // types of the driver; its library is found at run time

#include <cstring>
#include <deque>
#include <mutex>

namespace llmfast {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  require_success(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}

DeviceInfo read_info(int device) {
  cudaDeviceProp properties;
  require_success(cudaGetDeviceProperties(&properties, device), "device properties");
  return {properties.name,
          attribute(cudaDevAttrComputeCapabilityMajor, device),
          attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
}

// The driver's function, or nullptr without a driver that has it (12.0 and later).
auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return encode;
}

}  // namespace

TensorMap make_tensor_map(const MappedTensor& t) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const auto encode = tensor_map_encoder();
  if (!encode) throw CudaError("tensor map: the NVIDIA driver is older than 12.0");
  cuuint64_t size[5], stride[4];
  cuuint32_t box[5], step[5];
  for (int i = 0; i < t.dims; ++i) {
    size[i] = static_cast<cuuint64_t>(t.size[i]);
    box[i] = static_cast<cuuint32_t>(t.box[i]);
    step[i] = 1;
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(t.stride[i] * size_of(t.dtype));
  }
  const CUtensorMapDataType type = t.dtype == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : t.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUtensorMapSwizzle swizzle = t.swizzle == Swizzle::bytes128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : t.swizzle == Swizzle::bytes64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : t.swizzle == Swizzle::bytes32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                                     : CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMap encoded;
  const CUresult status =
      encode(&encoded, type, static_cast<cuuint32_t>(t.dims), const_cast<void*>(t.data), size, stride, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw CudaError("tensor map: CUDA driver error " + std::to_string(status));
  TensorMap map;
  std::memcpy(map.opaque, &encoded, sizeof(map));
  return map;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string why_no_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count ? "" : "no CUDA device";
}

const DeviceInfo& device_info(int device) {
  static std::mutex mutex;
  static std::deque<DeviceInfo> known;  // references stay valid while it grows
  const std::lock_guard<std::mutex> lock(mutex);
  while (static_cast<int>(known.size()) <= device) known.push_back(read_info(static_cast<int>(known.size())));
  return known[device];
}

OnDevice::OnDevice(int device) : device_(device) {
  require_success(cudaGetDevice(&before_), "current device");
  if (before_ != device_) require_success(cudaSetDevice(device_), "device");
}

OnDevice::~OnDevice() {
  if (before_ != device_) cudaSetDevice(before_);
}

}  // namespace llmfast
