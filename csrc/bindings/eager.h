// Whole op calls from plain eager code: arguments checked, outputs allocated and kernel run in one native call, which a
// small op would otherwise spend several times its own time on in Python. A function here returns None for whatever is
// not plain (other tensor types, dtypes or shapes that do not fit), and the op's Python code then takes the long way,
// where errors are explained. Forward functions end in a `Gradient`:
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>

#include "bindings/tensor.h"

namespace llmfast {

enum class Gradient {
  off,    // nothing will be differentiated
  asked,  // False is returned where all else is plain, but an input requires a gradient
  saved,  // compute, and return what the backward pass needs with the result
};

struct EagerTensor {
  PyObject* object = nullptr;  // borrowed
  TensorView view = {};        // undefined for None
  bool requires_grad = false;

  EagerTensor() = default;
  explicit EagerTensor(pybind11::handle tensor) : object(tensor.ptr()) {}
};

enum class Plain { no, yes, wants_gradient };

// Reads torch.Tensor or Parameter objects (not subclasses) or None that live on the CPU; `no`: one is something else, or
// is empty. Only with Gradient::asked it looks whether one requires a gradient.
Plain read_eager(std::initializer_list<EagerTensor*> tensors, Gradient gradient);

bool read_dtype(PyObject* torch_dtype, DType* dtype);  // false: none that kernels take

// An uninitialised CPU tensor. With `nesting`, dimension nesting[0] is the outermost in memory, and so on; `view` is set
// if given.
pybind11::object new_tensor(DType dtype, const int64_t* shape, int ndim, TensorView* view = nullptr,
                            const int* nesting = nullptr);
pybind11::object new_tensor(DType dtype, std::initializer_list<int64_t> shape, TensorView* view = nullptr);

// Shaped as x but with `last` as its last dimension; `view` is set to the result as a matrix.
pybind11::object new_rows(const TensorView& x, int64_t last, DType dtype, TensorView* view);

// t as a matrix of its last dimension, if its strides allow one.
bool flatten_rows(TensorView* t);

// Room for `count` floats that nobody wants to keep; the next call of an op in this thread overwrites them.
TensorView scratch_floats(std::initializer_list<int64_t> shape);

bool same_shape(const TensorView& a, const TensorView& b);

}  // namespace llmfast

namespace pybind11::detail {

// From Python: torch.is_grad_enabled() for the first two, SAVED (ops/_native_op.py) for the last.
template <>
struct type_caster<llmfast::Gradient> {
  PYBIND11_TYPE_CASTER(llmfast::Gradient, const_name("int"));
  bool load(handle source, bool) {
    if (!PyLong_Check(source.ptr())) return false;
    value = static_cast<llmfast::Gradient>(PyLong_AsLong(source.ptr()));
    return true;
  }
};

}  // namespace pybind11::detail
