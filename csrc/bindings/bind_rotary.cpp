#include <utility>

#include "bindings/bindings.h"
#include "bindings/eager.h"

namespace py = pybind11;

namespace llmfast {
namespace {

// Which dimension is the outermost in memory, and so on; false: x has gaps or repeats elements, or its heads do not lie
// in one piece.
bool dense_nesting(const TensorView& x, int* nesting) {
  for (int i = 0; i < x.ndim; ++i) nesting[i] = i;
  const auto outer = [&](int a, int b) {
    return x.stride[a] != x.stride[b] ? x.stride[a] > x.stride[b] : x.shape[a] != 1 && x.shape[b] == 1;
  };
  for (int i = 1; i < x.ndim; ++i)
    for (int j = i; j > 0 && outer(nesting[j], nesting[j - 1]); --j) std::swap(nesting[j], nesting[j - 1]);
  int64_t expected = 1;
  for (int i = x.ndim - 1; i >= 0; --i) {
    if (x.shape[nesting[i]] != 1 && x.stride[nesting[i]] != expected) return false;
    expected *= x.shape[nesting[i]];
  }
  return x.stride[x.ndim - 1] == 1;
}

// cos and sin as [.., T, R/2]: see ops/rotary.py, which says what is wrong where this is false.
bool read_tables(const TensorView& x, TensorView* cos, TensorView* sin, py::handle rotary_dim) {
  if (!cos->defined || !sin->defined || !is_floating(cos->dtype) || sin->dtype != cos->dtype) return false;
  if (cos->ndim < 2 || cos->ndim > 3 || !same_shape(*cos, *sin)) return false;
  const int last = cos->ndim - 1;
  const int64_t D = x.shape[3], width = cos->shape[last];
  if (cos->shape[last - 1] != x.shape[2] || (last == 2 && cos->shape[0] != 1 && cos->shape[0] != x.shape[0])) return false;
  int64_t R = 2 * width > D ? width : 2 * width;
  if (!rotary_dim.is_none()) {
    if (!PyLong_CheckExact(rotary_dim.ptr())) return false;
    int overflow;
    R = PyLong_AsLongLongAndOverflow(rotary_dim.ptr(), &overflow);
    if (overflow) return false;
  }
  if (R % 2 || R < 2 || R > D || (width != R && width != R / 2)) return false;
  for (TensorView* table : {cos, sin}) {
    if (table->stride[last] != 1) return false;
    table->shape[last] = R / 2;
  }
  return true;
}

// (q, k) or [q, k], rotated; None for one that is None.
py::object rotary_eager(py::handle q, py::handle k, py::handle cos, py::handle sin, py::handle rotary_dim, bool inverse,
                        bool grad_enabled) {
  EagerTensor tq(q), tk(k), tc(cos), ts(sin);
  const Plain plain = read_eager({&tq, &tk, &tc, &ts}, grad_enabled);
  if (plain == Plain::no) return py::none();
  const TensorView &vq = tq.view, &vk = tk.view, &some = vq.defined ? vq : vk;
  int nesting[2][kMaxDims];
  const TensorView* views[2] = {&vq, &vk};
  for (int i = 0; i < 2; ++i) {
    if (!views[i]->defined) continue;
    if (views[i]->ndim != 4 || !is_floating(views[i]->dtype) || !dense_nesting(*views[i], nesting[i])) return py::none();
  }
  if (!some.defined) return py::none();
  if (vq.defined && vk.defined)
    for (int i : {0, 2, 3})
      if (vq.dtype != vk.dtype || vq.shape[i] != vk.shape[i]) return py::none();
  if (!read_tables(some, &tc.view, &ts.view, rotary_dim)) return py::none();
  py::object rotated[2] = {py::none(), py::none()};
  RotaryParams params[2];
  int count = 0;
  for (int i = 0; i < 2; ++i) {
    if (!views[i]->defined) continue;
    params[count] = {{}, *views[i], tc.view, ts.view, inverse};
    rotated[i] = new_tensor(some, some.dtype, views[i]->shape, 4, &params[count++].out, nesting[i]);
  }
  run(params, count);
  if (plain == Plain::wants_gradient) return list_of(rotated[0], rotated[1]);
  return py::make_tuple(rotated[0], rotated[1]);
}

}  // namespace

void bind_rotary(py::module_& m) {
  m.def("rotary_pair", &rotary_eager);
  m.def(
      "rotary",
      [](const TensorView& out, const TensorView& x, const TensorView& cos, const TensorView& sin, bool inverse) {
        const RotaryParams params{out, x, cos, sin, inverse};
        run(&params, 1);
      });
}

}  // namespace llmfast
