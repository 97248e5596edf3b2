// What both the CPU's and the GPU's tables ask of their arguments; see ffn.h.
#pragma once
#include "ffn/ffn.h"

namespace llmfast {

void check_ffn_forward(const FfnParams& params);
void check_ffn_backward(const FfnBackwardParams& params);

}  // namespace llmfast
