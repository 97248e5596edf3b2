// linear on the shared GEMM core; see linear.h for the contract.
#include "linear/linear.h"

#include "gemm/product.h"
#include "gemm/vectors.h"

namespace llmfast::LLMFAST_TARGET {

// out = a * b (+ bias), stored in out's dtype.
static void product(MatrixRef a, MatrixRef b, GemmSize size, const TensorView& out, const float* bias) {
  visit_float(out.dtype, [&](auto type) {
    using T = decltype(type);
    gemm(a, b, size, StoreEpilogue<T>{out.as<T>(), out.stride[0], bias});
  });
}

void linear_forward(const LinearParams& p) {
  const GemmSize size{p.x.shape[0], p.weight.shape[0], p.x.shape[1]};
  const float* bias = as_float(p.bias, workspace<float>(Slot::staging, size.N + Vec::kLanes));
  product(matrix(p.x), matrix(p.weight).transposed(), size, p.out, bias);
}

void linear_backward(const LinearBackwardParams& p) {
  const int64_t M = p.grad.shape[0], N = p.grad.shape[1];
  if (p.grad_x.defined) product(matrix(p.grad), matrix(p.weight), {M, p.weight.shape[1], N}, p.grad_x, nullptr);
  if (p.grad_weight.defined)
    product(matrix(p.grad).transposed(), matrix(p.x), {N, p.x.shape[1], M}, p.grad_weight, nullptr);
  if (p.grad_bias.defined) column_sums(p.grad, p.grad_bias);
}

}  // namespace llmfast::LLMFAST_TARGET
