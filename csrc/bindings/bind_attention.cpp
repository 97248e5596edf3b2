#include <optional>

#include <pybind11/stl.h>

#include "attention/attention.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace llmfast {
namespace {

using Distance = std::optional<int64_t>;  // None: unbounded

AttentionArguments arguments(const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k,
                             const TensorView& v, const TensorView& mask, const TensorView& cu_seqlens_q,
                             const TensorView& cu_seqlens_k, Distance left, Distance right, float scale,
                             float softcap) {
  return {q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k, left.value_or(kUnbounded), right.value_or(kUnbounded),
          scale, softcap};
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(
      "attention_forward",
      [](const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k, const TensorView& v,
         const TensorView& mask, const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k, Distance left,
         Distance right, float scale, float softcap) {
        attention_forward(
            arguments(out, lse, q, k, v, mask, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap));
      },
      WithoutGil());
  m.def(
      "attention_backward",
      [](const TensorView& grad_q, const TensorView& grad_k, const TensorView& grad_v, const TensorView& grad_out,
         const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k, const TensorView& v,
         const TensorView& mask, const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k, Distance left,
         Distance right, float scale, float softcap) {
        attention_backward(
            arguments(out, lse, q, k, v, mask, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap),
            {grad_out, grad_q, grad_k, grad_v});
      },
      WithoutGil());
}

}  // namespace llmfast
