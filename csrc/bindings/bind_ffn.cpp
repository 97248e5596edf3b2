#include "bindings/bindings.h"
#include "bindings/eager.h"

namespace py = pybind11;

namespace llmfast {

namespace {

py::object ffn_eager(py::handle x, py::handle up_weight, py::handle up_bias, py::handle gate_weight,
                     py::handle down_weight, py::handle down_bias, int activation, bool grad_enabled) {
  EagerTensor tx(x), up(up_weight), up_b(up_bias), gate(gate_weight), down(down_weight), down_b(down_bias);
  const Plain plain = read_eager({&tx, &up, &up_b, &gate, &down, &down_b}, grad_enabled);
  if (plain == Plain::no) return py::none();
  if (!tx.view.defined || !up.view.defined || !down.view.defined || tx.view.ndim < 1 || up.view.ndim != 2) return py::none();
  const DType dtype = tx.view.dtype;
  const int64_t C = tx.view.shape[tx.view.ndim - 1], F = up.view.shape[0];
  const auto fits = [dtype](const TensorView& t, int64_t rows, int64_t cols) {
    return !t.defined || (t.dtype == dtype && t.ndim == (cols ? 2 : 1) && t.shape[0] == rows && (!cols || t.shape[1] == cols));
  };
  if (!is_floating(dtype) || !fits(up.view, F, C) || !fits(gate.view, F, C) || !fits(down.view, C, F) ||
      !fits(up_b.view, F, 0) || !fits(down_b.view, C, 0))
    return py::none();
  if (!takes_vector(up_b.view) || !takes_vector(down_b.view)) return py::none();
  TensorView rows = tx.view, out_view, up_view, gate_view;
  if (!flatten_rows(&rows)) return py::none();
  const bool save = plain == Plain::wants_gradient;
  py::object out = new_rows(tx.view, C, dtype, &out_view), saved_up = py::none(), saved_gate = py::none();
  if (save) {
    saved_up = new_tensor(tx.view, dtype, {rows.shape[0], F}, &up_view);
    if (gate.view.defined) saved_gate = new_tensor(tx.view, dtype, {rows.shape[0], F}, &gate_view);
  }
  const FfnParams params{rows,     up.view, up_b.view, gate.view, down.view, down_b.view,
                         out_view, up_view, gate_view, static_cast<Activation>(activation)};
  run(params);
  return save ? py::object(list_of(out, saved_up, saved_gate)) : out;
}

py::object ffn_gradient(py::handle grad, py::handle x, py::handle up_weight, py::handle gate_weight,
                        py::handle down_weight, py::handle up, py::handle gate, int activation, const py::tuple& needs) {
  EagerTensor tg(grad), tx(x), up_w(up_weight), gate_w(gate_weight), down_w(down_weight), saved_up(up), saved_gate(gate);
  if (read_eager({&tg, &tx, &up_w, &gate_w, &down_w, &saved_up, &saved_gate}) == Plain::no) return py::none();
  for (const TensorView* saved : {&saved_up.view, &saved_gate.view})
    if (saved->defined && !saved->contiguous()) return py::none();
  TensorView grad_rows = tg.view, rows = tx.view;
  if (!up_w.view.defined || up_w.view.ndim != 2 || !flatten_rows(&grad_rows) || !flatten_rows(&rows)) return py::none();
  const int64_t F = up_w.view.shape[0], C = up_w.view.shape[1];
  const DType dtype = tx.view.dtype;
  FfnBackwardParams params{grad_rows,  rows, up_w.view, gate_w.view, down_w.view, saved_up.view, saved_gate.view,
                           {}, {}, {}, {},   {},        {},          static_cast<Activation>(activation)};
  py::tuple grads = no_gradients(needs);
  if (is_needed(needs, 0)) grads[0] = new_rows(tx.view, C, dtype, &params.grad_x);
  if (is_needed(needs, 1)) grads[1] = new_tensor(tx.view, dtype, {F, C}, &params.grad_up_weight);
  if (is_needed(needs, 2)) grads[2] = new_tensor(tx.view, dtype, {F}, &params.grad_up_bias);
  if (is_needed(needs, 3)) grads[3] = new_tensor(tx.view, dtype, {F, C}, &params.grad_gate_weight);
  if (is_needed(needs, 4)) grads[4] = new_tensor(tx.view, dtype, {C, F}, &params.grad_down_weight);
  if (is_needed(needs, 5)) grads[5] = new_tensor(tx.view, dtype, {C}, &params.grad_down_bias);
  run(params);
  return grads;
}

}  // namespace

void bind_ffn(py::module_& m) {
  m.def("ffn", &ffn_eager);
  m.def("ffn_gradient", &ffn_gradient);
  m.def(
      "ffn_forward",
      [](const TensorView& out, const TensorView& up, const TensorView& gate, const TensorView& x,
         const TensorView& up_weight, const TensorView& up_bias, const TensorView& gate_weight,
         const TensorView& down_weight, const TensorView& down_bias, int activation) {
        run(FfnParams{x, up_weight, up_bias, gate_weight, down_weight, down_bias, out, up, gate,
                      static_cast<Activation>(activation)});
      });
  m.def(
      "ffn_backward",
      [](const TensorView& grad_x, const TensorView& grad_up_weight, const TensorView& grad_up_bias,
         const TensorView& grad_gate_weight, const TensorView& grad_down_weight, const TensorView& grad_down_bias,
         const TensorView& grad, const TensorView& x, const TensorView& up_weight, const TensorView& gate_weight,
         const TensorView& down_weight, const TensorView& up, const TensorView& gate, int activation) {
        run(FfnBackwardParams{grad, x, up_weight, gate_weight, down_weight, up, gate, grad_x, grad_up_weight,
                              grad_up_bias, grad_gate_weight, grad_down_weight, grad_down_bias,
                              static_cast<Activation>(activation)});
      });
}

}  // namespace llmfast
