// What the modules do differently. `_cpu` (bindings_cpu/run.cpp) hands an op's params to its dispatch table; `_cuda`
// (bindings_cuda/run.cpp) also gives them workspace from torch's allocator and torch's current stream of the tensors'
// device: a kernel is enqueued, and nothing waits for it. All are called with the GIL, which run() releases.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>

#include "attention/attention.h"
#include "embedding/embedding.h"
#include "ffn/ffn.h"
#include "linear/linear.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "norm/norm.h"
#include "rotary/rotary.h"

namespace llmfast {

void run(const AttentionArguments& arguments);
void run(const AttentionArguments& arguments, const AttentionGradients& gradients);
void run(const EmbeddingParams& params);
void run(const EmbeddingBackwardParams& params);
void run(const FfnParams& params);
void run(const FfnBackwardParams& params);
void run(const LinearParams& params);
void run(const LinearBackwardParams& params);
void run(const LinearCrossEntropyParams& params);
void run(const LinearCrossEntropyBackwardParams& params);
void run(const LossReductionParams& params);
void run(const LossGradientParams& params);
void run(const NormParams& params);
void run(const NormBackwardParams& params);
void run(const RotaryParams* tensors, int count);

// A new output, its elements next to each other in some order, that nothing was written to yet. Absent ones may be given.
void prepare(const TensorView& fresh);

// What a whole call leaves to Python's code, which copies for the kernels or runs plain torch.
#ifdef LLMFAST_GPU_KERNELS
constexpr bool kOnGpu = true;
#else
constexpr bool kOnGpu = false;
#endif
bool serves(int device);                      // there are kernels for it
bool takes_vector(const TensorView& vector);  // a bias or a norm's weight, or undefined
bool takes_head_dims(int64_t D, int64_t Dv);
bool takes_offsets(const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k);

// Contiguous floats on the device of `like` that nobody wants to keep: until the next call of an op in this thread, or
// for as long as `owner` lives.
TensorView scratch_floats(const TensorView& like, std::initializer_list<int64_t> shape, pybind11::object* owner);

}  // namespace llmfast
