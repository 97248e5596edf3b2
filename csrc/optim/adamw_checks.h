// What both the CPU's and the GPU's tables ask of their arguments, and the scalars of a step; see adamw.h.
#pragma once
#include "optim/adamw.h"

namespace llmfast {

AdamWTensor checked_adamw(const AdamWInputs& inputs, int64_t i);  // without its scalars
void set_scalars(AdamWTensor* tensor, const AdamWGroup& group, double step);
void check_gradient(const TensorView& grad, int64_t i);

}  // namespace llmfast
