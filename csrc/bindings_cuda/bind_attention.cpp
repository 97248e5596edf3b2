#include <optional>

#include <pybind11/stl.h>

#include "attention/attention_cuda.h"
#include "attention/cuda/one_pass.h"
#include "bindings_cuda/bindings.h"

namespace py = pybind11;

namespace llmfast {

using Distance = std::optional<int64_t>;  // None: unbounded

void bind_attention(py::module_& m) {
  m.def("attention_workspace", &cuda::attention_workspace);
  m.def(
      "attention_forward",
      [](const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k, const TensorView& v,
         const TensorView& mask, const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k, Distance left,
         Distance right, float scale, float softcap, const TensorView& workspace, uint64_t stream) {
        attention_forward({q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k, left.value_or(kUnbounded),
                           right.value_or(kUnbounded), scale, softcap, workspace},
                          stream_on(q, stream));
      },
      WithoutGil());
  m.def("attention_backward_workspace", &cuda::attention_backward_workspace);
  // mask: what the backward is given, whose values do not matter here.
  m.def("attention_backward_sums", [](int64_t B, int64_t Hq, int64_t Hkv, int64_t Tq, int64_t Tk, int64_t D, int64_t Dv,
                                      Distance left, Distance right, float softcap, int device,
                                      const TensorView& mask) {
    AttentionParams p = {};
    p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Tq = Tq, p.Tk = Tk, p.D = D, p.Dv = Dv, p.softcap = softcap;
    p.left = left.value_or(kUnbounded), p.right = right.value_or(kUnbounded);
    p.q.dtype = DType::bf16;
    if (mask.defined) p.mask = {mask.data, mask.dtype, mask.stride[0], mask.stride[1], mask.stride[2], mask.stride[3]};
    return cuda::attention_backward_sums(p, device);
  });
  m.def("set_attention_one_pass_from", [](int64_t queries) { return cuda::one_pass_from.exchange(queries); });
  m.def(
      "attention_backward",
      [](const TensorView& grad_q, const TensorView& grad_k, const TensorView& grad_v, const TensorView& grad_out,
         const TensorView& out, const TensorView& lse, const TensorView& q, const TensorView& k, const TensorView& v,
         const TensorView& mask, const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k, Distance left,
         Distance right, float scale, float softcap, const TensorView& workspace, uint64_t stream) {
        attention_backward({q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k, left.value_or(kUnbounded),
                            right.value_or(kUnbounded), scale, softcap, workspace},
                           {grad_out, grad_q, grad_k, grad_v}, stream_on(q, stream));
      },
      WithoutGil());
}

}  // namespace llmfast
