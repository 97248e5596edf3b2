#include "bindings_cuda/bindings.h"
#include "norm/norm_cuda.h"

namespace py = pybind11;

namespace llmfast {

void bind_norm(py::module_& m) {
  m.def(
      "norm_forward",
      [](const TensorView& normed, const TensorView& summed, const TensorView& mean, const TensorView& rstd,
         const TensorView& x, const TensorView& residual, const TensorView& weight, const TensorView& bias, float eps,
         bool centred, uint64_t stream) {
        norm_forward({x, residual, weight, bias, normed, summed, mean, rstd, eps, centred}, stream_on(x, stream));
      },
      WithoutGil());
  m.def("norm_backward_workspace", &norm_backward_workspace);
  m.def(
      "norm_backward",
      [](const TensorView& grad_total, const TensorView& grad_x, const TensorView& grad_weight,
         const TensorView& grad_bias, const TensorView& grad_normed, const TensorView& grad_summed,
         const TensorView& summed, const TensorView& weight, const TensorView& mean, const TensorView& rstd, float eps,
         bool centred, const TensorView& workspace, uint64_t stream) {
        norm_backward({grad_normed, grad_summed, summed, weight, mean, rstd, grad_total, grad_x, grad_weight, grad_bias,
                       eps, centred, workspace},
                      stream_on(summed, stream));
      },
      WithoutGil());
}

}  // namespace llmfast
