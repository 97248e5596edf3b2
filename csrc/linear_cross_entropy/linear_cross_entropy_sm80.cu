// linear_cross_entropy on the portable CUDA product (gemm/cuda/gemm.h).
#include "linear_cross_entropy/cuda/driver.h"

namespace llmfast::cuda {

int64_t linear_cross_entropy_workspace(int64_t M) {
  Scratch count;
  cross_entropy::ForwardScratch(count, M);
  return count.floats();
}

int64_t linear_cross_entropy_backward_workspace(int64_t M, int64_t C, int64_t V, int64_t element_bytes) {
  Scratch count;
  if (element_bytes == 2) cross_entropy::BackwardScratch<bf16>(count, M, C, V);
  else cross_entropy::BackwardScratch<float>(count, M, C, V);
  return count.floats();
}

void linear_cross_entropy_forward_sm80(const LinearCrossEntropyParams& p, const Stream& stream) {
  visit_float(p.x.dtype, [&](auto type) { cross_entropy::forward<PortableProduct, decltype(type)>(p, stream); });
}

void linear_cross_entropy_backward_sm80(const LinearCrossEntropyBackwardParams& p, const Stream& stream) {
  visit_float(p.x.dtype, [&](auto type) { cross_entropy::backward<PortableProduct, decltype(type)>(p, stream); });
}

}  // namespace llmfast::cuda
