// linear_cross_entropy on a GPU: the kernels' entry points, and the scratch they need. Targets are never read back to
// the host: one that is neither in [0, V) nor ignore_index gives a loss of NaN. No side has 2^31 elements or more.
#pragma once
#include "core/cuda_dispatch.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace llmfast {

void linear_cross_entropy_forward(const LinearCrossEntropyParams& params, const Stream& stream);
void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& params, const Stream& stream);
void reduce_losses(const LossReductionParams& params, const Stream& stream);
void spread_loss_gradient(const LossGradientParams& params, const Stream& stream);

namespace cuda {

// Floats of workspace.
int64_t linear_cross_entropy_workspace(int64_t M);
int64_t linear_cross_entropy_backward_workspace(int64_t M, int64_t C, int64_t V, int64_t element_bytes);

void linear_cross_entropy_forward_sm80(const LinearCrossEntropyParams& params, const Stream& stream);
void linear_cross_entropy_backward_sm80(const LinearCrossEntropyBackwardParams& params, const Stream& stream);

void reduce_losses_sm80(const LossReductionParams& params, const Stream& stream);
void spread_loss_gradient_sm80(const LossGradientParams& params, const Stream& stream);

bool linear_cross_entropy_forward_fits_sm90a(const LinearCrossEntropyParams& params);
bool linear_cross_entropy_backward_fits_sm90a(const LinearCrossEntropyBackwardParams& params);
void linear_cross_entropy_forward_sm90a(const LinearCrossEntropyParams& params, const Stream& stream);
void linear_cross_entropy_backward_sm90a(const LinearCrossEntropyBackwardParams& params, const Stream& stream);

}  // namespace cuda
}  // namespace llmfast
