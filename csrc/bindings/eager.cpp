#include "bindings/eager.h"

namespace py = pybind11;

namespace llmfast {
namespace {

struct Torch {
  PyObject *tensor, *parameter, *requires_grad, *is_cpu, *new_empty, *dtype_keyword;
};

const Torch& torch() {
  static const Torch* found = [] {
    py::module_ module = py::module_::import("torch");
    return new Torch{py::object(module.attr("Tensor")).release().ptr(),
                     py::object(module.attr("nn").attr("Parameter")).release().ptr(),
                     PyUnicode_InternFromString("requires_grad"),
                     PyUnicode_InternFromString("is_cpu"),
                     PyUnicode_InternFromString("new_empty"),
                     PyTuple_Pack(1, PyUnicode_InternFromString("dtype"))};
  }();
  return *found;
}

bool is_true(PyObject* object, PyObject* attribute) {
  PyObject* value = PyObject_GetAttr(object, attribute);
  if (!value) throw py::error_already_set();
  Py_DECREF(value);
  return value == Py_True;
}

}  // namespace

bool read_eager(std::initializer_list<EagerTensor*> tensors, bool grad_enabled) {
  const Torch& names = torch();
  for (EagerTensor* t : tensors) {
    if (t->object == Py_None) continue;
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(t->object));
    if (type != names.tensor && type != names.parameter) return false;
    if (grad_enabled && is_true(t->object, names.requires_grad)) return false;
    if (!is_true(t->object, names.is_cpu)) return false;
    try {
      read_tensor(t->object, &t->view);
    } catch (const py::builtin_exception&) {  // a dtype or rank that no kernel takes
      return false;
    }
    if (t->view.numel() == 0) return false;
  }
  return true;
}

py::object new_empty(PyObject* like, const int64_t* shape, int ndim, PyObject* dtype) {
  const Torch& names = torch();
  py::tuple sizes(ndim);
  for (int i = 0; i < ndim; ++i) sizes[i] = py::int_(shape[i]);
  PyObject* arguments[] = {like, sizes.ptr(), dtype};
  PyObject* out = PyObject_VectorcallMethod(names.new_empty, arguments, 2, dtype ? names.dtype_keyword : nullptr);
  if (!out) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(out);
}

py::object new_rows(const EagerTensor& x, int64_t last, TensorView* view, PyObject* dtype) {
  int64_t shape[kMaxDims];
  for (int i = 0; i + 1 < x.view.ndim; ++i) shape[i] = x.view.shape[i];
  shape[x.view.ndim - 1] = last;
  py::object out = new_empty(x.object, shape, x.view.ndim, dtype);
  read_tensor(out.ptr(), view);
  flatten_rows(view);
  return out;
}

bool flatten_rows(TensorView* t) {
  if (t->ndim < 1) return false;
  const int64_t cols = t->shape[t->ndim - 1], step = t->stride[t->ndim - 1];
  int64_t rows = 1, stride = 0;
  for (int i = t->ndim - 2; i >= 0; --i) {
    if (t->shape[i] == 1) continue;
    if (rows == 1) stride = t->stride[i];
    else if (t->stride[i] != stride * rows) return false;
    rows *= t->shape[i];
  }
  t->ndim = 2;
  t->shape[0] = rows;
  t->shape[1] = cols;
  t->stride[0] = rows == 1 ? cols : stride;
  t->stride[1] = step;
  return true;
}

}  // namespace llmfast
