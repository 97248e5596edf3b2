// The sum or mean of linear_cross_entropy's losses[M], and the way back from its gradient to theirs; see LossReductionParams.
//
// One block for a sum, in a fixed order: thread t has losses t, t + 1024, ...; then the block's threads in a tree. 16k rows
// are 192 KB, some ten trips of a block to memory: a second launch, for more blocks, would cost as much.
// The way back needs the number of rows again, which every block counts for itself: saving it would make a tensor of it.
#include "core/cuda_launch.h"
#include "core/cuda_row_sum.h"
#include "linear_cross_entropy/linear_cross_entropy_cuda.h"

namespace llmfast::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kRowsOfBlock = 8 * kThreads;  // that get their gradient from one block

using BlockSum = RowSum<false, kThreads, 2>;

__global__ void __launch_bounds__(kThreads) reduce_losses_kernel(const float* losses, const int64_t* target, float* loss,
                                                                 int64_t M, int64_t ignore_index, bool mean) {
  float sums[2] = {};  // of losses, and of rows that are not ignored
  for (int64_t m = threadIdx.x; m < M; m += kThreads) {
    sums[0] += losses[m];
    sums[1] += target[m] != ignore_index ? 1.0f : 0.0f;
  }
  BlockSum block_sum;
  block_sum(sums);
  if (threadIdx.x == 0) *loss = mean ? sums[0] / sums[1] : sums[0];
}

__global__ void __launch_bounds__(kThreads) spread_gradient_kernel(const float* grad, const int64_t* target,
                                                                   float* row_grads, int64_t M, int64_t ignore_index,
                                                                   bool mean) {
  float value = *grad;
  if (mean) {
    float sums[2] = {};
    for (int64_t m = threadIdx.x; m < M; m += kThreads) sums[1] += target[m] != ignore_index ? 1.0f : 0.0f;
    BlockSum block_sum;
    block_sum(sums);
    value /= sums[1];
  }
  const int64_t first = blockIdx.x * kRowsOfBlock, end = first + kRowsOfBlock < M ? first + kRowsOfBlock : M;
  for (int64_t m = first + threadIdx.x; m < end; m += kThreads) row_grads[m] = value;
}

}  // namespace

void reduce_losses_sm80(const LossReductionParams& p, const Stream& stream) {
  launch(stream, {1}, kThreads, 0, reduce_losses_kernel, p.losses.as<const float>(), p.target.as<const int64_t>(),
         p.loss.as<float>(), p.losses.shape[0], p.ignore_index, p.mean);
}

void spread_loss_gradient_sm80(const LossGradientParams& p, const Stream& stream) {
  const int64_t M = p.row_grads.shape[0];
  launch(stream, {static_cast<unsigned>((M + kRowsOfBlock - 1) / kRowsOfBlock)}, kThreads, 0, spread_gradient_kernel,
         p.grad.as<const float>(), p.target.as<const int64_t>(), p.row_grads.as<float>(), M, p.ignore_index, p.mean);
}

}  // namespace llmfast::cuda
