// GEMM micro-kernel for float32 matrices on AMX, by request (core/float32_products.h): each value is taken as the sum of two
// bfloat16, high + low, about 16 bits of its mantissa, and of the four products of halves all but low * low, which is below
// 2^-16 of the whole, are summed in float32.
//
// Blocks are those of kernel_amx.h, twice: where a panel has 32 x 32 values, it holds two tiles of high halves, then two of
// low ones. With the products in the order
//
//   low A * high B,   high A * high B,   high A * low B
//
// each step replaces one operand alone: eight loads for twelve products, where bfloat16 needs four for four. Matrices are
// split while they are packed: what is written and read again is as large as the float32 values.
//
// The halves of an infinity, and of what is beyond 3.39e38 and rounds to one, cancel: its row or column of C becomes NaN. Halves
// that are subnormal count as zero, as everywhere on AMX.
#pragma once
#include "gemm/pack_bf16.h"
#include "gemm/sums_amx.h"
#include "simd/vec.h"

namespace llmfast::LLMFAST_TARGET {

// Up to 32 lines of up to 32 values -> 32 x 32 halves each, zero beyond. high, low: aligned to 64.
inline void split_lines(bf16* high, bf16* low, const float* src, int64_t stride, int64_t lines, int64_t length) {
  const auto store = [](bf16* dst, __m512 first, __m512 second) {
    _mm512_store_si512(dst, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
  };
  const auto low_half = [](__m512 x) { return (Vec{x} - Vec{Vec::widen_bf16(Vec::narrow_bf16(x))}).v; };
  const __mmask16 first_lanes = Vec::first_lanes(length), second_lanes = Vec::first_lanes(length < 16 ? 0 : length - 16);
  int64_t line = 0;
  for (; line < lines; ++line, src += stride, high += kBlock, low += kBlock) {
    const __m512 first = _mm512_maskz_loadu_ps(first_lanes, src), second = _mm512_maskz_loadu_ps(second_lanes, src + 16);
    store(high, first, second);
    store(low, low_half(first), low_half(second));
  }
  for (; line < kBlock; ++line, high += kBlock, low += kBlock) {
    store(high, _mm512_setzero_ps(), _mm512_setzero_ps());
    store(low, _mm512_setzero_ps(), _mm512_setzero_ps());
  }
}

struct Kernel {
  // Room for both halves of a value, which do not lie side by side.
  struct Packed {
    bf16 halves[2];
  };
  static constexpr int kRows = 2 * kTileRows;
  static constexpr int kCols = 2 * kTileRows;
  static constexpr int kDepth = 32;
  static constexpr int64_t kFewRows = 16;  // in float32
  static constexpr bool kFewRowsInBlock = false;
  static constexpr int64_t kDepthInL1 = 256;
  static constexpr int64_t kBlockBytes = 1100 << 10;
  static constexpr int64_t kFewRowsOfBlock = 16 * kRows;
  static_assert(kRows == kBlock && kCols == kBlock && kDepth == kBlock);

  static bool supports(DType dtype) { return dtype == DType::f32; }
  static int64_t rows_worth_a_thread(int64_t) { return 16 * kRows; }
  static bool takes_rows(MatrixRef) { return false; }
  static bool takes_columns(MatrixRef) { return false; }

  using ThreadState = TileConfig;

  struct LeftPanel {
    const Packed* packed;
    const float* in_place;  // never
    int64_t ld;
    bool columns;
  };

  static void pack_a(Packed* dst, MatrixRef a, int64_t rows, int64_t depth) {
    for (int64_t k = 0; k < depth; k += kDepth, dst += kBlockElements) {
      const int64_t count = depth - k < kDepth ? depth - k : kDepth;
      bf16* const high = halves_of(dst);
      const MatrixRef block = a.offset(0, k);
      if (a.col_stride == 1) {
        split_lines(high, high + kBlockElements, values(block), a.row_stride, rows, count);
      } else {
        SplitBlock split;
        if (a.row_stride == 1) split.lines(values(block), a.col_stride, count, rows);
        else split.gathered(block.transposed(), count, rows);
        a_block_from_columns(high, split.high, kBlock, rows, count);
        a_block_from_columns(high + kBlockElements, split.low, kBlock, rows, count);
      }
    }
  }

  static void pack_b(Packed* dst, MatrixRef b, int64_t cols, int64_t depth) {
    for (int64_t k = 0; k < depth; k += kDepth, dst += kBlockElements) {
      const int64_t count = depth - k < kDepth ? depth - k : kDepth;
      bf16* const high = halves_of(dst);
      const MatrixRef block = b.offset(k, 0);
      SplitBlock split;
      if (b.row_stride == 1) {
        split.lines(values(block), b.col_stride, cols, count);
        b_block_from_columns(high, split.high, kBlock, count, cols);
        b_block_from_columns(high + kBlockElements, split.low, kBlock, count, cols);
      } else {
        if (b.col_stride == 1) split.lines(values(block), b.row_stride, count, cols);
        else split.gathered(block, count, cols);
        b_block_from_rows(high, split.high, kBlock, count, cols);
        b_block_from_rows(high + kBlockElements, split.low, kBlock, count, cols);
      }
    }
  }

  template <class Pending>
  static void multiply(LeftPanel left, int64_t, const Packed* packed_b, int64_t depth, TileSums sums, const Packed* next_b,
                       int64_t next_count, Pending& pending) {
    const bf16 *a = halves_of(left.packed), *b = halves_of(packed_b);
    const int64_t steps = depth / kDepth;
    const int64_t epilogue_rows = (pending.left() + steps - 1) / steps;
    const char* ahead = reinterpret_cast<const char*>(next_b);
    const int64_t lines = (next_count * int64_t{sizeof(Packed)} / 64 + steps - 1) / steps;  // cache lines a step
    const int64_t ahead_bytes = (lines < kMostLines ? lines : kMostLines) * 64;

    load_sums(sums.from, sums.from_stride);
    for (int64_t k = 0; k < steps; ++k, a += 2 * kBlockElements, b += 2 * kBlockElements) {
      const bf16 *const low_a = a + kBlockElements, *const low_b = b + kBlockElements;
      tile_stream_load<kA>(low_a, kTileRowBytes);
      tile_load<kB>(b, kTileRowBytes);
      tile_dot<kSum, kA, kB>();
      tile_load<kB + 1>(b + kTileElements, kTileRowBytes);
      tile_dot<kSum + 1, kA, kB + 1>();
      tile_stream_load<kA + 1>(low_a + kTileElements, kTileRowBytes);
      tile_dot<kSum + 2, kA + 1, kB>();
      tile_dot<kSum + 3, kA + 1, kB + 1>();
      pending.step(epilogue_rows);
      tile_stream_load<kA>(a, kTileRowBytes);
      tile_dot<kSum, kA, kB>();
      tile_dot<kSum + 1, kA, kB + 1>();
      tile_stream_load<kA + 1>(a + kTileElements, kTileRowBytes);
      tile_dot<kSum + 2, kA + 1, kB>();
      tile_dot<kSum + 3, kA + 1, kB + 1>();
      for (const char* end = ahead + ahead_bytes; ahead != end; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
      tile_load<kB>(low_b, kTileRowBytes);
      tile_dot<kSum, kA, kB>();
      tile_load<kB + 1>(low_b + kTileElements, kTileRowBytes);
      tile_dot<kSum + 1, kA, kB + 1>();
      tile_dot<kSum + 2, kA + 1, kB>();
      tile_dot<kSum + 3, kA + 1, kB + 1>();
    }
    pending.finish();
    store_sums(sums.to, sums.to_stride);
  }

 private:
  static constexpr int kA = 4, kB = 6;      // tile numbers: 4-5 of A, 6-7 of B, beside the sums in 0-3
  static constexpr int64_t kMostLines = 8;  // prefetched a step, as in kernel_amx.h

  // A block that was split as it lies and is still to be put in order.
  struct SplitBlock {
    alignas(64) bf16 high[kBlockElements], low[kBlockElements];

    void lines(const float* src, int64_t stride, int64_t count, int64_t length) {
      split_lines(high, low, src, stride, count, length);
    }
    // The same from a matrix with no unit stride: its rows are the lines.
    void gathered(MatrixRef m, int64_t rows, int64_t cols) {
      float block[kBlockElements];
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) block[i * kBlock + j] = values(m)[i * m.row_stride + j * m.col_stride];
      lines(block, kBlock, rows, cols);
    }
  };

  static const float* values(const MatrixRef& m) { return static_cast<const float*>(m.data); }
  static bf16* halves_of(Packed* p) { return p->halves; }
  static const bf16* halves_of(const Packed* p) { return p->halves; }
};

}  // namespace llmfast::LLMFAST_TARGET
