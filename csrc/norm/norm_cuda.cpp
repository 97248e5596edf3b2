#include "norm/norm_cuda.h"

#include "core/check.h"
#include "norm/norm_checks.h"

namespace llmfast {
namespace {

const CudaTable<NormParams> kLayerNorm("add_layer_norm", {{Arch::sm80, kAllFloat, nullptr, cuda::norm_forward_sm80}});
const CudaTable<NormParams> kRmsNorm("add_rms_norm", {{Arch::sm80, kAllFloat, nullptr, cuda::norm_forward_sm80}});
const CudaTable<NormBackwardParams> kLayerNormBackward("add_layer_norm_backward",
                                                       {{Arch::sm80, kAllFloat, nullptr, cuda::norm_backward_sm80}});
const CudaTable<NormBackwardParams> kRmsNormBackward("add_rms_norm_backward",
                                                     {{Arch::sm80, kAllFloat, nullptr, cuda::norm_backward_sm80}});

void require_sizes(const TensorView& rows, const TensorView& weight, const TensorView& bias) {
  const int64_t C = rows.shape[rows.ndim - 1];
  require(C <= 0x7ffffff0 && rows.numel() / C <= 0x7fffffff, "x: too many rows or columns for a GPU kernel");
  if (weight.defined) require_contiguous(weight, "weight");
  if (bias.defined) require_contiguous(bias, "bias");
}

}  // namespace

namespace cuda {

NormBackwardPlan norm_backward_plan(int64_t M, int64_t C) {
  // One wave of an H100: at 128 registers a thread a multiprocessor holds this many.
  constexpr int64_t kMultiprocessors = 132, kThreadsEach = 512, kMostBlocksEach = 16, kLeastRows = 4;
  const int groups = C <= 4096 ? 1 : C <= 8192 ? 2 : 0;
  const int64_t columns = groups ? 256 * groups : 256;  // of one warp
  int64_t threads = (C + columns - 1) / columns * 32;
  if (threads > 512) threads = 512;
  const int64_t each = kThreadsEach / threads < kMostBlocksEach ? kThreadsEach / threads : kMostBlocksEach;
  const int64_t most = kMultiprocessors * each, enough = (M + kLeastRows - 1) / kLeastRows;
  return {groups, static_cast<int>(threads), static_cast<int>(most < enough ? most : enough)};
}

}  // namespace cuda

int64_t norm_backward_workspace(int64_t M, int64_t C, int gradients) {
  return cuda::norm_backward_plan(M, C).blocks * C * gradients;
}

void norm_forward(const NormParams& p, const Stream& stream) {
  if (!check_norm_forward(p)) return;
  require_sizes(p.x, p.weight, p.bias);
  (p.centred ? kLayerNorm : kRmsNorm)(p.x.dtype, p, stream);
}

void norm_backward(const NormBackwardParams& p, const Stream& stream) {
  if (!check_norm_backward(p)) return;
  require_sizes(p.summed, p.weight, {});
  const int gradients = p.grad_weight.defined + p.grad_bias.defined;
  const int64_t C = p.summed.shape[p.summed.ndim - 1];
  const int64_t needed = norm_backward_workspace(p.summed.numel() / C, C, gradients);
  if (needed > 0) {
    require(p.workspace.defined && p.workspace.numel() >= needed, "workspace: too small");
    require_dtype(p.workspace, "workspace", DType::f32);
    require_contiguous(p.workspace, "workspace");
  }
  (p.centred ? kLayerNormBackward : kRmsNormBackward)(p.summed.dtype, p, stream);
}

}  // namespace llmfast
