#include "bindings/bindings.h"
#include "bindings/eager.h"
#include "linear/linear.h"

namespace py = pybind11;

namespace llmfast {

namespace {

py::object linear_eager(py::handle x, py::handle weight, py::handle bias, bool grad_enabled) {
  EagerTensor tx{x.ptr(), {}}, tw{weight.ptr(), {}}, tb{bias.ptr(), {}};
  if (!read_eager({&tx, &tw, &tb}, grad_enabled) || !tx.view.defined || !tw.view.defined) return py::none();
  const TensorView& w = tw.view;
  const int last = tx.view.ndim - 1;
  if (w.ndim != 2 || last < 0 || w.shape[1] != tx.view.shape[last] || w.dtype != tx.view.dtype) return py::none();
  if (!is_floating(w.dtype)) return py::none();
  if (tb.view.defined && (tb.view.ndim != 1 || tb.view.shape[0] != w.shape[0] || tb.view.dtype != w.dtype)) return py::none();
  TensorView rows = tx.view, out_view;
  if (!flatten_rows(&rows)) return py::none();
  py::object out = new_rows(tx, w.shape[0], &out_view);
  const LinearParams params{rows, w, tb.view, out_view};
  py::gil_scoped_release release;
  linear_forward(params);
  return out;
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear", &linear_eager);
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
