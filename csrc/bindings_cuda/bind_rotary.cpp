#include "bindings_cuda/bindings.h"
#include "rotary/rotary_cuda.h"

namespace py = pybind11;

namespace llmfast {

void bind_rotary(py::module_& m) {
  m.def(
      "rotary",
      [](const TensorView& out, const TensorView& x, const TensorView& cos, const TensorView& sin, bool inverse,
         uint64_t stream) { rotary({out, x, cos, sin, inverse}, stream_on(x, stream)); },
      WithoutGil());
}

}  // namespace llmfast
