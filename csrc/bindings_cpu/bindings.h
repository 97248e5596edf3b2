// What `_cpu` has besides the ops of bindings/.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

namespace llmfast {

void bind_block(pybind11::module_& m);
void bind_linear_cross_entropy_joint(pybind11::module_& m);
void bind_optim(pybind11::module_& m);

}  // namespace llmfast
