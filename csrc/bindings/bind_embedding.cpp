#include "bindings/bindings.h"
#include "embedding/embedding.h"

namespace py = pybind11;

namespace llmfast {

void bind_embedding(py::module_& m) {
  m.def(
      "embedding_forward",
      [](const TensorView& out, const TensorView& ids, const TensorView& weight, const TensorView& position_weight,
         const TensorView& position_ids) { embedding_forward({ids, weight, position_weight, position_ids, out}); },
      WithoutGil());
  m.def(
      "embedding_backward",
      [](const TensorView& grad_weight, const TensorView& grad, const TensorView& ids) {
        embedding_backward({grad, ids, grad_weight});
      },
      WithoutGil());
}

}  // namespace llmfast
