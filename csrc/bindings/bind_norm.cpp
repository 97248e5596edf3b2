#include "bindings/bindings.h"
#include "bindings/eager.h"
#include "norm/norm.h"

namespace py = pybind11;

namespace llmfast {

namespace {

bool fits(const TensorView& t, int64_t C) {
  return !t.defined || (is_floating(t.dtype) && t.ndim == 1 && t.shape[0] == C);
}

py::object norm_eager(py::handle x, py::handle residual, py::handle weight, py::handle bias, float eps,
                      py::handle out_dtype, bool centred, bool grad_enabled) {
  EagerTensor tx{x.ptr(), {}}, tr{residual.ptr(), {}}, tw{weight.ptr(), {}}, tb{bias.ptr(), {}};
  if (!read_eager({&tx, &tr, &tw, &tb}, grad_enabled) || !tx.view.defined || !is_floating(tx.view.dtype)) return py::none();
  const int last = tx.view.ndim - 1;
  if (last < 0 || tx.view.stride[last] != 1) return py::none();
  const int64_t C = tx.view.shape[last];
  if (!fits(tw.view, C) || !fits(tb.view, C)) return py::none();
  TensorView rows = tx.view, residual_rows = tr.view, normed_view, summed_view;
  if (tr.view.defined) {
    if (!is_floating(tr.view.dtype) || tr.view.ndim != tx.view.ndim || tr.view.stride[last] != 1) return py::none();
    for (int i = 0; i <= last; ++i)
      if (tr.view.shape[i] != tx.view.shape[i]) return py::none();
    if (!flatten_rows(&residual_rows)) return py::none();
  }
  if (!flatten_rows(&rows)) return py::none();
  py::object normed = new_rows(tx, C, &normed_view, out_dtype.is_none() ? nullptr : out_dtype.ptr());
  py::object summed = tr.view.defined ? new_rows(tr, C, &summed_view) : py::reinterpret_borrow<py::object>(x);
  const NormParams params{rows, residual_rows, tw.view, tb.view, normed_view, summed_view, {}, {}, eps, centred};
  {
    py::gil_scoped_release release;
    norm_forward(params);
  }
  return py::make_tuple(normed, summed);
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("add_norm", &norm_eager);
  m.def(
      "norm_forward",
      [](const TensorView& normed, const TensorView& summed, const TensorView& mean, const TensorView& rstd,
         const TensorView& x, const TensorView& residual, const TensorView& weight, const TensorView& bias, float eps,
         bool centred) { norm_forward({x, residual, weight, bias, normed, summed, mean, rstd, eps, centred}); },
      WithoutGil());
  m.def(
      "norm_backward",
      [](const TensorView& grad_total, const TensorView& grad_x, const TensorView& grad_weight,
         const TensorView& grad_bias, const TensorView& grad_normed, const TensorView& grad_summed,
         const TensorView& summed, const TensorView& weight, const TensorView& mean, const TensorView& rstd,
         float eps, bool centred) {
        norm_backward({grad_normed, grad_summed, summed, weight, mean, rstd, grad_total, grad_x, grad_weight, grad_bias,
                       eps, centred});
      },
      WithoutGil());
}

}  // namespace llmfast
