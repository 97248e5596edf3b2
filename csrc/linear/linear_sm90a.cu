// linear on Hopper's product (gemm/cuda/hopper_gemm.h): 16-bit matrices with contiguous, 16-byte aligned rows.
#include "gemm/cuda/hopper_gemm.h"
#include "linear/cuda/driver.h"

namespace llmfast::cuda {

bool linear_forward_fits_sm90a(const LinearParams& p) {
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.weight.shape[0];
  return HopperProduct::fits(operand(p.x), Major::k, M, K) && HopperProduct::fits(operand(p.weight), Major::k, N, K);
}

bool linear_backward_fits_sm90a(const LinearBackwardParams& p) {
  const int64_t M = p.grad.shape[0], N = p.grad.shape[1];
  return HopperProduct::fits(operand(p.grad), Major::k, M, N) &&
         (!p.grad_x.defined ||
          HopperProduct::fits(operand_transposed(p.weight), Major::mn, p.weight.shape[1], N)) &&
         (!p.grad_weight.defined || HopperProduct::fits(operand_transposed(p.x), Major::mn, p.x.shape[1], M));
}

void linear_forward_sm90a(const LinearParams& p, const Stream& stream) {
  visit_half(p.x.dtype, [&](auto type) { linear_forward<HopperProduct, decltype(type)>(p, stream); });
}

void linear_backward_sm90a(const LinearBackwardParams& p, const Stream& stream) {
  visit_half(p.grad.dtype, [&](auto type) { linear_backward<HopperProduct, decltype(type)>(p, stream); });
}

}  // namespace llmfast::cuda
