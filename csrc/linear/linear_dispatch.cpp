#include "linear/linear_checks.h"

namespace llmfast {
namespace {

const DispatchTable<LinearParams> kForward("linear", {LLMFAST_BF16_AND_VEC_ROWS(linear_forward, nullptr)});

const DispatchTable<LinearBackwardParams> kBackward("linear_backward",{
    LLMFAST_BF16_AND_VEC_ROWS(linear_backward, nullptr)});

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
