// ffn's backward pass on Hopper's product (gemm/cuda/hopper_gemm.h): 16-bit matrices with contiguous, 16-byte aligned
// rows.
#include "ffn/cuda/hopper_epilogues.h"
#include "gemm/cuda/hopper_gemm.h"

namespace llmfast::cuda {

bool ffn_backward_fits_sm90a(const FfnBackwardParams& p) {
  const int64_t M = p.grad.shape[0], C = p.grad.shape[1], F = p.up_weight.shape[0];
  const auto fits = [](const TensorView& t, int64_t mn, int64_t k) {
    return !t.defined || HopperProduct::fits(operand_transposed(t), Major::mn, mn, k);
  };
  return HopperProduct::fits(operand(p.grad), Major::k, M, C) && fits(p.down_weight, F, C) && fits(p.up_weight, C, F) &&
         fits(p.gate_weight, C, F) && fits(p.x, C, M) && F % 2 == 0 && ffn::saved_fits(p.up) && ffn::saved_fits(p.gate);
}

void ffn_backward_sm90a(const FfnBackwardParams& p, const Stream& stream) {
  visit_half(p.grad.dtype, [&](auto type) { ffn::backward<HopperProduct, decltype(type)>(p, stream); });
}

}  // namespace llmfast::cuda
