#include "optim/adamw_checks.h"

#include <cmath>
#include <string>

#include "core/check.h"

namespace llmfast {
namespace {

[[noreturn]] void fail(const char* name, int64_t i, const TensorView& t, const std::string& expected) {
  throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "]: got " + describe(t) + ", expected " +
                              expected);
}

bool same_layout(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  const bool empty = a.numel() == 0;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && !empty && a.stride[i] != b.stride[i])) return false;
  return true;
}

float* state_of(const char* name, int64_t i, const TensorView& t, const TensorView& param) {
  if (!t.defined || t.dtype != DType::f32 || !same_layout(t, param))
    fail(name, i, t, "float32 with the layout of its parameter, " + describe(param));
  return t.as<float>();
}

}  // namespace

AdamWTensor checked_adamw(const AdamWInputs& in, int64_t i) {
  const TensorView &param = in.params[i], &grad = in.grads[i];
  if (!param.defined || !is_floating(param.dtype) || !is_dense(param))
    fail("params", i, param, "a dense floating tensor");
  if (!grad.defined || (grad.dtype != param.dtype && grad.dtype != DType::f32) || !same_layout(grad, param))
    fail("grads", i, grad, "float32 or the parameter's dtype, with the layout of its parameter, " + describe(param));
  AdamWTensor t{};
  t.param = param.data;
  t.grad = grad.data;
  t.exp_avg = state_of("exp_avgs", i, in.exp_avgs[i], param);
  t.exp_avg_sq = state_of("exp_avg_sqs", i, in.exp_avg_sqs[i], param);
  t.master = param.dtype == DType::f32 ? nullptr : state_of("masters", i, in.masters[i], param);
  t.count = param.numel();
  t.param_dtype = param.dtype;
  t.grad_dtype = grad.dtype;
  return t;
}

void set_scalars(AdamWTensor* t, const AdamWGroup& group, double step) {
  t->one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
  t->beta2 = static_cast<float>(group.beta2);
  t->one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
  t->eps = static_cast<float>(group.eps);
  t->decay = static_cast<float>(1.0 - group.lr * group.weight_decay);
  t->step_size = static_cast<float>(group.lr / (1.0 - std::pow(group.beta1, step)));
  t->denom_scale = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(group.beta2, step)));
}

void check_gradient(const TensorView& g, int64_t i) {
  if (!g.defined || !is_floating(g.dtype) || !is_dense(g)) fail("grads", i, g, "a dense floating tensor");
}

bool is_dense(const TensorView& t) {
  int64_t filled = 1;
  bool used[kMaxDims] = {};
  for (int round = 0; round < t.ndim; ++round) {
    int next = -1;
    for (int i = 0; i < t.ndim; ++i)
      if (!used[i] && (t.shape[i] == 1 || (next < 0 && t.stride[i] == filled))) next = i;
    if (next < 0) return t.numel() == 0;
    used[next] = true;
    filled *= t.shape[next];
  }
  return true;
}

}  // namespace llmfast
