// linear: out[M,N] = x[M,K] weight[N,K]^T + bias[N], and its gradients
//   grad_x[M,K] = grad[M,N] weight,  grad_weight[N,K] = grad^T x,  grad_bias[N] = column sums of grad.
// Matrices are 2-D views with any strides; outputs have contiguous rows. x, weight and grad share one dtype; bias and
// outputs may differ. Undefined outputs are not computed.
#pragma once
#include "core/dispatch.h"
#include "core/types.h"

namespace llmfast {

struct LinearParams {
  TensorView x, weight, bias, out;
  TensorView workspace = {};  // float32, on GPUs
};

struct LinearBackwardParams {
  TensorView grad, x, weight;
  TensorView grad_x, grad_weight, grad_bias;
  TensorView workspace = {};  // float32, on GPUs
};

void linear_forward(const LinearParams& params);
void linear_backward(const LinearBackwardParams& params);

}  // namespace llmfast

LLMFAST_DECLARE_MM(void linear_forward(const LinearParams&))
LLMFAST_DECLARE_MM(void linear_backward(const LinearBackwardParams&))
