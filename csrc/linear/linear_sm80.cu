// linear on the portable CUDA product (gemm/cuda/gemm.h).
#include "gemm/cuda/hopper_schedule.h"
#include "linear/cuda/driver.h"

namespace llmfast::cuda {

int64_t linear_workspace(int64_t M, int64_t N, int64_t K) { return product_workspace({M, N, K}); }

int64_t linear_backward_workspace(int64_t M, int64_t N, int64_t K) {
  const int64_t sizes[] = {product_workspace({M, K, N}), product_workspace({N, K, M}), column_sums_workspace(M, N)};
  int64_t most = 0;
  for (const int64_t size : sizes) most = size > most ? size : most;
  return most;
}

void linear_forward_sm80(const LinearParams& p, const Stream& stream) {
  visit_float(p.x.dtype, [&](auto type) { linear_forward<PortableProduct, decltype(type)>(p, stream); });
}

void linear_backward_sm80(const LinearBackwardParams& p, const Stream& stream) {
  visit_float(p.grad.dtype, [&](auto type) { linear_backward<PortableProduct, decltype(type)>(p, stream); });
}

}  // namespace llmfast::cuda
