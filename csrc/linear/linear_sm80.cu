// linear on the shared CUDA product (gemm/cuda/gemm.h); see linear.h for the maths.
//   out = x weight^T        both operands contiguous along the depth
//   grad_x = grad weight    weight contiguous along grad_x's columns
//   grad_weight = grad^T x  both contiguous across the depth, which is the tokens: no transposed copy is ever made
#include "gemm/cuda/column_sums.h"
#include "gemm/cuda/gemm.h"
#include "linear/linear_cuda.h"

namespace llmfast::cuda {

int64_t linear_workspace(int64_t M, int64_t N, int64_t K) { return parts_workspace({M, N, K}); }

int64_t linear_backward_workspace(int64_t M, int64_t N, int64_t K) {
  const int64_t sizes[] = {parts_workspace({M, K, N}), parts_workspace({N, K, M}), column_sums_workspace(M, N)};
  int64_t most = 0;
  for (const int64_t size : sizes) most = size > most ? size : most;
  return most;
}

void linear_forward_sm80(const LinearParams& p, const Stream& stream) {
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.weight.shape[0];
  visit_float(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    gemm<T, Major::k, Major::k>(operand(p.x), operand(p.weight), {M, N, K}, store_to<T>(p.out, p.bias),
                                p.workspace.as<float>(), stream);
  });
}

void linear_backward_sm80(const LinearBackwardParams& p, const Stream& stream) {
  const int64_t M = p.grad.shape[0], N = p.grad.shape[1];
  float* workspace = p.workspace.as<float>();
  visit_float(p.grad.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.grad_x.defined)
      gemm<T, Major::k, Major::mn>(operand(p.grad), operand_transposed(p.weight), {M, p.weight.shape[1], N},
                                   store_to<T>(p.grad_x), workspace, stream);
    if (p.grad_weight.defined)
      gemm<T, Major::mn, Major::mn>(operand_transposed(p.grad), operand_transposed(p.x), {N, p.x.shape[1], M},
                                    store_to<T>(p.grad_weight), workspace, stream);
    if (p.grad_bias.defined)
      column_sums(p.grad.as<const T>(), p.grad.stride[0], p.grad.stride[1], M, N, p.grad_bias.as<T>(), workspace,
                  stream);
  });
}

}  // namespace llmfast::cuda
