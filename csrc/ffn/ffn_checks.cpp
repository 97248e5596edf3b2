#include "ffn/ffn_checks.h"

#include "core/check.h"

namespace llmfast {
namespace {

struct Sizes {
  int64_t M, C, F;
  DType dtype;

  void input(const TensorView& t, const char* name, int64_t rows, int64_t cols) const {
    require_shape(t, name, {rows, cols});
    require_dtype(t, name, dtype);
  }
  void bias(const TensorView& t, const char* name, int64_t size) const {
    if (!t.defined) return;
    require_shape(t, name, {size});
    require_dtype(t, name, dtype);
  }
  void output(const TensorView& t, const char* name, int64_t rows, int64_t cols) const {
    if (!t.defined) return;
    input(t, name, rows, cols);
    require(t.stride[1] == 1 || cols <= 1, "outputs and saved tensors must have contiguous rows");
  }
  void output_bias(const TensorView& t, const char* name, int64_t size) const {
    bias(t, name, size);
    if (t.defined) require_contiguous(t, name);
  }
};

}  // namespace

void check_ffn_forward(const FfnParams& p) {
  require(p.x.ndim == 2 && p.up_weight.ndim == 2, "x and up_weight must be matrices");
  require_floating(p.x, "x");
  const Sizes s{p.x.shape[0], p.x.shape[1], p.up_weight.shape[0], p.x.dtype};
  s.input(p.up_weight, "up_weight", s.F, s.C);
  s.input(p.down_weight, "down_weight", s.C, s.F);
  if (p.gate_weight.defined) s.input(p.gate_weight, "gate_weight", s.F, s.C);
  s.bias(p.up_bias, "up_bias", s.F);
  s.bias(p.down_bias, "down_bias", s.C);
  require(p.out.defined, "out must be given");
  s.output(p.out, "out", s.M, s.C);
  s.output(p.up, "up", s.M, s.F);
  s.output(p.gate, "gate", s.M, s.F);
}

void check_ffn_backward(const FfnBackwardParams& p) {
  require(p.grad.ndim == 2 && p.up_weight.ndim == 2, "grad and up_weight must be matrices");
  require_floating(p.grad, "grad");
  const Sizes s{p.grad.shape[0], p.grad.shape[1], p.up_weight.shape[0], p.grad.dtype};
  s.input(p.x, "x", s.M, s.C);
  s.input(p.up_weight, "up_weight", s.F, s.C);
  s.input(p.down_weight, "down_weight", s.C, s.F);
  require(p.up.defined && p.gate.defined == p.gate_weight.defined, "saved tensors must match the weights");
  s.output(p.up, "up", s.M, s.F);
  s.output(p.gate, "gate", s.M, s.F);
  if (p.gate_weight.defined) s.input(p.gate_weight, "gate_weight", s.F, s.C);
  s.output(p.grad_x, "grad_x", s.M, s.C);
  s.output(p.grad_up_weight, "grad_up_weight", s.F, s.C);
  s.output(p.grad_gate_weight, "grad_gate_weight", s.F, s.C);
  s.output(p.grad_down_weight, "grad_down_weight", s.C, s.F);
  s.output_bias(p.grad_up_bias, "grad_up_bias", s.F);
  s.output_bias(p.grad_down_bias, "grad_down_bias", s.C);
}

}  // namespace llmfast
