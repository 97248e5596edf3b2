#include "bindings_cuda/bindings.h"
#include "ffn/ffn_cuda.h"

namespace py = pybind11;

namespace llmfast {

void bind_ffn(py::module_& m) {
  m.def("ffn_workspace", &cuda::ffn_workspace);
  m.def(
      "ffn_forward",
      [](const TensorView& out, const TensorView& up, const TensorView& gate, const TensorView& x,
         const TensorView& up_weight, const TensorView& up_bias, const TensorView& gate_weight,
         const TensorView& down_weight, const TensorView& down_bias, int activation, const TensorView& workspace,
         uint64_t stream) {
        ffn_forward({x, up_weight, up_bias, gate_weight, down_weight, down_bias, out, up, gate,
                     static_cast<Activation>(activation), workspace},
                    stream_on(x, stream));
      },
      WithoutGil());
  m.def("ffn_backward_workspace", &cuda::ffn_backward_workspace);
  m.def(
      "ffn_backward",
      [](const TensorView& grad_x, const TensorView& grad_up_weight, const TensorView& grad_up_bias,
         const TensorView& grad_gate_weight, const TensorView& grad_down_weight, const TensorView& grad_down_bias,
         const TensorView& grad, const TensorView& x, const TensorView& up_weight, const TensorView& gate_weight,
         const TensorView& down_weight, const TensorView& up, const TensorView& gate, int activation,
         const TensorView& workspace, uint64_t stream) {
        ffn_backward({grad, x, up_weight, gate_weight, down_weight, up, gate, grad_x, grad_up_weight, grad_up_bias,
                      grad_gate_weight, grad_down_weight, grad_down_bias, static_cast<Activation>(activation),
                      workspace},
                     stream_on(grad, stream));
      },
      WithoutGil());
}

}  // namespace llmfast
