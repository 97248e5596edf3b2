#include "ffn/ffn_checks.h"

namespace llmfast {
namespace {

const DispatchTable<FfnParams> kForward("ffn", {LLMFAST_MM_ROWS(ffn_forward)});

const DispatchTable<FfnBackwardParams> kBackward("ffn_backward", {LLMFAST_MM_ROWS(ffn_backward)});

}  // namespace

void ffn_forward(const FfnParams& p) {
  check_ffn_forward(p);
  kForward(p.x.dtype, p);
}

void ffn_backward(const FfnBackwardParams& p) {
  check_ffn_backward(p);
  kBackward(p.grad.dtype, p);
}

}  // namespace llmfast
