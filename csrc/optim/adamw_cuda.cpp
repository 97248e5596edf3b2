#include "optim/adamw_cuda.h"

#include <vector>

#include "core/check.h"
#include "optim/adamw_checks.h"

namespace llmfast {
namespace {

const CudaTable<CudaAdamWParams> kStep("adamw", {{Arch::sm80, kAllFloat, nullptr, cuda::adamw_step_sm80}});
const CudaTable<ClipParams> kClip("grad_norm", {{Arch::sm80, kAllFloat, nullptr, cuda::clip_norm_sm80}});

}  // namespace

void adamw_step(const AdamWInputs& in, const double* step, const TensorView& grad_scale, const Stream& stream) {
  if (grad_scale.defined) {
    require_shape(grad_scale, "grad_scale", {});
    require_dtype(grad_scale, "grad_scale", DType::f32);
    require(grad_scale.device == stream.device, "grad_scale: expected a tensor of the parameters' device");
  }
  std::vector<AdamWTensor> tensors(in.count);
  for (int64_t i = 0; i < in.count; ++i) {
    tensors[i] = checked_adamw(in, i);
    require(in.params[i].device == stream.device, "params: expected tensors of one device");
    set_scalars(&tensors[i], in.groups[in.group_of[i]], step[i]);
  }
  if (in.count > 0)
    kStep(DType::f32, {{tensors.data(), in.count, in.grad_scale}, grad_scale.as<const float>()}, stream);
}

int64_t norm_pieces(const TensorView* grads, int64_t count) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < count; ++i) pieces += (grads[i].numel() + kNormPieceElements - 1) / kNormPieceElements;
  return pieces;
}

void clip_norm(const TensorView* grads, int64_t count, double grad_scale, double max_norm, const TensorView& numbers,
               const TensorView& sums, const Stream& stream) {
  for (int64_t i = 0; i < count; ++i) {
    check_gradient(grads[i], i);
    require(grads[i].device == stream.device, "grads: expected tensors of one device");
  }
  const int64_t pieces = norm_pieces(grads, count);
  require_shape(numbers, "numbers", {2});
  require_shape(sums, "sums", {pieces});
  for (const TensorView* t : {&numbers, &sums}) {
    require_dtype(*t, "numbers and sums", DType::f32);
    require_contiguous(*t, "numbers and sums");
  }
  kClip(DType::f32, {grads, count, pieces, grad_scale, max_norm, numbers.as<float>(), sums.as<float>()}, stream);
}

}  // namespace llmfast
