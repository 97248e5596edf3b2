#include "bindings/bindings.h"
#include "linear/linear.h"

namespace py = pybind11;

namespace llmfast {

void bind_linear(py::module_& m) {
  m.def(
      "linear_forward",
      [](const TensorView& out, const TensorView& x, const TensorView& weight, const TensorView& bias) {
        linear_forward({x, weight, bias, out});
      },
      WithoutGil());
  m.def(
      "linear_backward",
      [](const TensorView& grad_x, const TensorView& grad_weight, const TensorView& grad_bias, const TensorView& grad,
         const TensorView& x, const TensorView& weight) {
        linear_backward({grad, x, weight, grad_x, grad_weight, grad_bias});
      },
      WithoutGil());
}

}  // namespace llmfast
