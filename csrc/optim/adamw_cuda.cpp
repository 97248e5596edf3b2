#include "optim/adamw_cuda.h"

#include <vector>

#include "core/check.h"
#include "optim/adamw_checks.h"

namespace llmfast {
namespace {

const CudaTable<AdamWParams> kStep("adamw", {{Arch::sm80, kAllFloat, nullptr, cuda::adamw_step_sm80}});
const CudaTable<SquaresParams> kSquares("grad_norm", {{Arch::sm80, kAllFloat, nullptr, cuda::squared_norms_sm80}});

}  // namespace

void adamw_step(const AdamWInputs& in, const double* step, const Stream& stream) {
  std::vector<AdamWTensor> tensors(in.count);
  for (int64_t i = 0; i < in.count; ++i) {
    tensors[i] = checked_adamw(in, i);
    require(in.params[i].device == stream.device, "params: expected tensors of one device");
    set_scalars(&tensors[i], in.groups[in.group_of[i]], step[i]);
  }
  if (in.count > 0) kStep(DType::f32, {tensors.data(), in.count, in.grad_scale}, stream);
}

int64_t norm_pieces(const TensorView* grads, int64_t count) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < count; ++i) pieces += (grads[i].numel() + kNormPieceElements - 1) / kNormPieceElements;
  return pieces;
}

void squared_norms(const TensorView* grads, int64_t count, const TensorView& sums, const Stream& stream) {
  for (int64_t i = 0; i < count; ++i) {
    check_gradient(grads[i], i);
    require(grads[i].device == stream.device, "grads: expected tensors of one device");
  }
  require_shape(sums, "sums", {norm_pieces(grads, count)});
  require_dtype(sums, "sums", DType::f32);
  require_contiguous(sums, "sums");
  if (sums.numel() > 0) kSquares(DType::f32, {grads, count, sums.as<float>()}, stream);
}

}  // namespace llmfast
