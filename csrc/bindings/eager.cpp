#include "bindings/eager.h"

#include <stdexcept>
#include <string>

#include "core/workspace.h"

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

dlpack::DataType dlpack_type(DType dtype) {
  const uint8_t code = dtype == DType::bf16      ? dlpack::kBfloat
                       : is_floating(dtype)      ? dlpack::kFloat
                       : dtype == DType::boolean ? dlpack::kBool
                                                 : dlpack::kInt;
  return {code, static_cast<uint8_t>(8 * size_of(dtype)), 1};
}

void remember_error(void* message, const char* kind, const char* text) {
  *static_cast<std::string*>(message) = std::string(kind) + ": " + text;
}

// For a torch without the exchange API.
py::object new_tensor_by_call(DType dtype, const int64_t* shape, const int64_t* stride, int ndim) {
  py::tuple sizes(ndim), strides(ndim);
  for (int i = 0; i < ndim; ++i) {
    sizes[i] = py::int_(shape[i]);
    strides[i] = py::int_(stride[i]);
  }
  static PyObject* empty_strided = py::object(py::module_::import("torch").attr("empty_strided")).release().ptr();
  return py::handle(empty_strided)(sizes, strides, py::arg("dtype") = py::handle(torch().dtypes[static_cast<int>(dtype)]),
                                   py::arg("device") = "cpu");
}

}  // namespace

Plain read_eager(std::initializer_list<EagerTensor*> tensors, bool grad_enabled) {
  const Torch& names = torch();
  bool wants_gradient = false;
  for (EagerTensor* t : tensors) {
    if (!t->object || t->object == Py_None) continue;
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(t->object));
    if (type != names.tensor && type != names.parameter) return Plain::no;
    if (!try_read_tensor(t->object, &t->view) || t->view.numel() == 0) return Plain::no;
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

py::object new_tensor(DType dtype, const int64_t* shape, int ndim, TensorView* view, const int* nesting) {
  int64_t sizes[kMaxDims], stride[kMaxDims], flat[1] = {1};
  for (int i = 0; i < ndim; ++i) sizes[i] = shape[i];
  for (int i = ndim - 1; i >= 0; --i) {
    const int dim = nesting ? nesting[i] : i;
    stride[dim] = flat[0];
    flat[0] *= shape[dim];
  }
  py::object out;
  void* data;
  if (const dlpack::ExchangeApi* api = exchange_api()) {
    int64_t one[1] = {1};
    dlpack::Tensor prototype{nullptr, {dlpack::kCpu, 0}, 1, dlpack_type(dtype), flat, one, 0};
    dlpack::ManagedTensorVersioned* managed = nullptr;
    std::string error;
    if (api->managed_tensor_allocator(&prototype, &managed, &error, &remember_error) != 0) throw std::runtime_error(error);
    data = static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset;
    managed->tensor.ndim = ndim;
    managed->tensor.shape = sizes;  // read by the next line, and never again
    managed->tensor.strides = stride;
    void* object = nullptr;
    if (api->managed_tensor_to_py_object_no_sync(managed, &object) != 0) throw py::error_already_set();
    out = py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  } else {
    out = new_tensor_by_call(dtype, shape, stride, ndim);
    data = reinterpret_cast<void*>(out.attr("data_ptr")().cast<uintptr_t>());
  }
  if (view) {
    *view = {data, dtype, ndim, true, 0, {}, {}};
    for (int i = 0; i < ndim; ++i) {
      view->shape[i] = shape[i];
      view->stride[i] = stride[i];
    }
  }
  return out;
}

py::object new_tensor(DType dtype, std::initializer_list<int64_t> shape, TensorView* view) {
  return new_tensor(dtype, shape.begin(), static_cast<int>(shape.size()), view);
}

py::object new_rows(const TensorView& x, int64_t last, DType dtype, TensorView* view) {
  int64_t shape[kMaxDims];
  for (int i = 0; i + 1 < x.ndim; ++i) shape[i] = x.shape[i];
  shape[x.ndim - 1] = last;
  py::object out = new_tensor(dtype, shape, x.ndim, view);
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

TensorView scratch_floats(std::initializer_list<int64_t> shape) {
  TensorView view;
  view.ndim = static_cast<int>(shape.size());
  view.defined = true;
  int64_t count = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.shape[i] = shape.begin()[i];
    view.stride[i] = count;
    count *= view.shape[i];
  }
  view.data = workspace<float>(Slot::block, count);  // no op uses that slot
  return view;
}

bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

}  // namespace llmfast
