// AdamW and the gradient norm on a GPU; see adamw.h for the formulas.
#pragma once
#include "core/cuda_dispatch.h"
#include "optim/adamw.h"

namespace llmfast {

constexpr int64_t kNormPieceElements = 1 << 14;

// inputs.steps is not read: step[i] is the number of parameter i's step, counted from 1. `grad_scale`, one float32 on the
// device or undefined, is another factor of the gradients; where it is not finite, nothing is updated.
void adamw_step(const AdamWInputs& inputs, const double* step, const TensorView& grad_scale, const Stream& stream);

// The norm of all gradients together times |grad_scale|, and grad_scale * min(1, max_norm / (norm + 1e-6)), into
// the two floats of `numbers`. `sums`: norm_pieces() floats of scratch.
int64_t norm_pieces(const TensorView* grads, int64_t count);
void clip_norm(const TensorView* grads, int64_t count, double grad_scale, double max_norm, const TensorView& numbers,
               const TensorView& sums, const Stream& stream);

struct CudaAdamWParams {
  AdamWParams step;
  const float* grad_scale;  // or nullptr
};
struct ClipParams {
  const TensorView* grads;
  int64_t count, pieces;
  double grad_scale, max_norm;
  float *numbers, *sums;
};

namespace cuda {
void adamw_step_sm80(const CudaAdamWParams& params, const Stream& stream);
void clip_norm_sm80(const ClipParams& params, const Stream& stream);
}  // namespace cuda

}  // namespace llmfast
