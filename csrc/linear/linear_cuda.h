// linear on a GPU: the kernels' entry points, and the scratch they need. All tensors share one dtype; no side has 2^31
// elements or more.
#pragma once
#include "core/cuda_dispatch.h"
#include "linear/linear.h"

namespace llmfast {

void linear_forward(const LinearParams& params, const Stream& stream);
void linear_backward(const LinearBackwardParams& params, const Stream& stream);

namespace cuda {

// Floats of workspace; 0: none.
int64_t linear_workspace(int64_t M, int64_t N, int64_t K);
int64_t linear_backward_workspace(int64_t M, int64_t N, int64_t K);

void linear_forward_sm80(const LinearParams& params, const Stream& stream);
void linear_backward_sm80(const LinearBackwardParams& params, const Stream& stream);

bool linear_forward_fits_sm90a(const LinearParams& params);
bool linear_backward_fits_sm90a(const LinearBackwardParams& params);
void linear_forward_sm90a(const LinearParams& params, const Stream& stream);
void linear_backward_sm90a(const LinearBackwardParams& params, const Stream& stream);

}  // namespace cuda
}  // namespace llmfast
