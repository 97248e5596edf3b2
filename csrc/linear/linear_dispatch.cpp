#include "linear/linear_checks.h"

namespace llmfast {
namespace {

const DispatchTable<LinearParams> kForward("linear", {LLMFAST_MM_ROWS(linear_forward)});

const DispatchTable<LinearBackwardParams> kBackward("linear_backward",{
    LLMFAST_MM_ROWS(linear_backward)});

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
