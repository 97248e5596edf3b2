// ffn on a GPU: the kernels' entry points, and the scratch they need. No side has 2^31 elements or more.
#pragma once
#include "core/cuda_dispatch.h"
#include "ffn/ffn.h"

namespace llmfast {

void ffn_forward(const FfnParams& params, const Stream& stream);
void ffn_backward(const FfnBackwardParams& params, const Stream& stream);

namespace cuda {

// Floats of workspace. `saved`: the forward pass is given `up` (and `gate`) to fill.
int64_t ffn_workspace(int64_t M, int64_t C, int64_t F, int64_t element_bytes, bool gated, bool saved);
int64_t ffn_backward_workspace(int64_t M, int64_t C, int64_t F, int64_t element_bytes, bool gated);

void ffn_forward_sm80(const FfnParams& params, const Stream& stream);
void ffn_backward_sm80(const FfnBackwardParams& params, const Stream& stream);

bool ffn_forward_fits_sm90a(const FfnParams& params);
bool ffn_backward_fits_sm90a(const FfnBackwardParams& params);
void ffn_forward_sm90a(const FfnParams& params, const Stream& stream);
void ffn_backward_sm90a(const FfnBackwardParams& params, const Stream& stream);

}  // namespace cuda
}  // namespace llmfast
