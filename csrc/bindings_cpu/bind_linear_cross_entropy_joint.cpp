#include "bindings/run.h"
#include "bindings_cpu/bindings.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace llmfast {

void bind_linear_cross_entropy_joint(pybind11::module_& m) {
  m.def(
      "linear_cross_entropy_joint",
      [](const TensorView& loss, const TensorView& grad_x, const TensorView& grad_weight, const TensorView& x,
         const TensorView& weight, const TensorView& target, int64_t ignore_index, bool mean,
         int64_t rows, const TensorView& workspace) {
        prepare(grad_x);
        prepare(grad_weight);
        prepare(workspace);
        linear_cross_entropy_joint({x, weight, target, loss, grad_x, grad_weight, ignore_index, mean, rows, workspace});
      },
      WithoutGil());
}

}  // namespace llmfast
