// linear_cross_entropy on Hopper's product (gemm/cuda/hopper_gemm.h): 16-bit matrices with contiguous, 16-byte aligned
// rows.
#include "gemm/cuda/hopper_gemm.h"
#include "linear_cross_entropy/cuda/hopper_epilogues.h"

namespace llmfast::cuda {

bool linear_cross_entropy_forward_fits_sm90a(const LinearCrossEntropyParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], V = p.weight.shape[0];
  return HopperProduct::fits(operand(p.x), Major::k, M, C) && HopperProduct::fits(operand(p.weight), Major::k, V, C);
}

bool linear_cross_entropy_backward_fits_sm90a(const LinearCrossEntropyBackwardParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], V = p.weight.shape[0];
  return HopperProduct::fits(operand(p.x), Major::k, M, C) && HopperProduct::fits(operand(p.weight), Major::k, V, C);
}

void linear_cross_entropy_forward_sm90a(const LinearCrossEntropyParams& p, const Stream& stream) {
  visit_half(p.x.dtype, [&](auto type) { cross_entropy::forward<HopperProduct, decltype(type)>(p, stream); });
}

void linear_cross_entropy_backward_sm90a(const LinearCrossEntropyBackwardParams& p, const Stream& stream) {
  visit_half(p.x.dtype, [&](auto type) { cross_entropy::backward<HopperProduct, decltype(type)>(p, stream); });
}

}  // namespace llmfast::cuda
