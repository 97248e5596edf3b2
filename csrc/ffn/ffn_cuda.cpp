#include "ffn/ffn_cuda.h"

#include "ffn/ffn_checks.h"
#include "gemm/gemm_cuda.h"

namespace llmfast {
namespace {

const CudaTable<FfnParams> kForward("ffn",
                                    {LLMFAST_SM90A_ROW(kHalf, cuda::ffn_forward_fits_sm90a, cuda::ffn_forward_sm90a)  //
                                     {Arch::sm80, kAllFloat, nullptr, cuda::ffn_forward_sm80}});
const CudaTable<FfnBackwardParams> kBackward(
    "ffn_backward", {LLMFAST_SM90A_ROW(kHalf, cuda::ffn_backward_fits_sm90a, cuda::ffn_backward_sm90a)  //
                     {Arch::sm80, kAllFloat, nullptr, cuda::ffn_backward_sm80}});

}  // namespace

void ffn_forward(const FfnParams& p, const Stream& stream) {
  check_ffn_forward(p);
  const int64_t M = p.x.shape[0], C = p.x.shape[1], F = p.up_weight.shape[0];
  require_sizes_for_gpu({M, C, F});
  if (p.up_bias.defined) require_contiguous(p.up_bias, "up_bias");
  if (p.down_bias.defined) require_contiguous(p.down_bias, "down_bias");
  require(p.gate.defined == (p.up.defined && p.gate_weight.defined), "gate: saved together with up, when gated");
  require_workspace(p.workspace,
                    cuda::ffn_workspace(M, C, F, size_of(p.x.dtype), p.gate_weight.defined, p.up.defined));
  kForward(p.x.dtype, p, stream);
}

void ffn_backward(const FfnBackwardParams& p, const Stream& stream) {
  check_ffn_backward(p);
  const int64_t M = p.grad.shape[0], C = p.grad.shape[1], F = p.up_weight.shape[0];
  require_sizes_for_gpu({M, C, F});
  require(!p.grad_gate_weight.defined || p.gate_weight.defined, "grad_gate_weight goes with gate_weight");
  require_workspace(p.workspace,
                    cuda::ffn_backward_workspace(M, C, F, size_of(p.grad.dtype), p.gate_weight.defined));
  kBackward(p.grad.dtype, p, stream);
}

}  // namespace llmfast
