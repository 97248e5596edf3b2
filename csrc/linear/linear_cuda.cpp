#include "linear/linear_cuda.h"

#include "gemm/gemm_cuda.h"
#include "linear/linear_checks.h"

namespace llmfast {
namespace {

const CudaTable<LinearParams> kForward(
    "linear", {LLMFAST_SM90A_ROW(kHalf, cuda::linear_forward_fits_sm90a, cuda::linear_forward_sm90a)  //
               {Arch::sm80, kAllFloat, nullptr, cuda::linear_forward_sm80}});
const CudaTable<LinearBackwardParams> kBackward(
    "linear_backward", {LLMFAST_SM90A_ROW(kHalf, cuda::linear_backward_fits_sm90a, cuda::linear_backward_sm90a)  //
                        {Arch::sm80, kAllFloat, nullptr, cuda::linear_backward_sm80}});

}  // namespace

void linear_forward(const LinearParams& p, const Stream& stream) {
  check_linear_forward(p);
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.weight.shape[0];
  require_sizes_for_gpu({M, N, K});
  require_same_dtype(p.bias, "bias", p.x.dtype);
  if (p.bias.defined) require_contiguous(p.bias, "bias");
  require_dtype(p.out, "out", p.x.dtype);
  require_workspace(p.workspace, cuda::linear_workspace(M, N, K));
  kForward(p.x.dtype, p, stream);
}

void linear_backward(const LinearBackwardParams& p, const Stream& stream) {
  check_linear_backward(p);
  const int64_t M = p.grad.shape[0], N = p.grad.shape[1];
  const int64_t K = p.grad_x.defined ? p.weight.shape[1] : p.grad_weight.defined ? p.x.shape[1] : 0;
  require_sizes_for_gpu({M, N, K});
  require_same_dtype(p.grad_x, "grad_x", p.grad.dtype);
  require_same_dtype(p.grad_weight, "grad_weight", p.grad.dtype);
  require_same_dtype(p.grad_bias, "grad_bias", p.grad.dtype);
  require_workspace(p.workspace, cuda::linear_backward_workspace(M, N, K));
  kBackward(p.grad.dtype, p, stream);
}

}  // namespace llmfast
