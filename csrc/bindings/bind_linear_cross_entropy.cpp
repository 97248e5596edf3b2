#include "bindings/bindings.h"
#include "bindings/eager.h"

namespace py = pybind11;

namespace llmfast {
namespace {

// The targets as [M], if x [..., C], weight [V, C] and target [...] fit each other.
bool read_targets(const TensorView& x, const TensorView& weight, const TensorView& target, TensorView* targets) {
  if (!x.defined || !weight.defined || !target.defined || x.ndim != target.ndim + 1 || weight.ndim != 2) return false;
  if (!is_floating(x.dtype) || weight.dtype != x.dtype || weight.shape[1] != x.shape[x.ndim - 1]) return false;
  if (target.dtype != DType::i64 || !target.contiguous()) return false;
  for (int i = 0; i < target.ndim; ++i)
    if (target.shape[i] != x.shape[i]) return false;
  *targets = {target.data, DType::i64, 1, true, target.device, {target.numel()}, {1}};
  return true;
}

// data as a vector of M floats on the device of `like`.
TensorView floats_at(const TensorView& like, void* data, int64_t M) {
  return {data, DType::f32, 1, true, like.device, {M}, {1}};
}

enum class Reduction { none, sum, mean };

bool read_reduction(py::handle name, Reduction* reduction) {
  if (!PyUnicode_Check(name.ptr())) return false;
  const auto is = [&](const char* word) { return PyUnicode_CompareWithASCIIString(name.ptr(), word) == 0; };
  *reduction = is("mean") ? Reduction::mean : is("sum") ? Reduction::sum : Reduction::none;
  return *reduction != Reduction::none || is("none");
}

// The loss or [loss, lse].
py::object cross_entropy_eager(py::handle x, py::handle weight, py::handle target, int64_t ignore_index,
                               py::handle reduction_name, bool grad_enabled) {
  EagerTensor tx(x), tw(weight), tt(target);
  const Plain plain = read_eager({&tx, &tw, &tt}, grad_enabled);
  TensorView targets, rows = tx.view;
  Reduction reduction;
  if (plain == Plain::no || !read_targets(tx.view, tw.view, tt.view, &targets)) return py::none();
  if (!flatten_rows(&rows) || !read_reduction(reduction_name, &reduction)) return py::none();
  const int64_t M = rows.shape[0];
  const bool save = plain == Plain::wants_gradient, separate = reduction == Reduction::none;
  TensorView loss_view, lse_view, losses;
  py::object lse = py::none(), owner;
  py::object loss = new_tensor(rows, DType::f32, tt.view.shape, separate ? tt.view.ndim : 0, &loss_view);
  if (save) lse = new_tensor(rows, DType::f32, {M}, &lse_view);
  if (separate) losses = floats_at(rows, loss_view.data, M);
  if (!save || !separate) {  // after everything that may run Python code, and so another op
    const TensorView scratch = scratch_floats(rows, {2, M}, &owner);
    if (!separate) losses = floats_at(rows, scratch.data, M);
    if (!save) lse_view = floats_at(rows, scratch.as<float>() + M, M);
  }
  run(LinearCrossEntropyParams{rows, tw.view, targets, losses, lse_view, ignore_index});
  if (!separate) run(LossReductionParams{losses, targets, loss_view, ignore_index, reduction == Reduction::mean});
  return save ? py::object(list_of(loss, lse)) : loss;
}

py::object cross_entropy_gradient(py::handle grad, py::handle x, py::handle weight, py::handle target, py::handle lse,
                                  int64_t ignore_index, py::handle reduction_name, const py::tuple& needs) {
  EagerTensor tg(grad), tx(x), tw(weight), tt(target), tl(lse);
  TensorView targets;
  Reduction reduction;
  if (read_eager({&tg, &tx, &tw, &tt, &tl}) == Plain::no || !tg.view.defined || !tl.view.contiguous()) return py::none();
  if (!read_targets(tx.view, tw.view, tt.view, &targets) || !read_reduction(reduction_name, &reduction)) return py::none();
  TensorView rows = tx.view;
  if (!flatten_rows(&rows) || tg.view.dtype != DType::f32 || !tg.view.contiguous()) return py::none();
  const int64_t M = rows.shape[0];
  if (tg.view.numel() != (reduction == Reduction::none ? M : 1)) return py::none();
  LinearCrossEntropyBackwardParams params{{}, rows, tw.view, targets, tl.view, {}, {}, ignore_index};
  py::tuple grads = no_gradients(needs);
  if (is_needed(needs, 0)) grads[0] = new_rows(tx.view, rows.shape[1], rows.dtype, &params.grad_x);
  if (is_needed(needs, 1)) grads[1] = new_tensor(rows, rows.dtype, {tw.view.shape[0], tw.view.shape[1]}, &params.grad_weight);
  py::object owner;
  if (reduction == Reduction::none) {
    params.grad = floats_at(rows, tg.view.data, M);
  } else {
    params.grad = scratch_floats(rows, {M}, &owner);
    run(LossGradientParams{tg.view, targets, params.grad, ignore_index, reduction == Reduction::mean});
  }
  run(params);
  return grads;
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy", &cross_entropy_eager);
  m.def("linear_cross_entropy_gradient", &cross_entropy_gradient);
  m.def(
      "linear_cross_entropy_forward",
      [](const TensorView& losses, const TensorView& lse, const TensorView& x, const TensorView& weight,
         const TensorView& target, int64_t ignore_index) {
        run(LinearCrossEntropyParams{x, weight, target, losses, lse, ignore_index});
      });
  m.def(
      "linear_cross_entropy_backward",
      [](const TensorView& grad_x, const TensorView& grad_weight, const TensorView& grad, const TensorView& x,
         const TensorView& weight, const TensorView& target, const TensorView& lse, int64_t ignore_index) {
        run(LinearCrossEntropyBackwardParams{grad, x, weight, target, lse, grad_x, grad_weight, ignore_index});
      });
}

}  // namespace llmfast
