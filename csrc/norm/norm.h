// add_layer_norm and add_rms_norm: the residual sum and its norm in one pass over memory.
//   summed[M,C] = x + residual                                  (residual's dtype, rounded once)
//   normed[M,C] = (total - mean) * rstd * weight + bias         total: the sum in float32, before rounding
//   LayerNorm: mean[M], rstd[M] = 1/sqrt(var + eps) of each row; RMSNorm (centred = false): mean = 0, mean of squares.
//
// Gradients, with xhat = (summed - mean) * rstd and g = grad_normed * weight, where a summed of half precision counts
// with its own mean and rstd, not with those of the total:
//   grad_total  = grad_summed + rstd * (g - mean_C(g) - xhat * mean_C(g * xhat))     (RMSNorm: without mean_C(g))
//   grad_weight = sum over rows of grad_normed * xhat,   grad_bias = sum over rows of grad_normed
//
// M stands for up to five leading dimensions of any strides; rows have contiguous C. Each tensor has its own dtype, but
// residual, summed, grad_summed and grad_total share one. Outputs are contiguous. Undefined tensors are absent inputs
// (residual, weight, bias, either gradient) or unwanted outputs; summed must be undefined where residual is.
#pragma once
#include "core/dispatch.h"
#include "core/types.h"

namespace llmfast {

struct NormParams {
  TensorView x, residual, weight, bias;
  TensorView normed, summed, mean, rstd;  // mean and rstd: float32[M] or undefined
  float eps;
  bool centred;
};

struct NormBackwardParams {
  TensorView grad_normed, grad_summed, summed, weight, mean, rstd;
  TensorView grad_total, grad_x;  // the same values, in the dtypes of summed and of x
  TensorView grad_weight, grad_bias;
  float eps;
  bool centred;
  TensorView workspace = {};  // on GPUs: see norm_cuda.h
};

void norm_forward(const NormParams& params);
void norm_backward(const NormBackwardParams& params);

}  // namespace llmfast

LLMFAST_DECLARE_ROUND(void norm_forward(const NormParams&))
LLMFAST_DECLARE_ROUND(void norm_backward(const NormBackwardParams&))
