// What both the CPU's and the GPU's tables ask of their arguments; see rotary.h. False: there is nothing to compute.
#pragma once
#include "rotary/rotary.h"

namespace llmfast {

bool check_rotary(const RotaryParams& params);

}  // namespace llmfast
