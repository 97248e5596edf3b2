// One bind_<op>() a file; module.cpp calls them all. No maths here: read the views, fill the op's params, call its
// dispatch table without the GIL.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/tensor.h"
#include "core/check.h"

namespace llmfast {

using WithoutGil = pybind11::call_guard<pybind11::gil_scoped_release>;

void bind_attention(pybind11::module_& m);
void bind_block(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_ffn(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_linear_cross_entropy(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_optim(pybind11::module_& m);
void bind_rotary(pybind11::module_& m);

}  // namespace llmfast
