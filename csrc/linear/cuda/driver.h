// linear by the products of gemm/cuda, whichever one `Product` is; see linear.h for the maths.
//   out = x weight^T        both operands contiguous along the depth
//   grad_x = grad weight    weight contiguous along grad_x's columns
//   grad_weight = grad^T x  both contiguous across the depth, which is the tokens: no transposed copy is ever made
#pragma once
#include "gemm/cuda/column_sums.h"
#include "gemm/cuda/gemm.h"
#include "linear/linear_cuda.h"

namespace llmfast::cuda {

template <class Product, class T>
void linear_forward(const LinearParams& p, const Stream& stream) {
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.weight.shape[0];
  Product::template run<T, Major::k, Major::k>(operand(p.x), operand(p.weight), {M, N, K}, store_to<T>(p.out, p.bias),
                                               p.workspace.as<float>(), stream);
}

template <class Product, class T>
void linear_backward(const LinearBackwardParams& p, const Stream& stream) {
  const int64_t M = p.grad.shape[0], N = p.grad.shape[1];
  float* workspace = p.workspace.as<float>();
  if (p.grad_x.defined)
    Product::template run<T, Major::k, Major::mn>(operand(p.grad), operand_transposed(p.weight),
                                                  {M, p.weight.shape[1], N}, store_to<T>(p.grad_x), workspace, stream);
  if (p.grad_weight.defined)
    Product::template run<T, Major::mn, Major::mn>(operand_transposed(p.grad), operand_transposed(p.x),
                                                   {N, p.x.shape[1], M}, store_to<T>(p.grad_weight), workspace, stream);
  if (p.grad_bias.defined)
    column_sums<Product>(p.grad.as<const T>(), p.grad.stride[0], p.grad.stride[1], M, N, p.grad_bias.as<T>(), workspace,
                         stream);
}

}  // namespace llmfast::cuda
