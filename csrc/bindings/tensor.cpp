#include "bindings/tensor.h"

#include <stdexcept>
#include <string>

#include "core/dlpack_abi.h"

namespace py = pybind11;

namespace llmfast {
namespace {

constexpr int kDevice = LLMFAST_TENSOR_DEVICE;
constexpr const char* kDeviceName = kTensorsOnCuda ? "cuda" : "cpu";

void check_device(bool holds) {
  if (!holds) throw py::value_error(kTensorsOnCuda ? "expected a CUDA tensor" : "expected a CPU tensor");
}

PyObject* tensor_type() {
  static PyObject* type = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
  return type;
}

bool find_dtype(const dlpack::DataType& type, DType* dtype) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kFloat && type.bits == 32) *dtype = DType::f32;
  else if (type.code == dlpack::kFloat && type.bits == 16) *dtype = DType::f16;
  else if (type.code == dlpack::kBfloat && type.bits == 16) *dtype = DType::bf16;
  else if (type.code == dlpack::kInt && type.bits == 32) *dtype = DType::i32;
  else if (type.code == dlpack::kInt && type.bits == 64) *dtype = DType::i64;
  else if (type.code == dlpack::kBool && type.bits == 8) *dtype = DType::boolean;
  else return false;
  return true;
}

DType dtype_of(const dlpack::DataType& type) {
  DType dtype;
  if (find_dtype(type, &dtype)) return dtype;
  throw py::type_error("unsupported tensor dtype (DLPack code " + std::to_string(type.code) + ", " +
                       std::to_string(type.bits) + " bits); expected float32, bfloat16, float16, int32, int64 or bool");
}

void check_rank(int ndim) {
  if (ndim > kMaxDims) throw py::value_error("tensor has " + std::to_string(ndim) + " dimensions, at most 6 are supported");
}

void fill(const dlpack::Tensor& tensor, DType dtype, TensorView* view) {
  view->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view->dtype = dtype;
  view->ndim = tensor.ndim;
  view->defined = true;
  view->device = static_cast<int16_t>(tensor.device.id);
  for (int i = 0; i < tensor.ndim; ++i) {
    view->shape[i] = tensor.shape[i];
    view->stride[i] = tensor.strides[i];
  }
}

// Whether the tensor's memory is not what it stands for: that of z.conj().imag has the other sign, that of a zero tensor
// (forward-mode AD) is missing. torch's dispatcher makes real tensors of them. An imaginary part has no neighbours in
// memory, so most tensors need not be asked.
bool is_lazy(PyObject* object, const dlpack::Tensor& tensor) {
  bool empty = false, neighbours = false;
  for (int i = 0; i < tensor.ndim; ++i) {
    empty |= tensor.shape[i] == 0;
    neighbours |= tensor.strides[i] == 1 && tensor.shape[i] > 1;
  }
  if (!tensor.data && !empty) return true;
  return !neighbours && !empty && py::handle(object).attr("is_neg")().cast<bool>();
}

// For a torch without the exchange API: the same facts through Python attributes, ten times slower.
void read_by_attributes(PyObject* object, TensorView* view) {
  py::handle tensor(object);
  check_device(tensor.attr("device").attr("type").cast<std::string>() == kDeviceName);
  const std::string name = py::str(tensor.attr("dtype"));
  bool known = false;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::i32, DType::i64, DType::boolean})
    if (name == std::string("torch.") + name_of(dtype)) {
      view->dtype = dtype;
      known = true;
    }
  if (!known) throw py::type_error("unsupported tensor dtype " + name);
  py::tuple shape = tensor.attr("shape"), stride = tensor.attr("stride")();
  view->ndim = static_cast<int>(shape.size());
  check_rank(view->ndim);
  for (int i = 0; i < view->ndim; ++i) {
    view->shape[i] = shape[i].cast<int64_t>();
    view->stride[i] = stride[i].cast<int64_t>();
  }
  view->data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  if (kTensorsOnCuda) view->device = tensor.attr("device").attr("index").cast<int16_t>();
}

}  // namespace

const dlpack::ExchangeApi* exchange_api() {
  static const dlpack::ExchangeApi* api = [] {
    py::object type = py::module_::import("torch").attr("Tensor");
    const dlpack::ExchangeApi* found = nullptr;
    if (py::hasattr(type, "__dlpack_c_exchange_api__")) {
      py::object capsule = type.attr("__dlpack_c_exchange_api__");
      found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (!found) PyErr_Clear();
    }
    return found && found->header.version.major == 1 ? found : nullptr;
  }();
  return api;
}

bool read_tensor(PyObject* object, TensorView* view) {
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(tensor_type()))) return false;
  view->defined = true;
  const dlpack::ExchangeApi* api = exchange_api();
  if (!api) {
    read_by_attributes(object, view);
    return true;
  }
  dlpack::Tensor tensor;
  if (api->dltensor_from_py_object_no_sync(object, &tensor) != 0) throw py::error_already_set();
  check_device(tensor.device.type == kDevice);
  check_rank(tensor.ndim);
  if (is_lazy(object, tensor)) throw py::value_error("expected a tensor that is not negated or zero lazily, and has memory");
  fill(tensor, dtype_of(tensor.dtype), view);
  return true;
}

bool try_read_tensor(PyObject* object, TensorView* view) {
  const dlpack::ExchangeApi* api = exchange_api();
  if (!api) {
    try {
      read_by_attributes(object, view);
    } catch (const py::builtin_exception&) {
      return false;
    } catch (const py::error_already_set&) {
      return false;
    }
    return view->defined = true;
  }
  dlpack::Tensor tensor;
  if (api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {  // sparse, meta, wrapped by a transform
    PyErr_Clear();
    return false;
  }
  DType dtype;
  if (tensor.device.type != kDevice || tensor.ndim > kMaxDims || !find_dtype(tensor.dtype, &dtype)) return false;
  if (is_lazy(object, tensor)) return false;
  fill(tensor, dtype, view);
  return true;
}

void* current_stream(int device) {
  if (!kTensorsOnCuda) return nullptr;
  if (const dlpack::ExchangeApi* api = exchange_api()) {
    void* stream = nullptr;
    if (api->current_work_stream(kDevice, device, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  py::object core = py::module_::import("torch").attr("_C");
  return reinterpret_cast<void*>(core.attr("_cuda_getCurrentRawStream")(device).cast<uintptr_t>());
}

}  // namespace llmfast
