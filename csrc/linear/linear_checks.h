// What both the CPU's and the GPU's tables ask of their arguments; see linear.h.
#pragma once
#include "linear/linear.h"

namespace llmfast {

void check_linear_forward(const LinearParams& params);
void check_linear_backward(const LinearBackwardParams& params);

}  // namespace llmfast
