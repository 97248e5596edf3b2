// Devices through the CUDA runtime, which is linked statically: the module loads on a machine without a driver too.
#include "core/cuda_launch.h"

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

}  // namespace

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
