// GEMM micro-kernel on AVX512_BF16: a 14 x 32 tile of C in 28 of 32 registers; for every pair of depth two registers of B and
// fourteen broadcasts of a pair of A feed 28 instructions.
//   A panel: for every 32 of depth 14 rows of 64 bytes, as they lie in A; a broadcast reads 4 of them.
//   B panel: for every 32 of depth two VNNI tiles of 16 columns, as for AMX.
// Measured (2-core Zen 4, one core, random data): 14 x 2, 9 x 3 and 6 x 4 registers of sums all reach the 235 GFLOP/s of
// the instruction alone, with kc from 256 to 768; 14 x 32 reads the least.
#pragma once
#include "gemm/pack_bf16.h"
#include "simd/dot_bf16.h"

namespace llmfast::LLMFAST_TARGET {

struct Kernel {
  using Packed = bf16;
  static constexpr int kRows = 14;
  static constexpr int kCols = kBlock;
  static constexpr int kDepth = kBlock;
  static constexpr int64_t kFewRows = 48;
  static constexpr bool kFewRowsInBlock = false;
  static constexpr int64_t kDepthInL1 = 768;
  static constexpr int64_t kBlockBytes = 512 << 10;
  static constexpr int64_t kFewRowsOfBlock = 16 * kRows;

  static bool supports(DType dtype) { return dtype == DType::bf16; }
  static int64_t rows_worth_a_thread(int64_t) { return 16 * kRows; }
  static bool takes_rows(MatrixRef) { return false; }
  static bool takes_columns(MatrixRef) { return false; }

  struct ThreadState {};

  struct LeftPanel {
    const bf16* packed;
    const float* in_place;  // never
    int64_t ld;
    bool columns;
  };

  static void pack_a(bf16* dst, MatrixRef a, int64_t rows, int64_t depth) {
    for (int64_t k = 0; k < depth; k += kBlock, dst += kRows * kBlock) {
      const bf16* src = static_cast<const bf16*>(a.data) + k * a.col_stride;
      const int64_t count = depth - k < kBlock ? depth - k : kBlock;
      if (a.col_stride == 1) a_rows_from_rows<kRows>(dst, src, a.row_stride, rows, count);
      else if (a.row_stride == 1) a_rows_from_columns<kRows>(dst, src, a.col_stride, rows, count);
      else {
        alignas(64) bf16 block[kBlockElements];
        copy_block(block, src, a.row_stride, a.col_stride, rows, count);
        a_rows_from_rows<kRows>(dst, block, kBlock, kRows, kBlock);
      }
    }
  }

  static void pack_b(bf16* dst, MatrixRef b, int64_t cols, int64_t depth) { pack_vnni_panel(dst, b, cols, depth); }

  template <class Pending>
  static void multiply(LeftPanel left, int64_t rows, const bf16* b, int64_t depth, TileSums sums, const bf16*,
                       int64_t, Pending& pending) {
    pending.finish();
    if (rows > 8) multiply_tile<kRows>(left.packed, b, depth, sums);
    else if (rows > 4) multiply_tile<8>(left.packed, b, depth, sums);
    else multiply_tile<4>(left.packed, b, depth, sums);
  }

 private:
  // Sums start at zero for each sub-panel and are added to sums.from at the end: blocked summation. Out of line: inlined beside
  // an epilogue, gcc spills the sums.
  template <int kR>
  __attribute__((noinline)) static void multiply_tile(const bf16* a, const bf16* b, int64_t depth, TileSums sums) {
    Vec acc[kR][kBlockVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) acc[r][0] = acc[r][1] = Vec::zero();
    for (int64_t k = 0; k < depth; k += kDepth) {
      dot_block<kR>(acc, a, b);
      a += kRows * kBlock;
      b += kBlockElements;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVecs; ++v) {
        const int64_t lane = v * Vec::kLanes;
        const Vec sum = sums.from ? acc[r][v] + Vec::load(sums.from + r * sums.from_stride + lane) : acc[r][v];
        sum.store(sums.to + r * sums.to_stride + lane);
      }
  }
};

}  // namespace llmfast::LLMFAST_TARGET
