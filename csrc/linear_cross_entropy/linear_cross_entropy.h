// LM head and cross-entropy without the logits:
//   logits[m][v] = x[m] . weight[v],   lse[m] = log sum_v exp(logits[m][v]),   loss[m] = lse[m] - logits[m][target[m]]
// and, for grad[m] = d / d loss[m]:
//   d_logits[m][v] = grad[m] (exp(logits[m][v] - lse[m]) - [v == target[m]])
//   grad_x = d_logits weight,   grad_weight = d_logits^T x
// x[M,C] and weight[V,C]: 2-D views of one dtype, any strides; target[M] int64 contiguous, each in [0, V) or
// ignore_index (loss 0, no gradient). losses, lse and grad are float32[M]. Memory: O(M + a chunk of the vocabulary).
#pragma once
#include "core/dispatch.h"
#include "core/types.h"

namespace llmfast {

struct LinearCrossEntropyParams {
  TensorView x, weight, target;
  TensorView losses, lse;
  int64_t ignore_index;
  TensorView workspace = {};  // float32, on GPUs
};

struct LinearCrossEntropyBackwardParams {
  TensorView grad, x, weight, target, lse;
  TensorView grad_x, grad_weight;
  int64_t ignore_index;
  TensorView workspace = {};  // float32, on GPUs
};

void linear_cross_entropy_forward(const LinearCrossEntropyParams& params);
void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& params);

}  // namespace llmfast

LLMFAST_DECLARE_MM(void linear_cross_entropy_forward(const LinearCrossEntropyParams&))
LLMFAST_DECLARE_MM(void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams&))
