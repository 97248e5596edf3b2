#include "bindings/bindings.h"
#include "bindings/eager.h"

namespace py = pybind11;

namespace llmfast {

namespace {

bool is_vector_or_none(const TensorView& t, int64_t C) {
  return !t.defined || (is_floating(t.dtype) && t.ndim == 1 && t.shape[0] == C && takes_vector(t));
}

void read_statistics(const TensorView& statistics, TensorView* mean, TensorView* rstd) {
  const int64_t M = statistics.shape[1];
  float* values = statistics.as<float>();
  if (statistics.shape[0] == 2) {
    *mean = {values, DType::f32, 1, true, statistics.device, {M}, {1}};
    values += M;
  }
  *rstd = {values, DType::f32, 1, true, statistics.device, {M}, {1}};
}

// (normed, summed) or [normed, summed, statistics]; statistics [2, ...] are mean and rstd, [1, ...] rstd alone.
py::object norm_eager(py::handle x, py::handle residual, py::handle weight, py::handle bias, float eps,
                      py::handle out_dtype, bool centred, bool grad_enabled) {
  EagerTensor tx(x), tr(residual), tw(weight), tb(bias);
  const Plain plain = read_eager({&tx, &tr, &tw, &tb}, grad_enabled);
  if (plain == Plain::no || !tx.view.defined || !is_floating(tx.view.dtype)) return py::none();
  const int last = tx.view.ndim - 1;
  if (last < 0 || tx.view.stride[last] != 1) return py::none();
  const int64_t C = tx.view.shape[last];
  if (!is_vector_or_none(tw.view, C) || !is_vector_or_none(tb.view, C)) return py::none();
  TensorView rows = tx.view, residual_rows = tr.view, normed_view, summed_view, statistics_view, mean_view, rstd_view;
  if (tr.view.defined) {
    if (!is_floating(tr.view.dtype) || !same_shape(tr.view, tx.view) || tr.view.stride[last] != 1) return py::none();
    if (!flatten_rows(&residual_rows)) return py::none();
  }
  DType normed_dtype = tx.view.dtype;
  if (!flatten_rows(&rows) || (!out_dtype.is_none() && !read_dtype(out_dtype.ptr(), &normed_dtype))) return py::none();
  const bool save = plain == Plain::wants_gradient;
  const int64_t M = rows.shape[0];
  py::object normed = new_rows(tx.view, C, normed_dtype, &normed_view);
  py::object summed = tr.view.defined ? new_rows(tr.view, C, tr.view.dtype, &summed_view) : py::reinterpret_borrow<py::object>(x);
  py::object statistics = py::none();
  if (save) {
    statistics = new_tensor(tx.view, DType::f32, {centred ? 2 : 1, M}, &statistics_view);
    read_statistics(statistics_view, &mean_view, &rstd_view);
  }
  run(NormParams{rows, residual_rows, tw.view, tb.view, normed_view, summed_view, mean_view, rstd_view, eps, centred});
  if (save) return list_of(normed, summed, statistics);
  return py::make_tuple(normed, summed);
}

// Inputs of the node: x, residual, weight, bias, ... x_dtype and bias_dtype: theirs.
py::object norm_gradient(py::handle grad_normed, py::handle grad_summed, py::handle summed, py::handle weight,
                         py::handle statistics, float eps, py::handle x_dtype, py::handle bias_dtype,
                         const py::tuple& needs) {
  EagerTensor gn(grad_normed), gs(grad_summed), ts(summed), tw(weight), tm(statistics);
  if (read_eager({&gn, &gs, &ts, &tw, &tm}) == Plain::no || !gn.view.defined) return py::none();
  const bool need_x = is_needed(needs, 0), need_residual = is_needed(needs, 1), need_bias = is_needed(needs, 3);
  DType dtype_of_x, dtype_of_bias = DType::f32;
  if (!ts.view.defined || !tm.view.defined || !read_dtype(x_dtype.ptr(), &dtype_of_x)) return py::none();
  if (tm.view.ndim != 2 || !tm.view.contiguous() || !takes_vector(tw.view)) return py::none();
  if (need_bias && !read_dtype(bias_dtype.ptr(), &dtype_of_bias)) return py::none();
  const int last = ts.view.ndim - 1;
  const int64_t C = ts.view.shape[last];
  NormBackwardParams params{gn.view, gs.view, ts.view, tw.view, {}, {}, {}, {}, {}, {}, eps, tm.view.shape[0] == 2};
  read_statistics(tm.view, &params.mean, &params.rstd);
  for (TensorView* t : {&params.grad_normed, &params.grad_summed, &params.summed}) {
    if (!t->defined) continue;
    if (!same_shape(*t, ts.view) || t->stride[last] != 1) return py::none();
  }
  for (TensorView* t : {&params.grad_normed, &params.grad_summed, &params.summed})
    if (t->defined && !flatten_rows(t)) return py::none();
  const bool separate_x = need_x && dtype_of_x != ts.view.dtype;
  py::object total = py::none();
  py::tuple grads = no_gradients(needs);
  if (need_residual || (need_x && !separate_x)) total = new_rows(ts.view, C, ts.view.dtype, &params.grad_total);
  if (separate_x) grads[0] = new_rows(ts.view, C, dtype_of_x, &params.grad_x);
  if (is_needed(needs, 2)) grads[2] = new_tensor(ts.view, tw.view.dtype, {C}, &params.grad_weight);
  if (need_bias) grads[3] = new_tensor(ts.view, dtype_of_bias, {C}, &params.grad_bias);
  run(params);
  if (need_x && !separate_x) grads[0] = total;
  if (need_residual) grads[1] = total;
  return grads;
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("add_norm", &norm_eager);
  m.def("add_norm_gradient", &norm_gradient);
  m.def(
      "norm_forward",
      [](const TensorView& normed, const TensorView& summed, const TensorView& mean, const TensorView& rstd,
         const TensorView& x, const TensorView& residual, const TensorView& weight, const TensorView& bias, float eps,
         bool centred) { run(NormParams{x, residual, weight, bias, normed, summed, mean, rstd, eps, centred}); });
  m.def(
      "norm_backward",
      [](const TensorView& grad_total, const TensorView& grad_x, const TensorView& grad_weight,
         const TensorView& grad_bias, const TensorView& grad_normed, const TensorView& grad_summed,
         const TensorView& summed, const TensorView& weight, const TensorView& mean, const TensorView& rstd,
         float eps, bool centred) {
        run(NormBackwardParams{grad_normed, grad_summed, summed, weight, mean, rstd, grad_total, grad_x, grad_weight,
                               grad_bias, eps, centred});
      });
}

}  // namespace llmfast
