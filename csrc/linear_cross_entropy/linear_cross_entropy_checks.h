// What both the CPU's and the GPU's tables ask of their arguments; see linear_cross_entropy.h. The values of
// targets are not among it: a GPU has them.
#pragma once
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace llmfast {

void check_linear_cross_entropy_forward(const LinearCrossEntropyParams& params);
void check_linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& params);
void check_linear_cross_entropy_joint(const LinearCrossEntropyJointParams& params);

}  // namespace llmfast
