// The ops' Python side, one bind_<op>() a file and the same for `_cpu` and `_cuda`. No maths here: read the views, fill
// the op's params, hand them to run(), which each module defines for itself (run.h).
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/tensor.h"
#include "core/check.h"

namespace llmfast {

void bind_attention(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_ffn(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_linear_cross_entropy(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_rotary(pybind11::module_& m);

inline void bind_ops(pybind11::module_& m) {
  bind_attention(m);
  bind_embedding(m);
  bind_ffn(m);
  bind_linear(m);
  bind_linear_cross_entropy(m);
  bind_norm(m);
  bind_rotary(m);
}

}  // namespace llmfast
