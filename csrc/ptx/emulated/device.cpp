// The one device of the emulated build: compute capability 9.0 with few multiprocessors, so that persistent kernels make
// several rounds on small inputs.
#include "core/cuda_stream.h"

namespace llmfast {

int device_count() { return 1; }

std::string why_no_device() { return ""; }

const DeviceInfo& device_info(int) {
  static const DeviceInfo info{"emulated", 9, 0, 3, 232448, 233472};
  return info;
}

OnDevice::OnDevice(int device) : before_(device), device_(device) {}
OnDevice::~OnDevice() = default;

}  // namespace llmfast
