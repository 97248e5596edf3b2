// add_layer_norm and add_rms_norm on a GPU: the kernels' entry points, and the scratch that backward needs. weight and
// bias are contiguous; at most 2^31 - 1 rows of at most 2^31 - 9 columns.
#pragma once
#include "core/cuda_dispatch.h"
#include "norm/norm.h"

namespace llmfast {

// Floats of workspace for weight gradients: a row of partial sums for each block and each wanted gradient.
int64_t norm_backward_workspace(int64_t M, int64_t C, int gradients);

void norm_forward(const NormParams& params, const Stream& stream);
void norm_backward(const NormBackwardParams& params, const Stream& stream);

namespace cuda {

// How norm_backward splits its work: a function of the shape alone, so that results do not depend on the device.
struct NormBackwardPlan {
  int groups;   // of eight columns that a thread holds; 0: as many as it takes, in global memory
  int threads;  // of a block
  int blocks;   // block b has rows b, b + blocks, ...
};
NormBackwardPlan norm_backward_plan(int64_t M, int64_t C);

// How many rows' operands of `stage_bytes` a block has in shared memory or on their way there: three, two or none, with
// all blocks of a multiprocessor beside each other.
inline int norm_backward_stages(int threads, int stage_bytes, int shared_per_block, int shared_per_multiprocessor) {
  constexpr int kSums = 1024;      // of a block: its row sums, up to the alignment of dynamic shared memory
  constexpr int kReserved = 1024;  // of a block, by CUDA
  const int each = threads >= 512 ? 1 : 512 / threads;
  for (const int stages : {3, 2}) {
    const int bytes = stages * stage_bytes + kSums;
    if (bytes <= shared_per_block && each * (bytes + kReserved) <= shared_per_multiprocessor) return stages;
  }
  return 0;
}

void norm_forward_sm80(const NormParams& params, const Stream& stream);
void norm_backward_sm80(const NormBackwardParams& params, const Stream& stream);

}  // namespace cuda
}  // namespace llmfast
