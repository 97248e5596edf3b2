#include "bindings_cuda/bindings.h"
#include "linear_cross_entropy/linear_cross_entropy_cuda.h"

namespace py = pybind11;

namespace llmfast {

void bind_linear_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy_workspace", &cuda::linear_cross_entropy_workspace);
  m.def(
      "linear_cross_entropy_forward",
      [](const TensorView& losses, const TensorView& lse, const TensorView& x, const TensorView& weight,
         const TensorView& target, int64_t ignore_index, const TensorView& workspace, uint64_t stream) {
        linear_cross_entropy_forward({x, weight, target, losses, lse, ignore_index, workspace}, stream_on(x, stream));
      },
      WithoutGil());
  m.def("linear_cross_entropy_backward_workspace", &cuda::linear_cross_entropy_backward_workspace);
  m.def(
      "linear_cross_entropy_backward",
      [](const TensorView& grad_x, const TensorView& grad_weight, const TensorView& grad, const TensorView& x,
         const TensorView& weight, const TensorView& target, const TensorView& lse, int64_t ignore_index,
         const TensorView& workspace, uint64_t stream) {
        linear_cross_entropy_backward({grad, x, weight, target, lse, grad_x, grad_weight, ignore_index, workspace},
                                      stream_on(x, stream));
      },
      WithoutGil());
}

}  // namespace llmfast
