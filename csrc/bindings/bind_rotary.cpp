#include "bindings/bindings.h"
#include "rotary/rotary.h"

namespace py = pybind11;

namespace llmfast {

void bind_rotary(py::module_& m) {
  m.def(
      "rotary",
      [](const TensorView& out, const TensorView& x, const TensorView& cos, const TensorView& sin, bool inverse) {
        rotary({out, x, cos, sin, inverse});
      },
      WithoutGil());
}

}  // namespace llmfast
