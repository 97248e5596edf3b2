// The one device of the emulated build. Few multiprocessors, so that persistent kernels make several rounds on small
// inputs; shared memory as on compute capability 8.0.
#include "core/cuda_stream.h"

namespace llmfast {

int device_count() { return 1; }

std::string why_no_device() { return ""; }

const DeviceInfo& device_info(int) {
  static const DeviceInfo info{"emulated", 8, 0, 3, 166912, 167936};
  return info;
}

OnDevice::OnDevice(int device) : before_(device), device_(device) {}
OnDevice::~OnDevice() = default;

}  // namespace llmfast
