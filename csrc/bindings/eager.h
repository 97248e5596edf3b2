// Whole op calls from plain eager code: arguments checked, output allocated and kernel run in one native call, which a
// small op would otherwise spend several times its own time on in Python. A function here returns None for whatever is
// not plain (other tensor types, dtypes or shapes that do not fit, a gradient that is wanted), and the op's Python code
// then takes the long way, where errors are explained.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>

#include "bindings/tensor.h"

namespace llmfast {

struct EagerTensor {
  PyObject* object;  // borrowed
  TensorView view;   // undefined for None
};

// Reads torch.Tensor or Parameter objects (not subclasses) or None that live on the CPU; false: one is something else, or
// requires a gradient although `grad_enabled`, or is empty.
bool read_eager(std::initializer_list<EagerTensor*> tensors, bool grad_enabled);

// Tensor.new_empty(shape): an uninitialised tensor of like's dtype (or `dtype`, a torch.dtype) and device.
pybind11::object new_empty(PyObject* like, const int64_t* shape, int ndim, PyObject* dtype = nullptr);

// The same, shaped as x but with `last` as its last dimension; `view` is set to the result as a matrix.
pybind11::object new_rows(const EagerTensor& x, int64_t last, TensorView* view, PyObject* dtype = nullptr);

// t as a matrix of its last dimension, if its strides allow one.
bool flatten_rows(TensorView* t);

}  // namespace llmfast
