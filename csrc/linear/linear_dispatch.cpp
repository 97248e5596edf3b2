#include "linear/linear_checks.h"

namespace llmfast {
namespace {

const DispatchTable<LinearParams> kForward("linear", {
#ifdef LLMFAST_X86
    {Isa::amx, kBF16, nullptr, amx::linear_forward},
#endif
    LLMFAST_VEC_ROWS(linear_forward, kAllFloat)});

const DispatchTable<LinearBackwardParams> kBackward("linear_backward", {
#ifdef LLMFAST_X86
    {Isa::amx, kBF16, nullptr, amx::linear_backward},
#endif
    LLMFAST_VEC_ROWS(linear_backward, kAllFloat)});

}  // namespace

void linear_forward(const LinearParams& p) {
  check_linear_forward(p);
  kForward(p.x.dtype, p);
}

void linear_backward(const LinearBackwardParams& p) {
  check_linear_backward(p);
  kBackward(p.grad.dtype, p);
}

}  // namespace llmfast
