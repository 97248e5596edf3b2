// One bind_<op>() a file; module.cpp calls them all. Functions take tensors of the module's device and, last, the stream
// as torch gives it (torch.cuda.current_stream().cuda_stream). They enqueue and return: no allocation, no waiting.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/tensor.h"
#include "core/check.h"
#include "core/cuda_stream.h"

namespace llmfast {

using WithoutGil = pybind11::call_guard<pybind11::gil_scoped_release>;

inline Stream stream_on(const TensorView& tensor, uint64_t handle) {
  return {tensor.device, reinterpret_cast<void*>(handle)};
}

void bind_attention(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_ffn(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_linear_cross_entropy(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_optim(pybind11::module_& m);
void bind_rotary(pybind11::module_& m);

}  // namespace llmfast
