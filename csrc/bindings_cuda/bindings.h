// What `_cuda` has besides the ops of bindings/.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "core/cuda_stream.h"

namespace llmfast {

using WithoutGil = pybind11::call_guard<pybind11::gil_scoped_release>;

void bind_attention_ways(pybind11::module_& m);
void bind_optim(pybind11::module_& m);

}  // namespace llmfast
