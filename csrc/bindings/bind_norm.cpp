#include "bindings/bindings.h"
#include "bindings/eager.h"
#include "norm/norm.h"

namespace py = pybind11;

namespace llmfast {

namespace {

bool is_vector_or_none(const TensorView& t, int64_t C) {
  return !t.defined || (is_floating(t.dtype) && t.ndim == 1 && t.shape[0] == C);
}

// (normed, summed); with Gradient::saved (normed, summed, mean, rstd).
py::object norm_eager(py::handle x, py::handle residual, py::handle weight, py::handle bias, float eps,
                      py::handle out_dtype, bool centred, Gradient gradient) {
  EagerTensor tx(x), tr(residual), tw(weight), tb(bias);
  const Plain plain = read_eager({&tx, &tr, &tw, &tb}, gradient);
  if (plain == Plain::no || !tx.view.defined || !is_floating(tx.view.dtype)) return py::none();
  const int last = tx.view.ndim - 1;
  if (last < 0 || tx.view.stride[last] != 1) return py::none();
  const int64_t C = tx.view.shape[last];
  if (!is_vector_or_none(tw.view, C) || !is_vector_or_none(tb.view, C)) return py::none();
  TensorView rows = tx.view, residual_rows = tr.view, normed_view, summed_view, mean_view, rstd_view;
  if (tr.view.defined) {
    if (!is_floating(tr.view.dtype) || !same_shape(tr.view, tx.view) || tr.view.stride[last] != 1) return py::none();
    if (!flatten_rows(&residual_rows)) return py::none();
  }
  DType normed_dtype = tx.view.dtype;
  if (!flatten_rows(&rows) || (!out_dtype.is_none() && !read_dtype(out_dtype.ptr(), &normed_dtype))) return py::none();
  if (plain == Plain::wants_gradient) return py::bool_(false);
  py::object normed = new_rows(tx.view, C, normed_dtype, &normed_view);
  py::object summed = tr.view.defined ? new_rows(tr.view, C, tr.view.dtype, &summed_view) : py::reinterpret_borrow<py::object>(x);
  py::object mean = py::none(), rstd = py::none();
  if (gradient == Gradient::saved) {
    rstd = new_tensor(DType::f32, tx.view.shape, last, &rstd_view);
    rstd_view = {rstd_view.data, DType::f32, 1, true, 0, {rows.shape[0]}, {1}};
    if (centred) {
      mean = new_tensor(DType::f32, tx.view.shape, last, &mean_view);
      mean_view = {mean_view.data, DType::f32, 1, true, 0, {rows.shape[0]}, {1}};
    }
  }
  const NormParams params{rows, residual_rows, tw.view, tb.view, normed_view, summed_view, mean_view, rstd_view, eps, centred};
  {
    py::gil_scoped_release release;
    norm_forward(params);
  }
  if (gradient == Gradient::saved) return py::make_tuple(normed, summed, mean, rstd);
  return py::make_tuple(normed, summed);
}

// Gradients of x, residual, weight and bias, as far as they are needed. x_dtype and bias_dtype: theirs.
py::object norm_gradient(py::handle grad_normed, py::handle grad_summed, py::handle summed, py::handle weight,
                         py::handle mean, py::handle rstd, float eps, bool need_x, bool need_residual, bool need_weight,
                         bool need_bias, py::handle x_dtype, py::handle bias_dtype) {
  EagerTensor gn(grad_normed), gs(grad_summed), ts(summed), tw(weight), tm(mean), tr(rstd);
  if (read_eager({&gn, &gs, &ts, &tw, &tm, &tr}, Gradient::off) == Plain::no || !gn.view.defined) return py::none();
  DType dtype_of_x, dtype_of_bias = DType::f32;
  if (!ts.view.defined || !tr.view.defined || !read_dtype(x_dtype.ptr(), &dtype_of_x)) return py::none();
  if (need_bias && !read_dtype(bias_dtype.ptr(), &dtype_of_bias)) return py::none();
  const int last = ts.view.ndim - 1;
  const int64_t C = ts.view.shape[last];
  NormBackwardParams params{gn.view, gs.view, ts.view, tw.view, tm.view, tr.view, {}, {}, {}, {}, eps, tm.view.defined};
  for (TensorView* t : {&params.grad_normed, &params.grad_summed, &params.summed}) {
    if (!t->defined) continue;
    if (!same_shape(*t, ts.view) || t->stride[last] != 1) return py::none();
  }
  for (TensorView* t : {&params.grad_normed, &params.grad_summed, &params.summed})
    if (t->defined && !flatten_rows(t)) return py::none();
  for (TensorView* t : {&params.mean, &params.rstd}) {
    if (!t->defined) continue;
    if (!t->contiguous()) return py::none();
    *t = {t->data, t->dtype, 1, true, 0, {params.summed.shape[0]}, {1}};
  }
  const bool separate_x = need_x && dtype_of_x != ts.view.dtype;
  py::object total = py::none(), grad_x = py::none(), grad_weight = py::none(), grad_bias = py::none();
  if (need_residual || (need_x && !separate_x)) total = new_rows(ts.view, C, ts.view.dtype, &params.grad_total);
  if (separate_x) grad_x = new_rows(ts.view, C, dtype_of_x, &params.grad_x);
  if (need_weight) grad_weight = new_tensor(tw.view.dtype, {C}, &params.grad_weight);
  if (need_bias) grad_bias = new_tensor(dtype_of_bias, {C}, &params.grad_bias);
  {
    py::gil_scoped_release release;
    norm_backward(params);
  }
  if (need_x && !separate_x) grad_x = total;
  if (!need_residual) total = py::none();
  return py::make_tuple(grad_x, total, grad_weight, grad_bias);
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("add_norm", &norm_eager);
  m.def("add_norm_gradient", &norm_gradient);
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
