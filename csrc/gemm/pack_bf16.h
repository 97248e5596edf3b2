// Packing of bf16 matrices into the blocks of simd/bf16_blocks.h, for the kernels that multiply them.
#pragma once
#include "gemm/gemm.h"
#include "simd/bf16_blocks.h"

namespace llmfast::LLMFAST_TARGET {

// For matrices with no unit stride: block[lane][k] of `lanes` x `depth` values, zero beyond.
inline void copy_block(bf16* block, const bf16* src, int64_t lane_stride, int64_t depth_stride, int64_t lanes,
                       int64_t depth) {
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t k = 0; k < kBlock; ++k)
      block[i * kBlock + k] = i < lanes && k < depth ? src[i * lane_stride + k * depth_stride] : bf16{0};
}

// A column panel of B: for every 32 of depth two VNNI tiles of 16 columns.
inline void pack_vnni_panel(bf16* dst, MatrixRef b, int64_t cols, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kBlock, dst += kBlockElements) {
    const bf16* src = static_cast<const bf16*>(b.data) + k * b.row_stride;
    const int64_t count = depth - k < kBlock ? depth - k : kBlock;
    if (b.row_stride == 1) b_block_from_columns(dst, src, b.col_stride, count, cols);
    else if (b.col_stride == 1) b_block_from_rows(dst, src, b.row_stride, count, cols);
    else {
      alignas(64) bf16 block[kBlockElements];
      copy_block(block, src, b.col_stride, b.row_stride, cols, count);
      b_block_from_columns(dst, block, kBlock, kBlock, kBlock);
    }
  }
}

}  // namespace llmfast::LLMFAST_TARGET
