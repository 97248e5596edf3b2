#include "bindings/eager.h"

namespace py = pybind11;

namespace llmfast {
namespace {

constexpr DType kTensorTypes[] = {DType::f32, DType::bf16, DType::f16, DType::i32, DType::i64, DType::boolean};

struct Torch {
  PyObject *tensor, *parameter, *requires_grad;
  PyObject* dtypes[std::size(kTensorTypes)];
};

const Torch& torch() {
  static const Torch* found = [] {
    py::module_ module = py::module_::import("torch");
    auto* names = new Torch{py::object(module.attr("Tensor")).release().ptr(),
                            py::object(module.attr("nn").attr("Parameter")).release().ptr(),
                            PyUnicode_InternFromString("requires_grad"),
                            {}};
    for (DType dtype : kTensorTypes)
      names->dtypes[static_cast<int>(dtype)] = py::object(module.attr(name_of(dtype))).release().ptr();
    return names;
  }();
  return *found;
}

bool is_true(PyObject* object, PyObject* attribute) {
  PyObject* value = PyObject_GetAttr(object, attribute);
  if (!value) throw py::error_already_set();
  Py_DECREF(value);
  return value == Py_True;
}

// torch's own short way to a tensor, made for compiled code, which skips its argument parser and dispatcher: 0.3 us against
// 2.2 of torch.empty_strided. It takes the current device's allocator. An output must be a tensor that torch allocated:
// the storage of one that came through DLPack cannot be resized, and record_stream() silently does nothing for it.
struct Allocator {
  PyObject *quick = nullptr, *general, *device_type, *current_device = nullptr;
};

const Allocator& allocator() {
  static const Allocator* found = [] {
    py::module_ module = py::module_::import("torch");
    auto* names = new Allocator;
    names->general = py::object(module.attr("empty_strided")).release().ptr();
    names->device_type = py::object(module.attr("device")).release().ptr();
    py::object core = module.attr("_C"), none = py::none();
    py::object guards = py::getattr(py::getattr(core, "_dynamo", none), "guards", none);
    py::object quick = py::getattr(guards, kTensorsOnCuda ? "_empty_strided_cuda" : "_empty_strided_cpu", none);
    if (!quick.is_none()) names->quick = quick.release().ptr();
    if (kTensorsOnCuda) names->current_device = py::object(core.attr("_cuda_getDevice")).release().ptr();
    return names;
  }();
  return *found;
}

bool is_current(int device) {
  PyObject* ask = allocator().current_device;
  return !ask || py::handle(ask)().cast<int>() == device;
}

py::object allocate(const py::tuple& sizes, const py::tuple& strides, DType dtype, int device) {
  const Allocator& with = allocator();
  const py::handle torch_dtype = torch().dtypes[static_cast<int>(dtype)];
  if (with.quick && is_current(device)) {
    PyObject* out = PyObject_CallFunctionObjArgs(with.quick, sizes.ptr(), strides.ptr(), torch_dtype.ptr(), nullptr);
    if (!out) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(out);
  }
  const py::handle device_type(with.device_type);
  return py::handle(with.general)(sizes, strides, py::arg("dtype") = torch_dtype,
                                  py::arg("device") = kTensorsOnCuda ? device_type("cuda", device) : device_type("cpu"));
}

}  // namespace

Plain read_eager(std::initializer_list<EagerTensor*> tensors, bool grad_enabled) {
  const Torch& names = torch();
  bool wants_gradient = false;
  int device = -1;
  for (EagerTensor* t : tensors) {
    if (!t->object || t->object == Py_None) continue;
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(t->object));
    if (type != names.tensor && type != names.parameter) return Plain::no;
    if (!try_read_tensor(t->object, &t->view) || t->view.numel() == 0) return Plain::no;
    if (device < 0 && !serves(t->view.device)) return Plain::no;
    if (device >= 0 && t->view.device != device) return Plain::no;
    device = t->view.device;
    if (grad_enabled) t->requires_grad = is_true(t->object, names.requires_grad);
    wants_gradient |= t->requires_grad;
  }
  return wants_gradient ? Plain::wants_gradient : Plain::yes;
}

py::tuple no_gradients(const py::tuple& needs) {
  py::tuple grads(needs.size());
  for (size_t i = 0; i < needs.size(); ++i) grads[i] = py::none();
  return grads;
}

bool read_dtype(PyObject* torch_dtype, DType* dtype) {
  const Torch& names = torch();
  for (DType candidate : kTensorTypes)
    if (names.dtypes[static_cast<int>(candidate)] == torch_dtype) {
      *dtype = candidate;
      return true;
    }
  return false;
}

py::object new_tensor(const TensorView& like, DType dtype, const int64_t* shape, int ndim, TensorView* view,
                      const int* nesting) {
  *view = {nullptr, dtype, ndim, true, like.device, {}, {}};
  py::tuple sizes(ndim), strides(ndim);
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    const int dim = nesting ? nesting[i] : i;
    view->shape[dim] = shape[dim];
    view->stride[dim] = stride;
    PyTuple_SET_ITEM(sizes.ptr(), dim, PyLong_FromLongLong(shape[dim]));
    PyTuple_SET_ITEM(strides.ptr(), dim, PyLong_FromLongLong(stride));
    stride *= shape[dim];
  }
  py::object out = allocate(sizes, strides, dtype, like.device);
  TensorView made;
  read_tensor(out.ptr(), &made);
  view->data = made.data;
  prepare(*view);
  return out;
}

py::object new_tensor(const TensorView& like, DType dtype, std::initializer_list<int64_t> shape, TensorView* view) {
  return new_tensor(like, dtype, shape.begin(), static_cast<int>(shape.size()), view);
}

py::object new_rows(const TensorView& x, int64_t last, DType dtype, TensorView* view) {
  int64_t shape[kMaxDims];
  for (int i = 0; i + 1 < x.ndim; ++i) shape[i] = x.shape[i];
  shape[x.ndim - 1] = last;
  py::object out = new_tensor(x, dtype, shape, x.ndim, view);
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

bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

}  // namespace llmfast
