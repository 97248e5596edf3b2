#include <string>

#include "core/check.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace llmfast {
namespace {

const DispatchTable<LinearCrossEntropyParams> kForward("linear_cross_entropy", {
#ifdef LLMFAST_X86
    {Isa::amx, kBF16, nullptr, amx::linear_cross_entropy_forward},
#endif
    LLMFAST_VEC_ROWS(linear_cross_entropy_forward, kAllFloat)});

const DispatchTable<LinearCrossEntropyBackwardParams> kBackward("linear_cross_entropy_backward", {
#ifdef LLMFAST_X86
    {Isa::amx, kBF16, nullptr, amx::linear_cross_entropy_backward},
#endif
    LLMFAST_VEC_ROWS(linear_cross_entropy_backward, kAllFloat)});

void check_inputs(const TensorView& x, const TensorView& weight, const TensorView& target, int64_t ignore_index) {
  require(x.ndim == 2 && weight.ndim == 2, "x and weight must be matrices");
  require_floating(x, "x");
  require_shape(weight, "weight", {weight.shape[0], x.shape[1]});
  require_dtype(weight, "weight", x.dtype);
  require_shape(target, "target", {x.shape[0]});
  require_dtype(target, "target", DType::i64);
  require_contiguous(target, "target");
  const auto* values = target.as<const int64_t>();
  for (int64_t m = 0; m < target.shape[0]; ++m)
    if (values[m] != ignore_index && (values[m] < 0 || values[m] >= weight.shape[0]))
      throw std::invalid_argument("target: got " + std::to_string(values[m]) + " at position " + std::to_string(m) +
                                  ", expected 0 to " + std::to_string(weight.shape[0] - 1) + " or ignore_index " +
                                  std::to_string(ignore_index));
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

void linear_cross_entropy_forward(const LinearCrossEntropyParams& p) {
  check_inputs(p.x, p.weight, p.target, p.ignore_index);
  require_row_floats(p.losses, "losses", p.x.shape[0]);
  require_row_floats(p.lse, "lse", p.x.shape[0]);
  kForward(p.x.dtype, p);
}

void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& p) {
  check_inputs(p.x, p.weight, p.target, p.ignore_index);
  require_row_floats(p.grad, "grad", p.x.shape[0]);
  require_row_floats(p.lse, "lse", p.x.shape[0]);
  require_gradient(p.grad_x, "grad_x", p.x);
  require_gradient(p.grad_weight, "grad_weight", p.weight);
  kBackward(p.x.dtype, p);
}

}  // namespace llmfast
