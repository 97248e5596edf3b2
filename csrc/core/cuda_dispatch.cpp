#include "core/cuda_dispatch.h"

namespace llmfast {

std::vector<CudaOpInfo>& cuda_op_registry() {
  static std::vector<CudaOpInfo> registry;
  return registry;
}

const char* name_of(Arch arch) { return arch == Arch::sm80 ? "sm80" : "sm90a"; }

bool runs_on(Arch arch, const DeviceInfo& device) {
  return arch == Arch::sm80 ? device.major >= 8 : device.major == 9 && device.minor == 0;
}

}  // namespace llmfast
