// One bind_<op>() a file; module.cpp calls them all. No maths here: read the views, fill the op's params, call its
// dispatch table without the GIL.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/tensor.h"
#include "core/check.h"

namespace llmfast {

using WithoutGil = pybind11::call_guard<pybind11::gil_scoped_release>;

void bind_linear(pybind11::module_& m);

}  // namespace llmfast
