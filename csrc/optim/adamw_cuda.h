// AdamW and the gradient norm on a GPU; see adamw.h for the formulas.
#pragma once
#include "core/cuda_dispatch.h"
#include "optim/adamw.h"

namespace llmfast {

constexpr int64_t kNormPieceElements = 1 << 14;

// inputs.steps is not read: step[i] is the number of parameter i's step, counted from 1.
void adamw_step(const AdamWInputs& inputs, const double* step, const Stream& stream);

// Sums of squares of pieces of the gradients, float32, as many as norm_pieces says.
int64_t norm_pieces(const TensorView* grads, int64_t count);
void squared_norms(const TensorView* grads, int64_t count, const TensorView& sums, const Stream& stream);

struct SquaresParams {
  const TensorView* grads;
  int64_t count;
  float* sums;
};

namespace cuda {
void adamw_step_sm80(const AdamWParams& params, const Stream& stream);
void squared_norms_sm80(const SquaresParams& params, const Stream& stream);
}  // namespace cuda

}  // namespace llmfast
