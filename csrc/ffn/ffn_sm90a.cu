// ffn on Hopper's product (gemm/cuda/hopper_gemm.h): 16-bit matrices with contiguous, 16-byte aligned rows.
#include "ffn/cuda/hopper_epilogues.h"
#include "gemm/cuda/hopper_gemm.h"

namespace llmfast::cuda {

// Whether boxes of a saved tensor [M, F] can be written and pairs of columns read.
static bool saved_fits(const TensorView& t) {
  return !t.defined || can_map(mapped_boxes(t.data, DType::bf16, t.stride[0], {t.shape[0], t.shape[1], 0}));
}

bool ffn_forward_fits_sm90a(const FfnParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], F = p.up_weight.shape[0];
  const auto fits = [](const TensorView& t, int64_t mn, int64_t k) {
    return !t.defined || HopperProduct::fits(operand(t), Major::k, mn, k);
  };
  return fits(p.x, M, C) && fits(p.up_weight, F, C) && fits(p.gate_weight, F, C) && fits(p.down_weight, C, F) &&
         saved_fits(p.up) && saved_fits(p.gate);
}

bool ffn_backward_fits_sm90a(const FfnBackwardParams& p) {
  const int64_t M = p.grad.shape[0], C = p.grad.shape[1], F = p.up_weight.shape[0];
  const auto fits = [](const TensorView& t, int64_t mn, int64_t k) {
    return !t.defined || HopperProduct::fits(operand_transposed(t), Major::mn, mn, k);
  };
  return HopperProduct::fits(operand(p.grad), Major::k, M, C) && fits(p.down_weight, F, C) && fits(p.up_weight, C, F) &&
         fits(p.gate_weight, C, F) && fits(p.x, C, M) && F % 2 == 0 && saved_fits(p.up) && saved_fits(p.gate);
}

void ffn_forward_sm90a(const FfnParams& p, const Stream& stream) {
  visit_half(p.x.dtype, [&](auto type) { ffn::forward<HopperProduct, decltype(type)>(p, stream); });
}

void ffn_backward_sm90a(const FfnBackwardParams& p, const Stream& stream) {
  visit_half(p.grad.dtype, [&](auto type) { ffn::backward<HopperProduct, decltype(type)>(p, stream); });
}

}  // namespace llmfast::cuda
