#include "rotary/rotary_cuda.h"

#include "core/check.h"
#include "rotary/rotary_checks.h"

namespace llmfast {
namespace {

const CudaTable<RotaryParams> kRotary("rotary", {{Arch::sm80, kAllFloat, nullptr, cuda::rotary_sm80}});

}  // namespace

void rotary(const RotaryParams& p, const Stream& stream) {
  if (!check_rotary(p)) return;
  const int64_t most = 0x7fffffff;
  require(p.x.shape[0] * p.x.shape[2] <= most && p.x.shape[1] * p.x.shape[3] <= most, "x: too large for a GPU kernel");
  kRotary(p.x.dtype, p, stream);
}

}  // namespace llmfast
