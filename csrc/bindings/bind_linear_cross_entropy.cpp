#include "bindings/bindings.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace py = pybind11;

namespace llmfast {

void bind_linear_cross_entropy(py::module_& m) {
  m.def(
      "linear_cross_entropy_forward",
      [](const TensorView& losses, const TensorView& lse, const TensorView& x, const TensorView& weight,
         const TensorView& target, int64_t ignore_index) {
        linear_cross_entropy_forward({x, weight, target, losses, lse, ignore_index});
      },
      WithoutGil());
  m.def(
      "linear_cross_entropy_backward",
      [](const TensorView& grad_x, const TensorView& grad_weight, const TensorView& grad, const TensorView& x,
         const TensorView& weight, const TensorView& target, const TensorView& lse, int64_t ignore_index) {
        linear_cross_entropy_backward({grad, x, weight, target, lse, grad_x, grad_weight, ignore_index});
      },
      WithoutGil());
  m.def(
      "linear_cross_entropy_joint",
      [](const TensorView& loss, const TensorView& grad_x, const TensorView& grad_weight, const TensorView& x,
         const TensorView& weight, const TensorView& target, int64_t ignore_index, bool mean,
         int64_t rows, const TensorView& workspace) {
        linear_cross_entropy_joint({x, weight, target, loss, grad_x, grad_weight, ignore_index, mean, rows, workspace});
      },
      WithoutGil());
}

}  // namespace llmfast
