#include <algorithm>
#include <stdexcept>
#include <string>

#include "linear_cross_entropy/linear_cross_entropy_checks.h"

namespace llmfast {
namespace {

const DispatchTable<LinearCrossEntropyParams> kForward("linear_cross_entropy",{
    LLMFAST_MM_ROWS(linear_cross_entropy_forward)});

const DispatchTable<LinearCrossEntropyBackwardParams> kBackward("linear_cross_entropy_backward",{
    LLMFAST_MM_ROWS(linear_cross_entropy_backward)});

const DispatchTable<LinearCrossEntropyJointParams> kJoint("linear_cross_entropy_joint",{
    LLMFAST_MM_ROWS_OF(linear_cross_entropy_joint, kF32 | kBF16)});

void check_targets(const TensorView& target, int64_t V, int64_t ignore_index) {
  const auto* values = target.as<const int64_t>();
  for (int64_t m = 0; m < target.shape[0]; ++m)
    if (values[m] != ignore_index && (values[m] < 0 || values[m] >= V))
      throw std::invalid_argument("target: got " + std::to_string(values[m]) + " at position " + std::to_string(m) +
                                  ", expected 0 to " + std::to_string(V - 1) + " or ignore_index " +
                                  std::to_string(ignore_index));
}

float count_targets(const TensorView& target, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t m = 0; m < target.shape[0]; ++m) count += target.as<int64_t>()[m] != ignore_index;
  return static_cast<float>(count);
}

}  // namespace

void reduce_losses(const LossReductionParams& p) {
  double sum = 0;
  for (int64_t m = 0; m < p.losses.shape[0]; ++m) sum += p.losses.as<float>()[m];
  *p.loss.as<float>() = static_cast<float>(sum) / (p.mean ? count_targets(p.target, p.ignore_index) : 1.0f);
}

void spread_loss_gradient(const LossGradientParams& p) {
  const float value = *p.grad.as<float>() / (p.mean ? count_targets(p.target, p.ignore_index) : 1.0f);
  std::fill_n(p.row_grads.as<float>(), p.row_grads.shape[0], value);
}

void linear_cross_entropy_forward(const LinearCrossEntropyParams& p) {
  check_linear_cross_entropy_forward(p);
  check_targets(p.target, p.weight.shape[0], p.ignore_index);
  kForward(p.x.dtype, p);
}

void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& p) {
  check_linear_cross_entropy_backward(p);
  check_targets(p.target, p.weight.shape[0], p.ignore_index);
  kBackward(p.x.dtype, p);
}

void linear_cross_entropy_joint(const LinearCrossEntropyJointParams& p) {
  check_linear_cross_entropy_joint(p);
  check_targets(p.target, p.weight.shape[0], p.ignore_index);
  kJoint(p.x.dtype, p);
}

}  // namespace llmfast
