// What `_cpu` has besides the ops of bindings/.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

namespace llmfast {

// OpenMP keeps a thread count for each Python thread, and torch sets it to that of torch.set_num_threads only when torch
// itself first has parallel work there: so a thread's first kernel asks for it.
struct ThreadsOfTorch {
  ThreadsOfTorch() {
    thread_local bool known = false;
    if (!known) pybind11::module_::import("torch").attr("get_num_threads")();
    known = true;
  }
};

// Around every kernel: lets go of the GIL.
struct KernelScope : ThreadsOfTorch {
  pybind11::gil_scoped_release release;
};

using WithoutGil = pybind11::call_guard<KernelScope>;

void bind_block(pybind11::module_& m);
void bind_linear_cross_entropy_joint(pybind11::module_& m);
void bind_optim(pybind11::module_& m);

}  // namespace llmfast
