#include "norm/norm_checks.h"

#include <string>

#include "core/check.h"

namespace llmfast {
namespace {

bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

[[noreturn]] void fail(const char* name, const TensorView& t, const std::string& expected) {
  throw std::invalid_argument(std::string(name) + ": got " + describe(t) + ", expected " + expected);
}

void require_rows(const TensorView& t, const char* name, const TensorView& like) {
  if (!t.defined) return;
  require_floating(t, name);
  if (!same_shape(t, like)) fail(name, t, "the shape of " + describe(like));
  if (t.numel() > 0 && t.shape[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1) fail(name, t, "contiguous rows");
}

void require_output(const TensorView& t, const char* name, const TensorView& like) {
  require_rows(t, name, like);
  if (t.defined) require_contiguous(t, name);
}

void require_vector(const TensorView& t, const char* name, int64_t size) {
  if (!t.defined) return;
  require_shape(t, name, {size});
  require_floating(t, name);
}

void require_statistics(const TensorView& t, const char* name, int64_t rows) {
  if (!t.defined) return;
  require_dtype(t, name, DType::f32);
  require_contiguous(t, name);
  if (t.numel() != rows) fail(name, t, std::to_string(rows) + " elements");
}

int64_t width(const TensorView& t) { return t.shape[t.ndim - 1]; }

}  // namespace

bool check_norm_forward(const NormParams& p) {
  require(p.x.ndim > 0, "x: got a scalar, expected at least one dimension");
  require_rows(p.x, "x", p.x);
  require_rows(p.residual, "residual", p.x);
  require_vector(p.weight, "weight", width(p.x));
  require_vector(p.bias, "bias", width(p.x));
  require(p.normed.defined, "normed: got None");
  require_output(p.normed, "normed", p.x);
  require_output(p.summed, "summed", p.x);
  require(p.summed.defined == p.residual.defined, "summed goes with residual");
  if (p.summed.defined) require_dtype(p.summed, "summed", p.residual.dtype);
  const int64_t C = width(p.x), M = C ? p.x.numel() / C : 0;
  if (M == 0) return false;
  require_statistics(p.mean, "mean", M);
  require_statistics(p.rstd, "rstd", M);
  return true;
}

bool check_norm_backward(const NormBackwardParams& p) {
  require(p.summed.defined && p.summed.ndim > 0, "summed: expected at least one dimension");
  require_rows(p.summed, "summed", p.summed);
  require(p.grad_normed.defined, "grad_normed: got None");
  require_rows(p.grad_normed, "grad_normed", p.summed);
  require_rows(p.grad_summed, "grad_summed", p.summed);
  require_output(p.grad_total, "grad_total", p.summed);
  require_output(p.grad_x, "grad_x", p.summed);
  for (const TensorView* t : {&p.grad_summed, &p.grad_total})
    if (t->defined) require_dtype(*t, "grad_summed and grad_total", p.summed.dtype);
  const int64_t C = width(p.summed);
  if (C == 0) return false;
  require_vector(p.weight, "weight", C);
  require_vector(p.grad_weight, "grad_weight", C);
  require_vector(p.grad_bias, "grad_bias", C);
  if (p.grad_weight.defined) require_contiguous(p.grad_weight, "grad_weight");
  if (p.grad_bias.defined) require_contiguous(p.grad_bias, "grad_bias");
  const int64_t M = p.summed.numel() / C;
  require(p.rstd.defined && p.mean.defined == p.centred, "mean and rstd: expected those that forward saved");
  require_statistics(p.mean, "mean", M);
  require_statistics(p.rstd, "rstd", M);
  return true;
}

}  // namespace llmfast
