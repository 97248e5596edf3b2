#include <cmath>
#include <optional>

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/eager.h"

namespace py = pybind11;

namespace llmfast {
namespace {

using Distance = std::optional<int64_t>;  // None: unbounded

AttentionArguments arguments(const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k,
                             const TensorView& v, const TensorView& mask, const TensorView& cu_seqlens_q,
                             const TensorView& cu_seqlens_k, Distance left, Distance right, float scale,
                             float softcap) {
  return {q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k, left.value_or(kUnbounded), right.value_or(kUnbounded),
          scale, softcap};
}

struct Options {
  Distance left, right;
  float scale, softcap;
};

bool read_number(py::handle value, double* number) {
  if (!PyFloat_CheckExact(value.ptr()) && !PyLong_CheckExact(value.ptr())) return false;
  *number = PyFloat_AsDouble(value.ptr());
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

constexpr int64_t kFar = int64_t{1} << 62;  // no sequence is that long: as no limit

bool read_distance(PyObject* value, Distance* distance) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow;
  const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (overflow || number < -1) return false;
  if (number >= 0 && number < kFar) *distance = number;
  return true;
}

bool read_scores(py::handle scale, py::handle softcap, int64_t D, Options* options) {
  double number = 1 / std::sqrt(static_cast<double>(D)), cap = 0;
  if (!scale.is_none() && !read_number(scale, &number)) return false;
  if (!softcap.is_none() && !(read_number(softcap, &cap) && cap >= 1e-30 && cap <= 1e30)) return false;
  options->scale = static_cast<float>(number);
  options->softcap = static_cast<float>(cap);
  return true;
}

// False: something unusual or wrong; see _band in ops/attention.py.
bool read_options(py::handle causal, py::handle window, py::handle scale, py::handle softcap, int64_t D, Options* options) {
  if (!PyBool_Check(causal.ptr()) || !read_scores(scale, softcap, D, options)) return false;
  if (PyTuple_CheckExact(window.ptr())) {
    if (PyTuple_GET_SIZE(window.ptr()) != 2) return false;
    if (!read_distance(PyTuple_GET_ITEM(window.ptr(), 0), &options->left)) return false;
    if (!read_distance(PyTuple_GET_ITEM(window.ptr(), 1), &options->right)) return false;
  } else if (!window.is_none()) {
    Distance width;
    if (!read_distance(window.ptr(), &width) || !width || *width < 1) return false;
    options->left = *width - 1;
    options->right = 0;
  }
  if (causal.ptr() == Py_True) options->right = 0;
  return true;
}

// Shapes [B,H,T,D] or, packed, [T,H,D], of one dtype, rows contiguous.
bool heads_fit(const TensorView& q, const TensorView& k, const TensorView& v, int rank) {
  for (const TensorView* t : {&q, &k, &v}) {
    if (!t->defined || t->ndim != rank || t->dtype != q.dtype) return false;
    if (t->stride[rank - 1] != 1 && t->shape[rank - 1] != 1) return false;
  }
  if (!is_floating(q.dtype) || q.shape[rank - 1] != k.shape[rank - 1] || q.shape[1] % k.shape[1]) return false;
  if ((rank == 4 && q.shape[0] != k.shape[0]) || !takes_head_dims(q.shape[rank - 1], v.shape[rank - 1])) return false;
  for (int i = 0; i + 1 < rank; ++i)
    if (k.shape[i] != v.shape[i]) return false;
  return true;
}

// Broadcasts a mask of up to four dimensions to [B,Hq,Tq,Tk].
bool expand_mask(TensorView* mask, const TensorView& q, const TensorView& k) {
  if (!mask->defined) return true;
  if (mask->ndim > 4 || (mask->dtype != DType::boolean && !is_floating(mask->dtype))) return false;
  const int64_t full[4] = {q.shape[0], q.shape[1], q.shape[2], k.shape[2]};
  TensorView wide = *mask;
  wide.ndim = 4;
  for (int i = 0; i < 4; ++i) {
    const int own = i - (4 - mask->ndim);
    const int64_t size = own < 0 ? 1 : mask->shape[own];
    if (size != 1 && size != full[i]) return false;
    wide.shape[i] = full[i];
    wide.stride[i] = size == 1 ? 0 : mask->stride[own];
  }
  *mask = wide;
  return true;
}

// Of x's shape with last dimension D, dense, dimensions nested as x nests them.
py::object new_heads(const TensorView& x, int64_t D, TensorView* view) {
  constexpr int kTokensFirst[4] = {2, 0, 1, 3}, kTokensBeforeHeads[4] = {0, 2, 1, 3};
  int64_t shape[4];
  for (int i = 0; i < x.ndim; ++i) shape[i] = x.shape[i];
  shape[x.ndim - 1] = D;
  const int* nesting = nullptr;
  if (x.ndim == 4 && x.stride[1] < x.stride[2])
    nesting = x.stride[1] <= x.stride[0] && x.stride[0] < x.stride[2] ? kTokensFirst : kTokensBeforeHeads;
  return new_tensor(x, x.dtype, shape, x.ndim, view, nesting);
}

struct Inputs {
  EagerTensor q, k, v, mask, cu_seqlens_q, cu_seqlens_k;

