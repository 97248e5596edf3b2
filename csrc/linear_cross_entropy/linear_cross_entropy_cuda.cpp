#include "linear_cross_entropy/linear_cross_entropy_cuda.h"

#include "gemm/gemm_cuda.h"
#include "linear_cross_entropy/linear_cross_entropy_checks.h"

namespace llmfast {
namespace {

const CudaTable<LinearCrossEntropyParams> kForward(
    "linear_cross_entropy",
    {LLMFAST_SM90A_ROW(kHalf, cuda::linear_cross_entropy_forward_fits_sm90a,
                       cuda::linear_cross_entropy_forward_sm90a)  //
     {Arch::sm80, kAllFloat, nullptr, cuda::linear_cross_entropy_forward_sm80}});
const CudaTable<LinearCrossEntropyBackwardParams> kBackward(
    "linear_cross_entropy_backward",
    {LLMFAST_SM90A_ROW(kHalf, cuda::linear_cross_entropy_backward_fits_sm90a,
                       cuda::linear_cross_entropy_backward_sm90a)  //
     {Arch::sm80, kAllFloat, nullptr, cuda::linear_cross_entropy_backward_sm80}});

}  // namespace

void linear_cross_entropy_forward(const LinearCrossEntropyParams& p, const Stream& stream) {
  check_linear_cross_entropy_forward(p);
  require_sizes_for_gpu({p.x.shape[0], p.x.shape[1], p.weight.shape[0]});
  require_workspace(p.workspace, cuda::linear_cross_entropy_workspace(p.x.shape[0]));
  kForward(p.x.dtype, p, stream);
}

void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& p, const Stream& stream) {
  check_linear_cross_entropy_backward(p);
  const int64_t M = p.x.shape[0], C = p.x.shape[1], V = p.weight.shape[0];
  require_sizes_for_gpu({M, C, V});
  require_workspace(p.workspace, cuda::linear_cross_entropy_backward_workspace(M, C, V, size_of(p.x.dtype)));
  kBackward(p.x.dtype, p, stream);
}

void reduce_losses(const LossReductionParams& p, const Stream& stream) {
  const OnDevice current(stream.device);
  cuda::reduce_losses_sm80(p, stream);
}

void spread_loss_gradient(const LossGradientParams& p, const Stream& stream) {
  const OnDevice current(stream.device);
  cuda::spread_loss_gradient_sm80(p, stream);
}

}  // namespace llmfast
