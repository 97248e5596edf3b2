// torch.Tensor -> TensorView at the Python boundary. `const TensorView&` in a bound function takes a CPU torch.Tensor or
// None (view.defined == false). Read through torch's DLPack exchange API (42 ns a tensor); see tensor.cpp.
#pragma once
#include <pybind11/pybind11.h>

#include "core/dlpack_abi.h"
#include "core/types.h"

namespace llmfast {

const dlpack::ExchangeApi* exchange_api();  // nullptr: this torch has none

bool read_tensor(PyObject* object, TensorView* view);  // false: not a tensor; throws on an unsupported one
bool try_read_tensor(PyObject* tensor, TensorView* view);  // false: an unsupported one

}  // namespace llmfast

namespace pybind11::detail {

template <>
struct type_caster<llmfast::TensorView> {
  PYBIND11_TYPE_CASTER(llmfast::TensorView, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    if (source.is_none()) {
      value = {};
      return true;
    }
    return llmfast::read_tensor(source.ptr(), &value);
  }
};

}  // namespace pybind11::detail
