// rotary on a GPU: the kernel's entry point. At most 2^31 - 1 tokens, and elements of a token.
#pragma once
#include "core/cuda_dispatch.h"
#include "rotary/rotary.h"

namespace llmfast {

void rotary(const RotaryParams& params, const Stream& stream);

namespace cuda {
void rotary_sm80(const RotaryParams& params, const Stream& stream);
}  // namespace cuda

}  // namespace llmfast
