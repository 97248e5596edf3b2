// ffn: out[M,C] = hidden[M,F] down_weight[C,F]^T + down_bias[C],  with  up = x[M,C] up_weight[F,C]^T + up_bias[F]  and
//   hidden = act(up)                              plain
//   hidden = act(gate) * up,  gate = x gate_weight[F,C]^T      gated (SwiGLU with silu, GeGLU with gelu)
// The nonlinearity runs in the epilogue of the product that feeds it. For the backward pass `up` (and `gate`) are saved
// before the nonlinearity; `hidden` is recomputed from them.
//   d_hidden = grad down_weight;  plain: d_up = d_hidden act'(up);  gated: d_up = d_hidden act(gate),
//   d_gate = d_hidden up act'(gate);  grad_x = d_up up_weight + d_gate gate_weight;  weight gradients as in linear.h.
// Matrices are 2-D views of one dtype with contiguous rows or any strides; outputs and saved tensors have contiguous
// rows. Undefined outputs are not computed.
#pragma once
#include "core/dispatch.h"
#include "core/types.h"

namespace llmfast {

enum class Activation : int;

struct FfnParams {
  TensorView x, up_weight, up_bias, gate_weight, down_weight, down_bias;
  TensorView out, up, gate;  // up and gate: saved if defined
  Activation activation;
  TensorView workspace = {};  // float32, on GPUs
};

struct FfnBackwardParams {
  TensorView grad, x, up_weight, gate_weight, down_weight, up, gate;
  TensorView grad_x, grad_up_weight, grad_up_bias, grad_gate_weight, grad_down_weight, grad_down_bias;
  Activation activation;
  TensorView workspace = {};  // float32, on GPUs
};

void ffn_forward(const FfnParams& params);
void ffn_backward(const FfnBackwardParams& params);

}  // namespace llmfast

LLMFAST_DECLARE_MM(void ffn_forward(const FfnParams&))
LLMFAST_DECLARE_MM(void ffn_backward(const FfnBackwardParams&))
