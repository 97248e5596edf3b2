#include "linear_cross_entropy/linear_cross_entropy_checks.h"

#include "core/check.h"

namespace llmfast {
namespace {

void check_inputs(const TensorView& x, const TensorView& weight, const TensorView& target) {
  require(x.ndim == 2 && weight.ndim == 2, "x and weight must be matrices");
  require_floating(x, "x");
  require_shape(weight, "weight", {weight.shape[0], x.shape[1]});
  require_dtype(weight, "weight", x.dtype);
  require_shape(target, "target", {x.shape[0]});
  require_dtype(target, "target", DType::i64);
  require_contiguous(target, "target");
}

void require_row_floats(const TensorView& t, const char* name, int64_t rows) {
  require_shape(t, name, {rows});
  require_dtype(t, name, DType::f32);
  require_contiguous(t, name);
}

void require_gradient(const TensorView& t, const char* name, const TensorView& like) {
  if (!t.defined) return;
  require_shape(t, name, {like.shape[0], like.shape[1]});
  require_dtype(t, name, like.dtype);
  require_contiguous(t, name);
}

}  // namespace

void check_linear_cross_entropy_forward(const LinearCrossEntropyParams& p) {
  check_inputs(p.x, p.weight, p.target);
  require_row_floats(p.losses, "losses", p.x.shape[0]);
  require_row_floats(p.lse, "lse", p.x.shape[0]);
}

void check_linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& p) {
  check_inputs(p.x, p.weight, p.target);
  require_row_floats(p.grad, "grad", p.x.shape[0]);
  require_row_floats(p.lse, "lse", p.x.shape[0]);
  require_gradient(p.grad_x, "grad_x", p.x);
  require_gradient(p.grad_weight, "grad_weight", p.weight);
}

void check_linear_cross_entropy_joint(const LinearCrossEntropyJointParams& p) {
  check_inputs(p.x, p.weight, p.target);
  require(p.x.dtype != DType::f16, "x must be float32 or bfloat16");
  require(p.x.numel() > 0 && p.weight.numel() > 0, "x and weight must not be empty");
  require(p.weight.shape[0] < int64_t{1} << 24, "weight must have fewer than 2^24 rows");
  require(p.rows > 0, "rows must be positive");
  require_row_floats(p.loss, "loss", 1);
  require_gradient(p.grad_x, "grad_x", p.x);
  require_gradient(p.grad_weight, "grad_weight", p.weight);
  if (!p.grad_weight.defined || p.x.dtype == DType::f32 || p.rows >= p.x.shape[0]) return;
  require_shape(p.workspace, "workspace", {p.weight.shape[0], p.weight.shape[1]});
  require_dtype(p.workspace, "workspace", DType::f32);
  require_contiguous(p.workspace, "workspace");
}

}  // namespace llmfast