  Plain read(bool grad_enabled) { return read_eager({&q, &k, &v, &mask, &cu_seqlens_q, &cu_seqlens_k}, grad_enabled); }
};

py::object to_python(const Distance& distance) { return distance ? py::object(py::int_(*distance)) : py::none(); }

// The output or [output, lse, (left, right, scale, softcap)].
py::object run_forward(const Inputs& in, const TensorView& mask, const Options& options, Plain plain) {
  const bool save = plain == Plain::wants_gradient;
  const TensorView& q = in.q.view;
  const bool packed = q.ndim == 3;
  TensorView out_view, lse_view;
  py::object lse = py::none(), out = new_heads(q, in.v.view.shape[q.ndim - 1], &out_view);
  const int64_t packed_shape[2] = {q.shape[1], q.shape[0]};
  if (save) lse = new_tensor(q, DType::f32, packed ? packed_shape : q.shape, q.ndim - 1, &lse_view);
  else if (packed) lse_view = scratch_floats(q, {q.shape[1], q.shape[0]}, &lse);
  else lse_view = scratch_floats(q, {q.shape[0], q.shape[1], q.shape[2]}, &lse);
  run(arguments(out_view, lse_view, q, in.k.view, in.v.view, mask, in.cu_seqlens_q.view, in.cu_seqlens_k.view,
                options.left, options.right, options.scale, options.softcap));
  if (!save) return out;
  return list_of(out, lse, py::make_tuple(to_python(options.left), to_python(options.right), options.scale, options.softcap));
}

bool is_offsets(const TensorView& t) { return t.defined && t.ndim == 1 && (t.dtype == DType::i32 || t.dtype == DType::i64); }

py::object attention_eager(py::handle q, py::handle k, py::handle v, py::handle mask, py::handle causal,
                           py::handle window, py::handle scale, py::handle softcap, bool grad_enabled) {
  Inputs in{EagerTensor(q), EagerTensor(k), EagerTensor(v), EagerTensor(mask), {}, {}};
  const Plain plain = in.read(grad_enabled);
  Options options;
  TensorView full = in.mask.view;
  if (plain == Plain::no || !heads_fit(in.q.view, in.k.view, in.v.view, 4) || in.mask.requires_grad) return py::none();
  if (!read_options(causal, window, scale, softcap, in.q.view.shape[3], &options)) return py::none();
  if (!expand_mask(&full, in.q.view, in.k.view)) return py::none();
  return run_forward(in, full, options, plain);
}

py::object varlen_attention_eager(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens_q,
                                  py::handle cu_seqlens_k, py::handle causal, py::handle window, py::handle scale,
                                  py::handle softcap, bool grad_enabled) {
  Inputs in{EagerTensor(q), EagerTensor(k), EagerTensor(v), {}, EagerTensor(cu_seqlens_q), EagerTensor(cu_seqlens_k)};
  const Plain plain = in.read(grad_enabled);
  Options options;
  const TensorView &bounds_q = in.cu_seqlens_q.view, &bounds_k = in.cu_seqlens_k.view;
  if (plain == Plain::no || !heads_fit(in.q.view, in.k.view, in.v.view, 3)) return py::none();
  if (!is_offsets(bounds_q) || !is_offsets(bounds_k) || bounds_q.shape[0] != bounds_k.shape[0]) return py::none();
  if (!takes_offsets(bounds_q, bounds_k)) return py::none();
  if (!read_options(causal, window, scale, softcap, in.q.view.shape[2], &options)) return py::none();
  return run_forward(in, {}, options, plain);
}

// torch's conventions: causal from the top left, heads equal unless enable_gqa, masks of few dtypes.
py::object sdpa_eager(py::handle q, py::handle k, py::handle v, py::handle mask, py::handle dropout_p, py::handle is_causal,
                      py::handle scale, py::handle enable_gqa, bool grad_enabled) {
  double dropout;
  if (!read_number(dropout_p, &dropout) || dropout != 0) return py::none();
  if (!PyBool_Check(is_causal.ptr()) || !PyBool_Check(enable_gqa.ptr())) return py::none();
  if (is_causal.ptr() == Py_True && !mask.is_none()) return py::none();
  Inputs in{EagerTensor(q), EagerTensor(k), EagerTensor(v), EagerTensor(mask), {}, {}};
  const Plain plain = in.read(grad_enabled);
  if (plain == Plain::no || !heads_fit(in.q.view, in.k.view, in.v.view, 4) || in.mask.requires_grad) return py::none();
  if (enable_gqa.ptr() == Py_False && in.q.view.shape[1] != in.k.view.shape[1]) return py::none();
  Options options;
  if (!read_scores(scale, py::none(), in.q.view.shape[3], &options)) return py::none();
  TensorView full = in.mask.view;
  if (full.defined && (full.ndim < 2 || (full.dtype != DType::boolean && full.dtype != DType::f32 && full.dtype != in.q.view.dtype)))
    return py::none();
  if (!expand_mask(&full, in.q.view, in.k.view)) return py::none();
  if (is_causal.ptr() == Py_True) options.right = in.q.view.shape[2] - in.k.view.shape[2];
  return run_forward(in, full, options, plain);
}

// Inputs of the node: q, k, v, ...; packed where there are offsets.
py::object attention_gradient(py::handle grad, py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                              py::handle mask, py::handle cu_seqlens_q, py::handle cu_seqlens_k, Distance left,
                              Distance right, float scale, float softcap, const py::tuple& needs) {
  Inputs in{EagerTensor(q),    EagerTensor(k),           EagerTensor(v),
            EagerTensor(mask), EagerTensor(cu_seqlens_q), EagerTensor(cu_seqlens_k)};
  EagerTensor tg(grad), to(out), tl(lse);
  if (in.read(false) == Plain::no || read_eager({&tg, &to, &tl}) == Plain::no) return py::none();
  const TensorView &vq = in.q.view, &vk = in.k.view, &vv = in.v.view, &vg = tg.view;
  TensorView full = in.mask.view;
  if (!vg.defined || !heads_fit(vq, vk, vv, vq.ndim) || !same_shape(vg, to.view) || !expand_mask(&full, vq, vk))
    return py::none();
  for (const TensorView* t : {&tg.view, &to.view})
    if (t->stride[t->ndim - 1] != 1 && t->shape[t->ndim - 1] != 1) return py::none();
  AttentionGradients gradients{vg, {}, {}, {}};
  const int last = vq.ndim - 1;
  py::tuple grads = no_gradients(needs);
  grads[0] = new_heads(vq, vq.shape[last], &gradients.grad_q);
  grads[1] = new_heads(vk, vk.shape[last], &gradients.grad_k);
  grads[2] = new_heads(vv, vv.shape[last], &gradients.grad_v);
  run(arguments(to.view, tl.view, vq, vk, vv, full, in.cu_seqlens_q.view, in.cu_seqlens_k.view, left, right, scale,
                softcap),
      gradients);
  return grads;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &attention_eager);
  m.def("varlen_attention", &varlen_attention_eager);
  m.def("scaled_dot_product_attention", &sdpa_eager);
  m.def("attention_gradient", &attention_gradient);
  m.def(
      "attention_forward",
      [](const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k, const TensorView& v,
         const TensorView& mask, const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k, Distance left,
         Distance right, float scale, float softcap) {
        prepare(out);
        run(arguments(out, lse, q, k, v, mask, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap));
      });
  m.def(
      "attention_backward",
      [](const TensorView& grad_q, const TensorView& grad_k, const TensorView& grad_v, const TensorView& grad_out,
         const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k, const TensorView& v,
         const TensorView& mask, const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k, Distance left,
         Distance right, float scale, float softcap) {
        for (const TensorView* grad : {&grad_q, &grad_k, &grad_v}) prepare(*grad);
        run(arguments(out, lse, q, k, v, mask, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap),
            {grad_out, grad_q, grad_k, grad_v});
      });
}

}  // namespace llmfast
