#include "ffn/ffn_checks.h"

namespace llmfast {
namespace {

const DispatchTable<FfnParams> kForward("ffn", {
#ifdef LLMFAST_X86
    {Isa::amx, kBF16, nullptr, amx::ffn_forward},
#endif
    LLMFAST_VEC_ROWS(ffn_forward, kAllFloat)});

const DispatchTable<FfnBackwardParams> kBackward("ffn_backward", {
#ifdef LLMFAST_X86
    {Isa::amx, kBF16, nullptr, amx::ffn_backward},
#endif
    LLMFAST_VEC_ROWS(ffn_backward, kAllFloat)});

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
