// The matrix-multiply core that linear, ffn and linear_cross_entropy share.
//
//   C[M,N] = epilogue(A[M,K] * B[K,N]),   accumulated in float32
//
// A and B are strided views of any float dtype: a transpose is a swap of strides. What happens to the product is the
// epilogue's affair (bias, activation, store, loss); the core never writes C itself.
//
// How it works (the same nest for every target; `Kernel` is what differs):
//   B is packed once into panels of Kernel::kCols columns, by all threads together; where A is a block or two, so that a
//   panel is hardly used twice, each thread packs a panel at a time, keeps it in L2 and reads the next one ahead.
//   Each thread owns a rectangle of C. It packs mc rows of A so that they stay in L2 and runs through the column panels;
//   a sub-panel of B, kc deep, stays in L1 while all row panels of A stream past it.
//   A tile of kRows x kCols accumulates in registers over kc and waits in a small buffer between sub-panels.
//   The last sub-panel leaves the finished tile in scratch, where the epilogue takes it row by row.
#pragma once
#include <cstdint>

#include "core/types.h"

namespace llmfast {

struct MatrixRef {
  const void* data;
  DType dtype;
  int64_t row_stride, col_stride;  // in elements

  MatrixRef transposed() const { return {data, dtype, col_stride, row_stride}; }
  MatrixRef offset(int64_t row, int64_t col) const {
    const int64_t bytes = (row * row_stride + col * col_stride) * size_of(dtype);
    return {static_cast<const char*>(data) + bytes, dtype, row_stride, col_stride};
  }
};

// A 2-D tensor view as a matrix.
inline MatrixRef matrix(const TensorView& t) { return {t.data, t.dtype, t.stride[0], t.stride[1]}; }

struct GemmSize {
  int64_t M, N, K;
};

}  // namespace llmfast
