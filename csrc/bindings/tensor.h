// torch.Tensor -> TensorView at the Python boundary. `const TensorView&` in a bound function takes a torch.Tensor of the
// module's device or None (view.defined == false). Read through torch's DLPack exchange API (42 ns a tensor).
#pragma once
#include <pybind11/pybind11.h>

#include "core/dlpack_abi.h"
#include "core/types.h"

// DLPack's number for the device whose tensors this module takes; the emulated `_cuda` takes the CPU's.
#ifndef LLMFAST_TENSOR_DEVICE
#define LLMFAST_TENSOR_DEVICE dlpack::kCpu
#endif

namespace llmfast {

constexpr bool kTensorsOnCuda = LLMFAST_TENSOR_DEVICE == dlpack::kCuda;

const dlpack::ExchangeApi* exchange_api();  // nullptr: this torch has none

bool read_tensor(PyObject* object, TensorView* view);  // false: not a tensor; throws on an unsupported one
bool try_read_tensor(PyObject* tensor, TensorView* view);  // false: an unsupported one

void* current_stream(int device);  // torch's, as its handle; nullptr on the CPU

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
