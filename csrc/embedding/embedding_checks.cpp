#include "embedding/embedding_checks.h"

#include <string>

#include "core/check.h"

namespace llmfast {
namespace {

void require_ids(const TensorView& ids) {
  require(ids.dtype == DType::i32 || ids.dtype == DType::i64, "ids must be int32 or int64");
  require(ids.ndim < kMaxDims, "ids may have at most 5 dimensions");
}

void require_table(const TensorView& table, const char* name) {
  require(table.ndim == 2, "weights must be [V, C]");
  require_floating(table, name);
  require(table.numel() == 0 || table.shape[1] == 1 || table.stride[1] == 1, "weights must have contiguous rows");
}

// values is [ids..., C] with contiguous rows
void require_rows(const TensorView& values, const char* name, const TensorView& ids, int64_t C) {
  require_floating(values, name);
  bool fits = values.ndim == ids.ndim + 1 && values.shape[values.ndim - 1] == C;
  for (int i = 0; fits && i < ids.ndim; ++i) fits = values.shape[i] == ids.shape[i];
  if (!fits) throw std::invalid_argument(std::string(name) + ": got " + describe(values) + " for ids " + describe(ids));
  require(values.numel() == 0 || C == 1 || values.stride[values.ndim - 1] == 1, "rows must be contiguous");
}

}  // namespace

bool check_embedding_forward(const EmbeddingParams& p) {
  require_table(p.weight, "weight");
  const int64_t C = p.weight.shape[1];
  require_ids(p.ids);
  require_rows(p.out, "out", p.ids, C);
  require_contiguous(p.out, "out");
  if (p.position_weight.defined) {
    require_table(p.position_weight, "position_weight");
    require_dtype(p.position_weight, "position_weight", p.weight.dtype);
    const int64_t P = p.position_weight.shape[0];
    require_shape(p.position_weight, "position_weight", {P, C});
    if (p.position_ids.defined) {
      require_ids(p.position_ids);
      require_rows(p.out, "out", p.position_ids, C);
    } else {
      require(p.ids.ndim > 0 && p.ids.shape[p.ids.ndim - 1] <= P, "position_weight: fewer rows than positions");
    }
  }
  return p.out.numel() > 0;
}

bool check_embedding_backward(const EmbeddingBackwardParams& p) {
  require(p.grad.ndim > 0, "grad must be [..., C]");
  require(p.grad_weight.ndim == 2, "grad_weight must be [V, C]");
  require_floating(p.grad_weight, "grad_weight");
  require_contiguous(p.grad_weight, "grad_weight");
  const int64_t V = p.grad_weight.shape[0], C = p.grad_weight.shape[1];
  if (p.ids.defined) {
    require_ids(p.ids);
    require_rows(p.grad, "grad", p.ids, C);
  } else {
    require_floating(p.grad, "grad");
    const int last = p.grad.ndim - 1;
    require(last > 0 && p.grad.shape[last] == C && p.grad.shape[last - 1] <= V, "grad must be [..., T <= V, C]");
    require(p.grad.numel() == 0 || C == 1 || p.grad.stride[last] == 1, "grad must have contiguous rows");
  }
  return V * C > 0;
}

}  // namespace llmfast
