#include "ffn/ffn_checks.h"

namespace llmfast {
namespace {

const DispatchTable<FfnParams> kForward("ffn", {LLMFAST_BF16_AND_VEC_ROWS(ffn_forward, nullptr)});

const DispatchTable<FfnBackwardParams> kBackward("ffn_backward", {LLMFAST_BF16_AND_VEC_ROWS(ffn_backward, nullptr)});

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
