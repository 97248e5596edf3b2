#include "embedding/embedding_cuda.h"

#include "core/check.h"
#include "embedding/embedding_checks.h"

namespace llmfast {
namespace {

const CudaTable<EmbeddingParams> kForward("embedding",
                                          {{Arch::sm80, kAllFloat, nullptr, cuda::embedding_forward_sm80}});
const CudaTable<EmbeddingBackwardParams> kBackward("embedding_backward",
                                                   {{Arch::sm80, kAllFloat, nullptr, cuda::embedding_backward_sm80}});

// [M, C] in all
void require_sizes(int64_t V, int64_t C, int64_t elements) {
  const int64_t most = 0x7fffffff;
  require(V <= most && C <= 65535 * 256 && elements / C <= most, "embedding: too large for a GPU kernel");
}

}  // namespace

void embedding_forward(const EmbeddingParams& p, const Stream& stream) {
  if (!check_embedding_forward(p)) return;
  require_sizes(p.weight.shape[0], p.weight.shape[1], p.out.numel());
  kForward(p.weight.dtype, p, stream);
}

void embedding_backward(const EmbeddingBackwardParams& p, const Stream& stream) {
  if (!check_embedding_backward(p)) return;
  require_sizes(p.grad_weight.shape[0], p.grad_weight.shape[1], p.grad.numel());
  if (p.ids.defined) {
    require(p.sorted_ids.defined && p.order.defined, "sorted_ids and order: expected tensors where ids are");
    require_shape(p.sorted_ids, "sorted_ids", {p.ids.numel()});
    require_shape(p.order, "order", {p.ids.numel()});
    require_dtype(p.sorted_ids, "sorted_ids", p.ids.dtype);
    require_dtype(p.order, "order", DType::i64);
    require_contiguous(p.sorted_ids, "sorted_ids");
    require_contiguous(p.order, "order");
  }
  kBackward(p.grad.dtype, p, stream);
}

}  // namespace llmfast
