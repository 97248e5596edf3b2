// ffn on Hopper's product (gemm/cuda/hopper_gemm.h): 16-bit matrices with contiguous, 16-byte aligned rows.
#include "ffn/cuda/hopper_epilogues.h"
#include "gemm/cuda/hopper_gemm.h"

namespace llmfast::cuda {

bool ffn_forward_fits_sm90a(const FfnParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], F = p.up_weight.shape[0];
  const auto fits = [](const TensorView& t, int64_t mn, int64_t k) {
    return !t.defined || HopperProduct::fits(operand(t), Major::k, mn, k);
  };
  return fits(p.x, M, C) && fits(p.up_weight, F, C) && fits(p.gate_weight, F, C) && fits(p.down_weight, C, F) &&
         ffn::saved_fits(p.up) && ffn::saved_fits(p.gate);
}

void ffn_forward_sm90a(const FfnParams& p, const Stream& stream) {
  visit_half(p.x.dtype, [&](auto type) { ffn::forward<HopperProduct, decltype(type)>(p, stream); });
}

}  // namespace llmfast::cuda
