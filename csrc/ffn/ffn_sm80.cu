// ffn on the portable CUDA product (gemm/cuda/gemm.h).
#include "ffn/cuda/driver.h"

namespace llmfast::cuda {

int64_t ffn_workspace(int64_t M, int64_t C, int64_t F, int64_t element_bytes, bool gated, bool saved) {
  Scratch count;
  if (element_bytes == 2) ffn::ForwardScratch<bf16>(count, M, C, F, gated, saved);
  else ffn::ForwardScratch<float>(count, M, C, F, gated, saved);
  return count.floats();
}

int64_t ffn_backward_workspace(int64_t M, int64_t C, int64_t F, int64_t element_bytes, bool gated) {
  Scratch count;
  if (element_bytes == 2) ffn::BackwardScratch<bf16>(count, M, C, F, gated);
  else ffn::BackwardScratch<float>(count, M, C, F, gated);
  return count.floats();
}

void ffn_forward_sm80(const FfnParams& p, const Stream& stream) {
  visit_float(p.x.dtype, [&](auto type) { ffn::forward<PortableProduct, decltype(type)>(p, stream); });
}

void ffn_backward_sm80(const FfnBackwardParams& p, const Stream& stream) {
  visit_float(p.grad.dtype, [&](auto type) { ffn::backward<PortableProduct, decltype(type)>(p, stream); });
}

}  // namespace llmfast::cuda
