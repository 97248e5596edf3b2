#include <string>

#include "core/check.h"
#include "core/rows.h"
#include "embedding/embedding_checks.h"

namespace llmfast {
namespace {

const DispatchTable<EmbeddingParams> kForward("embedding", {LLMFAST_VEC_ROWS(embedding_forward, kAllFloat)});
const DispatchTable<EmbeddingBackwardParams> kBackward("embedding_backward",
                                                       {LLMFAST_VEC_ROWS(embedding_backward, kAllFloat)});

std::string position_of(const TensorView& ids, int64_t n) {
  std::string text;
  for (int i = ids.ndim - 1; i >= 0; n /= ids.shape[i--])
    text = std::to_string(n % ids.shape[i]) + (text.empty() ? "" : ", ") + text;
  return "(" + text + ")";
}

template <class Id>
void require_range(const TensorView& ids, const char* name, int64_t V) {
  const Rows elements(ids, ids.ndim);
  for (int64_t n = 0; n < elements.count; ++n) {
    const int64_t id = ids.as<const Id>()[elements.offset(n)];
    if (static_cast<uint64_t>(id) < static_cast<uint64_t>(V)) continue;
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(id) + " at position " +
                                position_of(ids, n) + ", expected 0 <= id < " + std::to_string(V));
  }
}

void require_ids_below(const TensorView& ids, const char* name, int64_t V) {
  if (ids.dtype == DType::i64) {
    require_range<int64_t>(ids, name, V);
  } else {
    require_range<int32_t>(ids, name, V);
  }
}

}  // namespace

void embedding_forward(const EmbeddingParams& p) {
  const bool work = check_embedding_forward(p);
  require_ids_below(p.ids, "input_ids", p.weight.shape[0]);
  if (p.position_ids.defined) require_ids_below(p.position_ids, "position_ids", p.position_weight.shape[0]);
  if (work) kForward(p.weight.dtype, p);
}

void embedding_backward(const EmbeddingBackwardParams& p) {
  const bool work = check_embedding_backward(p);
  if (p.ids.defined) require_ids_below(p.ids, "ids", p.grad_weight.shape[0]);
  if (work) kBackward(p.grad.dtype, p);
}

}  // namespace llmfast
