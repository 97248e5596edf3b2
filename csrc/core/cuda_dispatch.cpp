#include "core/cuda_dispatch.h"

#include <cstdlib>

namespace llmfast {
namespace {

std::atomic<Arch>& cap() {
  static std::atomic<Arch> value{[] {
    Arch arch = Arch::sm90a;
    if (const char* text = std::getenv("LLMFAST_CUDA_ARCH")) parse_arch(text, &arch);
    return arch;
  }()};
  return value;
}

}  // namespace

std::vector<CudaOpInfo>& cuda_op_registry() {
  static std::vector<CudaOpInfo> registry;
  return registry;
}

const char* name_of(Arch arch) { return arch == Arch::sm80 ? "sm80" : "sm90a"; }

bool parse_arch(const std::string& name, Arch* arch) {
  for (const Arch each : {Arch::sm80, Arch::sm90a})
    if (name == name_of(each)) {
      *arch = each;
      return true;
    }
  return false;
}

Arch arch_cap() { return cap().load(std::memory_order_relaxed); }
void set_arch_cap(Arch arch) { cap().store(arch, std::memory_order_relaxed); }

bool runs_on(Arch arch, const DeviceInfo& device) {
  return arch == Arch::sm80 ? device.major >= 8 : device.major == 9 && device.minor == 0;
}

}  // namespace llmfast
