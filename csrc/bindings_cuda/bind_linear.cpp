#include "bindings_cuda/bindings.h"
#include "linear/linear_cuda.h"

namespace py = pybind11;

namespace llmfast {

void bind_linear(py::module_& m) {
  m.def("linear_workspace", &cuda::linear_workspace);
  m.def(
      "linear_forward",
      [](const TensorView& out, const TensorView& x, const TensorView& weight, const TensorView& bias,
         const TensorView& workspace, uint64_t stream) {
        linear_forward({x, weight, bias, out, workspace}, stream_on(x, stream));
      },
      WithoutGil());
  m.def("linear_backward_workspace", &cuda::linear_backward_workspace);
  m.def(
      "linear_backward",
      [](const TensorView& grad_x, const TensorView& grad_weight, const TensorView& grad_bias, const TensorView& grad,
         const TensorView& x, const TensorView& weight, const TensorView& workspace, uint64_t stream) {
        linear_backward({grad, x, weight, grad_x, grad_weight, grad_bias, workspace}, stream_on(grad, stream));
      },
      WithoutGil());
}

}  // namespace llmfast
