// What both the CPU's and the GPU's tables ask of their arguments; see norm.h. False: there is nothing to compute.
#pragma once
#include "norm/norm.h"

namespace llmfast {

bool check_norm_forward(const NormParams& params);
bool check_norm_backward(const NormBackwardParams& params);

}  // namespace llmfast
