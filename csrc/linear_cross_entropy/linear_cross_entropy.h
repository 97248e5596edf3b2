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

// Loss and gradients in one pass over blocks of rows, where grad[m] is one number that is known beforehand: `loss`, one
// float32, is the sum of losses[m], or its mean over the rows that are not ignored (0 / 0 = NaN if there is none), and the
// gradients are its. float32 and bfloat16, fewer than 2^24 classes. Memory: float32 for the logits of a block.
struct LinearCrossEntropyJointParams {
  TensorView x, weight, target;
  TensorView loss;
  TensorView grad_x, grad_weight;  // either may be undefined
  int64_t ignore_index;
  bool mean;
  int64_t rows;               // of x to a block; rounded up to whole tiles
  TensorView workspace = {};  // float32[V, C] for bfloat16 grad_weight of several blocks
};

// One number of all losses [M]: their sum, or their mean over the rows that are not ignored (0 / 0 = NaN if there is none).
struct LossReductionParams {
  TensorView losses, target, loss;
  int64_t ignore_index;
  bool mean;
};

// The gradients of the losses [M] from the one of that number; ignored rows get one too.
struct LossGradientParams {
  TensorView grad, target, row_grads;
  int64_t ignore_index;
  bool mean;
};

void reduce_losses(const LossReductionParams& params);
void spread_loss_gradient(const LossGradientParams& params);
void linear_cross_entropy_forward(const LinearCrossEntropyParams& params);
void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& params);
void linear_cross_entropy_joint(const LinearCrossEntropyJointParams& params);

}  // namespace llmfast

LLMFAST_DECLARE_MM(void linear_cross_entropy_forward(const LinearCrossEntropyParams&))
LLMFAST_DECLARE_MM(void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams&))
LLMFAST_DECLARE_MM(void linear_cross_entropy_joint(const LinearCrossEntropyJointParams&))
