#include "bindings_cuda/bindings.h"
#include "embedding/embedding_cuda.h"

namespace py = pybind11;

namespace llmfast {

void bind_embedding(py::module_& m) {
  m.def(
      "embedding_forward",
      [](const TensorView& out, const TensorView& ids, const TensorView& weight, const TensorView& position_weight,
         const TensorView& position_ids, uint64_t stream) {
        embedding_forward({ids, weight, position_weight, position_ids, out}, stream_on(out, stream));
      },
      WithoutGil());
  m.def(
      "embedding_backward",
      [](const TensorView& grad_weight, const TensorView& grad, const TensorView& ids, const TensorView& sorted_ids,
         const TensorView& order, uint64_t stream) {
        embedding_backward({grad, ids, grad_weight, sorted_ids, order}, stream_on(grad, stream));
      },
      WithoutGil());
}

}  // namespace llmfast
