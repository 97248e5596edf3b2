// Which way the backward pass of attention goes, for tests.
#include <optional>

#include <pybind11/stl.h>

#include "attention/attention_cuda.h"
#include "attention/cuda/one_pass.h"
#include "bindings_cuda/bindings.h"

namespace llmfast {

void bind_attention_ways(pybind11::module_& m) {
  using Distance = std::optional<int64_t>;  // None: unbounded
  // mask: what the backward is given, whose values do not matter here.
  m.def("attention_backward_sums", [](int64_t B, int64_t Hq, int64_t Hkv, int64_t Tq, int64_t Tk, int64_t D, int64_t Dv,
                                      Distance left, Distance right, float softcap, int device,
                                      const TensorView& mask, bool any_order) {
    AttentionParams p = {};
    p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Tq = Tq, p.Tk = Tk, p.D = D, p.Dv = Dv, p.softcap = softcap;
    p.left = left.value_or(kUnbounded), p.right = right.value_or(kUnbounded);
    p.q.dtype = DType::bf16, p.any_order = any_order;
    if (mask.defined) p.mask = {mask.data, mask.dtype, mask.stride[0], mask.stride[1], mask.stride[2], mask.stride[3]};
    return cuda::attention_backward_sums(p, device);
  });
  m.def("set_attention_one_pass_from", [](int64_t queries) { return cuda::one_pass_from.exchange(queries); });
}

}  // namespace llmfast
