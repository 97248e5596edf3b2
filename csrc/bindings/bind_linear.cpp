#include "bindings/bindings.h"
#include "bindings/eager.h"

namespace py = pybind11;

namespace llmfast {

namespace {

py::object linear_eager(py::handle x, py::handle weight, py::handle bias, bool grad_enabled) {
  EagerTensor tx(x), tw(weight), tb(bias);
  const Plain plain = read_eager({&tx, &tw, &tb}, grad_enabled);
  if (plain == Plain::no || !tx.view.defined || !tw.view.defined) return py::none();
  const TensorView& w = tw.view;
  const int last = tx.view.ndim - 1;
  if (w.ndim != 2 || last < 0 || w.shape[1] != tx.view.shape[last] || w.dtype != tx.view.dtype) return py::none();
  if (!is_floating(w.dtype)) return py::none();
  if (tb.view.defined && (tb.view.ndim != 1 || tb.view.shape[0] != w.shape[0] || tb.view.dtype != w.dtype)) return py::none();
  if (!takes_vector(tb.view)) return py::none();
  TensorView rows = tx.view, out_view;
  if (!flatten_rows(&rows)) return py::none();
  py::object out = new_rows(tx.view, w.shape[0], w.dtype, &out_view);
  run(LinearParams{rows, w, tb.view, out_view});
  return plain == Plain::wants_gradient ? py::object(list_of(out)) : out;
}

py::object linear_gradient(py::handle grad, py::handle x, py::handle weight, const py::tuple& needs) {
  EagerTensor tg(grad), tx(x), tw(weight);
  if (read_eager({&tg, &tx, &tw}) == Plain::no || !tg.view.defined || !tx.view.defined) return py::none();
  if (!tw.view.defined || tw.view.ndim != 2) return py::none();
  const int64_t N = tw.view.shape[0], K = tw.view.shape[1];
  const DType dtype = tx.view.dtype;
  TensorView grad_rows = tg.view, rows = tx.view;
  if (!flatten_rows(&grad_rows) || !flatten_rows(&rows)) return py::none();
  LinearBackwardParams params{grad_rows, rows, tw.view, {}, {}, {}};
  py::tuple grads = no_gradients(needs);
  if (is_needed(needs, 0)) grads[0] = new_rows(tx.view, K, dtype, &params.grad_x);
  if (is_needed(needs, 1)) grads[1] = new_tensor(tx.view, dtype, {N, K}, &params.grad_weight);
  if (is_needed(needs, 2)) grads[2] = new_tensor(tx.view, dtype, {N}, &params.grad_bias);
  run(params);
  return grads;
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear", &linear_eager);
  m.def("linear_gradient", &linear_gradient);
  m.def(
      "linear_forward",
      [](const TensorView& out, const TensorView& x, const TensorView& weight, const TensorView& bias) {
        run(LinearParams{x, weight, bias, out});
      });
  m.def(
      "linear_backward",
      [](const TensorView& grad_x, const TensorView& grad_weight, const TensorView& grad_bias, const TensorView& grad,
         const TensorView& x, const TensorView& weight) {
        run(LinearBackwardParams{grad, x, weight, grad_x, grad_weight, grad_bias});
      });
}

}  // namespace llmfast
