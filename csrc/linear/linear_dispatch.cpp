#include <atomic>

#include "linear/linear_checks.h"

namespace llmfast {
namespace {

const DispatchTable<LinearParams> kForward("linear", {LLMFAST_BF16_AND_VEC_ROWS(linear_forward, nullptr)});

const DispatchTable<LinearBackwardParams> kBackward("linear_backward",{
    LLMFAST_BF16_AND_VEC_ROWS(linear_backward, nullptr)});

std::atomic<bool> split_products{false};

// Splitting pays from so many rows, columns and depth on.
bool is_worth_splitting(int64_t M, int64_t N, int64_t K) { return M >= 64 && N >= 64 && K >= 64; }
bool is_float32(const TensorView& t) { return !t.defined || t.dtype == DType::f32; }

[[maybe_unused]] bool splits_forward(const LinearParams& p) {
  return is_worth_splitting(p.x.shape[0], p.weight.shape[0], p.x.shape[1]) && is_float32(p.out);
}
[[maybe_unused]] bool splits_backward(const LinearBackwardParams& p) {
  const int64_t K = p.grad_x.defined ? p.weight.shape[1] : p.grad_weight.defined ? p.x.shape[1] : 0;
  return is_worth_splitting(p.grad.shape[0], p.grad.shape[1], K) && is_float32(p.grad_x) && is_float32(p.grad_weight);
}

const DispatchTable<LinearParams> kSplitForward("linear_split", {LLMFAST_AMX_ROW(linear_forward_split, splits_forward, kF32)});

const DispatchTable<LinearBackwardParams> kSplitBackward("linear_split_backward", {
    LLMFAST_AMX_ROW(linear_backward_split, splits_backward, kF32)});

}  // namespace

void set_float32_products_split(bool split) { split_products.store(split, std::memory_order_relaxed); }
bool float32_products_split() { return split_products.load(std::memory_order_relaxed); }

void linear_forward(const LinearParams& p) {
  check_linear_forward(p);
  if (float32_products_split() && kSplitForward(p.x.dtype, p)) return;
  kForward(p.x.dtype, p);
}

void linear_backward(const LinearBackwardParams& p) {
  check_linear_backward(p);
  if (float32_products_split() && kSplitBackward(p.grad.dtype, p)) return;
  kBackward(p.grad.dtype, p);
}

}  // namespace llmfast
