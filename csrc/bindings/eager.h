// Whole op calls from plain eager code: arguments checked, outputs allocated and kernel run in one native call, on what a
// small op would otherwise spend several times its own time in Python. The same code serves `_cpu` and `_cuda`.
//
// A function here returns None for whatever is not plain (other tensor types, dtypes or shapes that do not fit), and the
// op's Python code then takes the long way, where errors are explained. A forward function that is told that gradients
// are enabled returns a list where an input requires one: the results, then what the backward pass needs with the inputs.
// A <op>_gradient() function returns what autograd wants of a node with the inputs of eager_function in
// ops/_native_op.py: a gradient or None for each.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>

#include "bindings/run.h"
#include "bindings/tensor.h"

namespace llmfast {

struct EagerTensor {
  PyObject* object = nullptr;  // borrowed
  TensorView view = {};        // undefined for None
  bool requires_grad = false;

  EagerTensor() = default;
  explicit EagerTensor(pybind11::handle tensor) : object(tensor.ptr()) {}
};

enum class Plain { no, yes, wants_gradient };

// Reads torch.Tensor or Parameter objects (not subclasses) or None on one device that has kernels in this module; `no`:
// one is something else, or is empty.
Plain read_eager(std::initializer_list<EagerTensor*> tensors, bool grad_enabled = false);

// [items...], the answer where a gradient is wanted.
template <class... Items>
pybind11::list list_of(Items&&... items) {
  pybind11::list list(sizeof...(items));
  Py_ssize_t i = 0;
  (PyList_SET_ITEM(list.ptr(), i++, pybind11::object(std::forward<Items>(items)).release().ptr()), ...);
  return list;
}

// Whether autograd wants the gradient of input i; `needs`: ctx.needs_input_grad.
inline bool is_needed(const pybind11::tuple& needs, int i) { return PyTuple_GET_ITEM(needs.ptr(), i) == Py_True; }

// A tuple of so many None, as many as the node has inputs.
pybind11::tuple no_gradients(const pybind11::tuple& needs);

bool read_dtype(PyObject* torch_dtype, DType* dtype);  // false: none that kernels take

// An uninitialised tensor of torch's on the device of `like`, for its current stream. With `nesting`, dimension nesting[0]
// is the outermost in memory, and so on.
pybind11::object new_tensor(const TensorView& like, DType dtype, const int64_t* shape, int ndim, TensorView* view,
                            const int* nesting = nullptr);
pybind11::object new_tensor(const TensorView& like, DType dtype, std::initializer_list<int64_t> shape, TensorView* view);

// Shaped as x but with `last` as its last dimension; `view` is set to the result as a matrix.
pybind11::object new_rows(const TensorView& x, int64_t last, DType dtype, TensorView* view);

// t as a matrix of its last dimension, if its strides allow one.
bool flatten_rows(TensorView* t);

bool same_shape(const TensorView& a, const TensorView& b);

}  // namespace llmfast
