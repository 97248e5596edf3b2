#include "linear/linear_checks.h"

#include "core/check.h"

namespace llmfast {
namespace {

void require_matrix(const TensorView& t, const char* name, int64_t rows, int64_t cols, DType dtype) {
  require_shape(t, name, {rows, cols});
  require_dtype(t, name, dtype);
}

void require_output(const TensorView& t, const char* name, int64_t rows, int64_t cols) {
  require_shape(t, name, {rows, cols});
  require_floating(t, name);
  require(t.stride[1] == 1 || cols <= 1, "output rows must be contiguous");
}

}  // namespace

void check_linear_forward(const LinearParams& p) {
  require(p.x.ndim == 2 && p.weight.ndim == 2, "x and weight must be matrices");
  require_floating(p.x, "x");
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.weight.shape[0];
  require_matrix(p.weight, "weight", N, K, p.x.dtype);
  if (p.bias.defined) require_shape(p.bias, "bias", {N});
  if (p.bias.defined) require_floating(p.bias, "bias");
  require_output(p.out, "out", M, N);
}

void check_linear_backward(const LinearBackwardParams& p) {
  require(p.grad.ndim == 2, "grad must be a matrix");
  require_floating(p.grad, "grad");
  const int64_t M = p.grad.shape[0], N = p.grad.shape[1];
  if (p.grad_x.defined) {
    require(p.weight.ndim == 2, "weight must be a matrix");
    require_matrix(p.weight, "weight", N, p.weight.shape[1], p.grad.dtype);
    require_output(p.grad_x, "grad_x", M, p.weight.shape[1]);
  }
  if (p.grad_weight.defined) {
    require(p.x.ndim == 2, "x must be a matrix");
    require_matrix(p.x, "x", M, p.x.shape[1], p.grad.dtype);
    require_output(p.grad_weight, "grad_weight", N, p.x.shape[1]);
  }
  if (p.grad_bias.defined) {
    require_shape(p.grad_bias, "grad_bias", {N});
    require_contiguous(p.grad_bias, "grad_bias");
    require_floating(p.grad_bias, "grad_bias");
  }
}

}  // namespace llmfast
