// AdamW over many tensors in one call (decoupled weight decay, https://arxiv.org/abs/1711.05101), per element
//   g   = grad * grad_scale
//   m   = m + (1 - beta1) (g - m),    v = beta2 v + (1 - beta2) g^2
//   w   = w (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
// and the L2 norm of many gradients. m, v and w are float32; w is the parameter itself or, for a bf16 or fp16
// parameter, its master copy, and the parameter is w rounded.
//
// Tensors are flat ranges of `count` elements: all tensors of one parameter have the same dense layout.
#pragma once
#include "core/dispatch.h"
#include "core/types.h"

namespace llmfast {

struct AdamWTensor {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  float* master;  // nullptr for a float32 param
  int64_t count;
  DType param_dtype, grad_dtype;
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float decay;        // 1 - lr * weight_decay
  float step_size;    // lr / (1 - beta1^step)
  float denom_scale;  // 1 / sqrt(1 - beta2^step)
};

struct AdamWParams {
  const AdamWTensor* tensors;
  int64_t tensor_count;
  float grad_scale;
};

// A piece of a gradient, and where the sum of its squares goes.
struct NormPiece {
  const void* data;
  int64_t count;
  DType dtype;
  double squares;
};

struct GradNormParams {
  NormPiece* pieces;
  int64_t piece_count;
};

struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay;
};

// `count` parameters; all but steps (one float32 each, incremented) share their parameter's layout.
struct AdamWInputs {
  int64_t count;
  const TensorView *params, *grads, *exp_avgs, *exp_avg_sqs, *masters, *steps;
  const int64_t* group_of;  // index into groups
  const AdamWGroup* groups;
  float grad_scale;
};

void adamw_step(const AdamWInputs& inputs);  // checks everything, then updates
double grad_norm(const TensorView* grads, int64_t count);
bool is_dense(const TensorView& t);  // elements fill their memory without gaps or repeats, in any order of dimensions

}  // namespace llmfast

LLMFAST_DECLARE_VEC(void adamw_step(const AdamWParams&))
LLMFAST_DECLARE_VEC(void sum_squares(const GradNormParams&))
