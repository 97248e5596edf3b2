#include "bindings/bindings.h"
#include "bindings/eager.h"
#include "ffn/ffn.h"

namespace py = pybind11;

namespace llmfast {

namespace {

py::object ffn_eager(py::handle x, py::handle up_weight, py::handle up_bias, py::handle gate_weight,
                     py::handle down_weight, py::handle down_bias, int activation, bool grad_enabled) {
  EagerTensor tx{x.ptr(), {}}, up{up_weight.ptr(), {}}, up_b{up_bias.ptr(), {}}, gate{gate_weight.ptr(), {}},
      down{down_weight.ptr(), {}}, down_b{down_bias.ptr(), {}};
  if (!read_eager({&tx, &up, &up_b, &gate, &down, &down_b}, grad_enabled)) return py::none();
  if (!tx.view.defined || !up.view.defined || !down.view.defined || tx.view.ndim < 1 || up.view.ndim != 2) return py::none();
  const DType dtype = tx.view.dtype;
  const int64_t C = tx.view.shape[tx.view.ndim - 1], F = up.view.shape[0];
  const auto fits = [dtype](const TensorView& t, int64_t rows, int64_t cols) {
    return !t.defined || (t.dtype == dtype && t.ndim == (cols ? 2 : 1) && t.shape[0] == rows && (!cols || t.shape[1] == cols));
  };
  if (!is_floating(dtype) || !fits(up.view, F, C) || !fits(gate.view, F, C) || !fits(down.view, C, F) ||
      !fits(up_b.view, F, 0) || !fits(down_b.view, C, 0))
    return py::none();
  TensorView rows = tx.view, out_view;
  if (!flatten_rows(&rows)) return py::none();
  py::object out = new_rows(tx, C, &out_view);
  const FfnParams params{rows,     up.view, up_b.view, gate.view, down.view, down_b.view,
                         out_view, {},      {},        static_cast<Activation>(activation)};
  py::gil_scoped_release release;
  ffn_forward(params);
  return out;
}

}  // namespace

void bind_ffn(py::module_& m) {
  m.def("ffn", &ffn_eager);
  m.def(
      "ffn_forward",
      [](const TensorView& out, const TensorView& up, const TensorView& gate, const TensorView& x,
         const TensorView& up_weight, const TensorView& up_bias, const TensorView& gate_weight,
         const TensorView& down_weight, const TensorView& down_bias, int activation) {
        ffn_forward({x, up_weight, up_bias, gate_weight, down_weight, down_bias, out, up, gate,
                     static_cast<Activation>(activation)});
      },
      WithoutGil());
  m.def(
      "ffn_backward",
      [](const TensorView& grad_x, const TensorView& grad_up_weight, const TensorView& grad_up_bias,
         const TensorView& grad_gate_weight, const TensorView& grad_down_weight, const TensorView& grad_down_bias,
         const TensorView& grad, const TensorView& x, const TensorView& up_weight, const TensorView& gate_weight,
         const TensorView& down_weight, const TensorView& up, const TensorView& gate, int activation) {
        ffn_backward({grad, x, up_weight, gate_weight, down_weight, up, gate, grad_x, grad_up_weight, grad_up_bias,
                      grad_gate_weight, grad_down_weight, grad_down_bias, static_cast<Activation>(activation)});
      },
      WithoutGil());
}

}  // namespace llmfast
