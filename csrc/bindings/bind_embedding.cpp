#include "bindings/bindings.h"
#include "bindings/eager.h"

namespace py = pybind11;

namespace llmfast {
namespace {

bool is_ids(const TensorView& t) {
  return (t.dtype == DType::i64 || t.dtype == DType::i32) && t.ndim >= 1 && t.ndim < kMaxDims;
}

bool is_table(const TensorView& t) {
  return t.ndim == 2 && is_floating(t.dtype) && (t.stride[1] == 1 || t.shape[1] == 1);
}

// t broadcast to the shape of `like`.
bool expand_like(TensorView* t, const TensorView& like) {
  if (t->ndim > like.ndim) return false;
  TensorView wide = *t;
  wide.ndim = like.ndim;
  for (int i = 0; i < like.ndim; ++i) {
    const int own = i - (like.ndim - t->ndim);
    const int64_t size = own < 0 ? 1 : t->shape[own];
    if (size != 1 && size != like.shape[i]) return false;
    wide.shape[i] = like.shape[i];
    wide.stride[i] = size == 1 ? 0 : t->stride[own];
  }
  *t = wide;
  return true;
}

py::object embedding_eager(py::handle input_ids, py::handle weight, py::handle position_weight, py::handle position_ids,
                           py::handle out_dtype, bool grad_enabled) {
  EagerTensor ids(input_ids), table(weight), positions(position_weight), where(position_ids);
  const Plain plain = read_eager({&ids, &table, &positions, &where}, grad_enabled);
  if (plain == Plain::no || !ids.view.defined || !table.view.defined) return py::none();
  if (!is_ids(ids.view) || !is_table(table.view)) return py::none();
  DType dtype = table.view.dtype;
  if (!out_dtype.is_none() && !(read_dtype(out_dtype.ptr(), &dtype) && is_floating(dtype))) return py::none();
  const int64_t C = table.view.shape[1], T = ids.view.shape[ids.view.ndim - 1];
  if (positions.view.defined) {
    const TensorView& p = positions.view;
    if (!is_table(p) || p.dtype != table.view.dtype || p.shape[1] != C) return py::none();
    if (!where.view.defined && p.shape[0] < T) return py::none();
  }
  if (where.view.defined && (!positions.view.defined || !is_ids(where.view) || !expand_like(&where.view, ids.view)))
    return py::none();
  int64_t shape[kMaxDims];
  for (int i = 0; i < ids.view.ndim; ++i) shape[i] = ids.view.shape[i];
  shape[ids.view.ndim] = C;
  TensorView out_view;
  py::object out = new_tensor(table.view, dtype, shape, ids.view.ndim + 1, &out_view);
  run(EmbeddingParams{ids.view, table.view, positions.view, where.view, out_view});
  return plain == Plain::wants_gradient ? py::object(list_of(out)) : out;
}

// Gradient of a table [rows, C]; without ids, of the rows 0 .. T-1 for each sequence of grad. A GPU wants ids sorted,
// which is torch's work.
py::object embedding_gradient(py::handle grad, py::handle ids, int64_t rows, py::handle torch_dtype) {
  EagerTensor tg(grad), ti(ids);
  DType dtype;
  if (read_eager({&tg, &ti}) == Plain::no || !tg.view.defined || !read_dtype(torch_dtype.ptr(), &dtype))
    return py::none();
  const TensorView& g = tg.view;
  const int last = g.ndim - 1;
  if (last < 1 || rows < 1 || (g.stride[last] != 1 && g.shape[last] != 1)) return py::none();
  if (ti.view.defined && (kOnGpu || !is_ids(ti.view) || ti.view.ndim != last)) return py::none();
  TensorView grad_view;
  py::object grad_weight = new_tensor(g, dtype, {rows, g.shape[last]}, &grad_view);
  run(EmbeddingBackwardParams{g, ti.view, grad_view});
  return grad_weight;
}

}  // namespace

void bind_embedding(py::module_& m) {
  m.attr("wants_sorted_ids") = kOnGpu;
  m.def("embedding", &embedding_eager);
  m.def("embedding_gradient", &embedding_gradient);
  m.def(
      "embedding_forward",
      [](const TensorView& out, const TensorView& ids, const TensorView& weight, const TensorView& position_weight,
         const TensorView& position_ids) { run(EmbeddingParams{ids, weight, position_weight, position_ids, out}); });
  m.def(
      "embedding_backward",
      [](const TensorView& grad_weight, const TensorView& grad, const TensorView& ids, const TensorView& sorted_ids,
         const TensorView& order) { run(EmbeddingBackwardParams{grad, ids, grad_weight, sorted_ids, order}); });
}

}  // namespace llmfast
