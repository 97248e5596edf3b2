#include "rotary/rotary_checks.h"

namespace llmfast {
namespace {

const DispatchTable<RotaryParams> kRotary("rotary", {LLMFAST_VEC_ROWS(rotary, kAllFloat)});

}  // namespace

void rotary(const RotaryParams& p) {
  if (check_rotary(p)) kRotary(p.x.dtype, p);
}

}  // namespace llmfast
