// GEMM micro-kernel on AMX tiles: a 32 x 32 tile of C in four accumulators of 16 x 16, two tiles of A and two of B for
// every 32 of depth, four products from four loads.
//   A panel: for every 32 of depth 32 rows of 64 bytes, two tiles; streamed from L2 with loads that leave L1 to B.
//   B panel: for every 32 of depth two VNNI tiles of 16 columns; 32 columns x kDepthInL1 = 32 KiB stay in L1.
// Measured (Xeon with AMX, 2 cores, bf16): streaming loads of A +17%; kc = 768 instead of 384-512 -8 to -25%; prefetch
// of the next B sub-panel into L2 +5 to 25%, into L1 before the tile loads -5 to -45%. The four products take 64
// cycles, in which the vector units run the previous tile's epilogue.
#pragma once
#include "gemm/pack_bf16.h"
#include "gemm/sums_amx.h"
#include "simd/vec.h"

namespace llmfast::LLMFAST_TARGET {

struct Kernel {
  using Packed = bf16;
  static constexpr int kRows = 2 * kTileRows;
  static constexpr int kCols = 2 * kTileRows;
  static constexpr int kDepth = 32;
  static constexpr int64_t kFewRows = 64;
  static constexpr bool kFewRowsInBlock = true;
  static constexpr int64_t kDepthInL1 = 512;
  static constexpr int64_t kBlockBytes = 1100 << 10;
  static constexpr int64_t kFewRowsOfBlock = 16 * kRows;
  static_assert(kRows == kBlock && kCols == kBlock && kDepth == kBlock);

  static bool supports(DType dtype) { return dtype == DType::bf16; }
  static int64_t rows_worth_a_thread(int64_t) { return 16 * kRows; }
  static bool takes_rows(MatrixRef) { return false; }
  static bool takes_columns(MatrixRef) { return false; }

  using ThreadState = TileConfig;

  struct LeftPanel {
    const bf16* packed;
    const float* in_place;  // never
    int64_t ld;
    bool columns;
  };

  static void pack_a(bf16* dst, MatrixRef a, int64_t rows, int64_t depth) {
    for (int64_t k = 0; k < depth; k += kDepth, dst += kBlockElements) {
      const bf16* src = static_cast<const bf16*>(a.data) + k * a.col_stride;
      const int64_t count = depth - k < kDepth ? depth - k : kDepth;
      if (a.col_stride == 1) a_block_from_rows(dst, src, a.row_stride, rows, count);
      else if (a.row_stride == 1) a_block_from_columns(dst, src, a.col_stride, rows, count);
      else {
        alignas(64) bf16 block[kBlockElements];
        copy_block(block, src, a.row_stride, a.col_stride, rows, count);
        a_block_from_rows(dst, block, kBlock, kRows, kDepth);
      }
    }
  }

  static void pack_b(bf16* dst, MatrixRef b, int64_t cols, int64_t depth) { pack_vnni_panel(dst, b, cols, depth); }

  template <class Pending>
  static void multiply(LeftPanel left, int64_t, const bf16* b, int64_t depth, TileSums sums, const bf16* next_b,
                       int64_t next_count, Pending& pending) {
    const bf16* a = left.packed;
    const int64_t steps = depth / kDepth;
    const int64_t epilogue_rows = (pending.left() + steps - 1) / steps;
    const char* ahead = reinterpret_cast<const char*>(next_b);
    const int64_t lines = (next_count * int64_t{sizeof(bf16)} / 64 + steps - 1) / steps;  // cache lines a step
    const int64_t ahead_bytes = (lines < kMostLines ? lines : kMostLines) * 64;

    load_sums(sums.from, sums.from_stride);
    for (int64_t k = 0; k < steps; ++k) {
      tile_stream_load<kA>(a, kTileRowBytes);
      tile_load<kB>(b, kTileRowBytes);
      tile_dot<kSum, kA, kB>();
      tile_load<kB + 1>(b + kTileElements, kTileRowBytes);
      tile_dot<kSum + 1, kA, kB + 1>();
      pending.step(epilogue_rows);
      for (const char* end = ahead + ahead_bytes; ahead != end; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
      tile_stream_load<kA + 1>(a + kTileElements, kTileRowBytes);
      tile_dot<kSum + 2, kA + 1, kB>();
      tile_dot<kSum + 3, kA + 1, kB + 1>();
      a += kBlockElements;
      b += kBlockElements;
    }
    pending.finish();
    store_sums(sums.to, sums.to_stride);
  }

 private:
  static constexpr int kA = 4, kB = 6;      // tile numbers: 4-5 of A, 6-7 of B, beside the sums in 0-3
  static constexpr int64_t kMostLines = 8;  // prefetched a step: fill buffers are few, and tile loads need them
};

}  // namespace llmfast::LLMFAST_TARGET
