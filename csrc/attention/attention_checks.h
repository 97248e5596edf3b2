// From tensors to params, for the CPU's and the GPU's tables: checks shapes and dtypes, reads strides. The token
// offsets of packed sequences are left out: they differ in lifetime, and those of a GPU are not read here. Tq and Tk of
// packed sequences are all their tokens.
#pragma once
#include "attention/attention.h"

namespace llmfast {

AttentionParams checked_attention(const AttentionArguments& arguments);
AttentionBackwardParams checked_attention(const AttentionArguments& arguments, const AttentionGradients& gradients);

}  // namespace llmfast
