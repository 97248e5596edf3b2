// GEMM micro-kernel on vector registers: outer products, one broadcast of A times two registers of B a row and step.
// Operands of any dtype are packed to float32. 6 x 2 accumulators of 16 registers, or 14 x 2 of 32, leave room for the
// two B registers and the broadcast; both FMA ports stay busy because 12 (28) independent chains cover the latency.
#pragma once
#include "gemm/gemm.h"
#include "simd/vec.h"

namespace llmfast::LLMFAST_TARGET {

// As much of a panel's depth as is whole registers, from rows that lie along it: kL x kL blocks through registers. Returns
// the depth. Inlined, so that `valid` is a constant where all lanes are there.
template <int kWidth, class T>
__attribute__((always_inline)) inline int64_t pack_transposed(float* dst, const T* src, int64_t lane_stride, int64_t valid,
                                                              int64_t depth) {
  constexpr int kL = Vec::kLanes;
  int64_t k = 0;
  for (; k + kL <= depth; k += kL)
    for (int lane = 0; lane < kWidth; lane += kL) {
      const int count = kWidth - lane < kL ? kWidth - lane : kL;
      Vec block[kL];
      for (int i = 0; i < kL; ++i)
        block[i] = i < count && lane + i < valid ? Vec::load(src + (lane + i) * lane_stride + k) : Vec::zero();
      transpose(block);
      for (int i = 0; i < kL; ++i) {
        float* out = dst + (k + i) * kWidth + lane;
        if (count == kL) block[i].store(out);
        else block[i].store_n(out, count);
      }
    }
  return k;
}

// Panel [depth][kWidth] from `valid` <= kWidth lanes of a strided matrix; absent lanes are zero.
template <int kWidth, class T>
void pack_panel(float* dst, const T* src, int64_t lane_stride, int64_t depth_stride, int64_t valid, int64_t depth) {
  constexpr int kL = Vec::kLanes;
  int64_t k = 0;
  if (lane_stride == 1 && valid == kWidth) {
    for (; k < depth; ++k) {
      const T* row = src + k * depth_stride;
      float* out = dst + k * kWidth;
      int lane = 0;
      for (; lane + kL <= kWidth; lane += kL) Vec::load(row + lane).store(out + lane);
      // The lanes beyond are there to be read as long as another row follows.
      constexpr int kRest = kWidth % kL;
      if (kRest == 0) continue;
      const bool whole = k + 1 < depth && depth_stride >= kL;
      (whole ? Vec::load(row + lane) : Vec::load_n(row + lane, kRest)).store_n(out + lane, kRest);
    }
    return;
  }
  if (lane_stride == 1) {
    for (; k < depth; ++k)
      for (int lane = 0; lane < kWidth; lane += kL) {
        const int64_t room = kWidth - lane < kL ? kWidth - lane : kL, there = valid - lane < room ? valid - lane : room;
        const T* row = src + k * depth_stride + lane;
        const Vec values = there == kL ? Vec::load(row) : there > 0 ? Vec::load_n(row, there) : Vec::zero();
        if (room == kL) values.store(dst + k * kWidth + lane);
        else values.store_n(dst + k * kWidth + lane, room);
      }
    return;
  }
  if (depth_stride == 1 && valid == kWidth) k = pack_transposed<kWidth>(dst, src, lane_stride, kWidth, depth);
  else if (depth_stride == 1) k = pack_transposed<kWidth>(dst, src, lane_stride, valid, depth);
  for (; k < depth; ++k)
    for (int lane = 0; lane < kWidth; ++lane)
      dst[k * kWidth + lane] = lane < valid ? to_float(src[lane * lane_stride + k * depth_stride]) : 0.0f;
}

template <int kWidth>
void pack_panel(float* dst, MatrixRef m, int64_t lane_stride, int64_t depth_stride, int64_t valid, int64_t depth) {
  switch (m.dtype) {
    case DType::bf16:
      return pack_panel<kWidth>(dst, static_cast<const bf16*>(m.data), lane_stride, depth_stride, valid, depth);
    case DType::f16:
      return pack_panel<kWidth>(dst, static_cast<const fp16*>(m.data), lane_stride, depth_stride, valid, depth);
    default:
      return pack_panel<kWidth>(dst, static_cast<const float*>(m.data), lane_stride, depth_stride, valid, depth);
  }
}

struct Kernel {
  using Packed = float;
  static constexpr int kVecs = 2;
  static constexpr int kRows = Vec::kRegisters == 32 ? 14 : 6;
  static constexpr int kCols = kVecs * Vec::kLanes;
  static constexpr int kDepth = 1;
  static constexpr int64_t kFewRows = 16;
  static constexpr bool kFewRowsInBlock = false;
  static constexpr int64_t kDepthInL1 = 256;
  static constexpr int64_t kBlockBytes = Vec::kRegisters == 32 ? 640 << 10 : 256 << 10;
  static constexpr int64_t kFewRowsOfBlock = kRows == 6 ? 288 : 16 * kRows;  // 6 rows: 1.1 to 1.35 times as fast from 128 on
  static_assert(kRows * kVecs + kVecs + 1 <= Vec::kRegisters);

  static bool supports(DType) { return true; }

  // Measured with 6 rows (2-core Zen 3): threads that each pack the columns of B they use are up to 1.12 times as fast as
  // threads that share rows and all of B, unless A is deep, which they would all read.
  static int64_t rows_worth_a_thread(int64_t K) { return (kRows == 6 && K <= 2048 ? 64 : 16) * kRows; }

  // Float32 rows that lie along the depth, unless so many begin in one set of the L1 cache (64 sets of 8 lines or more) that
  // they push each other out between one step and the next: rows 4 KiB apart all do, and are 1.3 times as fast packed.
  static bool takes_rows(MatrixRef a) {
    constexpr int kSets = 64, kWays = 8;
    constexpr int64_t kLine = 64 / sizeof(float);
    if (a.dtype != DType::f32 || a.col_stride != 1) return false;
    int rows_in_set[kSets] = {};
    for (int r = 0; r < kRows; ++r) {
      int& rows = rows_in_set[r * a.row_stride / kLine & (kSets - 1)];
      if (++rows > kWays) return false;
    }
    return true;
  }

  // Float32 columns, whose pieces are the steps of a packed panel as they lie, unless they meet in few sets of the L1 cache.
  static bool takes_columns(MatrixRef a) {
    return a.dtype == DType::f32 && a.row_stride == 1 && a.col_stride % 256 != 0;
  }

  struct ThreadState {};

  struct LeftPanel {
    const float* packed;
    const float* in_place;  // if not packed: the panel in A itself,
    int64_t ld;             // whose rows or, if `columns`, whose columns are contiguous and this far apart
    bool columns;
  };

  static void pack_a(float* dst, MatrixRef a, int64_t rows, int64_t depth) {
    pack_panel<kRows>(dst, a, a.row_stride, a.col_stride, rows, depth);
  }
  static void pack_b(float* dst, MatrixRef b, int64_t cols, int64_t depth) {
    pack_panel<kCols>(dst, b, b.col_stride, b.row_stride, cols, depth);
  }

  template <class Pending>
  static void multiply(LeftPanel a, int64_t rows, const float* b, int64_t depth, TileSums sums, const float* next_b,
                       int64_t next_share, Pending& pending) {
    pending.finish();
    if (sums.to_stride != kCols) prefetch_rows(sums);
    const PackedSteps packed{a.packed};
    if (a.in_place && a.columns) {
      multiply_tile<kRows>(ColumnSteps{a.in_place, a.ld}, b, depth, sums, NoLines{});
    } else if (a.in_place) {
      multiply_tile<kRows>(RowSteps{a.in_place, a.ld}, b, depth, sums, NoLines{});
    } else if (rows <= kThird) {
      multiply_tile<kThird>(packed, b, depth, sums, NoLines{});
    } else if (rows <= 2 * kThird) {
      multiply_tile<2 * kThird>(packed, b, depth, sums, NoLines{});
    } else if (next_share > 0) {
      multiply_tile<kRows>(packed, b, depth, sums, NextLines(next_b, next_share, depth));
    } else {
      multiply_tile<kRows>(packed, b, depth, sums, NoLines{});
    }
  }

 private:
  // Rows of C, which no hardware prefetcher foresees: where the depth is small, the stores would wait for most of them.
  __attribute__((always_inline)) static void prefetch_rows(const TileSums& sums) {
    constexpr int kLine = 64 / sizeof(float);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const float* row = sums.to + r * sums.to_stride;
#pragma GCC unroll 4
      for (int lane = 0; lane < kCols; lane += kLine) __builtin_prefetch(row + lane, 1, 3);
      __builtin_prefetch(row + kCols - 1, 1, 3);
    }
  }

  // A last panel of fewer rows is computed as a third or two thirds of a tile.
  static constexpr int kThird = (kRows + 2) / 3;

  // Where the kRows values of one step of depth lie.
  struct PackedSteps {
    const float* a;
    float at(int r) const { return a[r]; }
    void advance() { a += kRows; }
  };
  struct RowSteps {
    const float* a;
    int64_t ld;
    float at(int r) const { return a[r * ld]; }
    void advance() { ++a; }
  };
  struct ColumnSteps {
    const float* a;
    int64_t ld;
    float at(int r) const { return a[r]; }
    void advance() { a += ld; }
  };

  // What to read ahead into L2 before each kAheadStep steps of depth.
  static constexpr int64_t kAheadStep = 16;
  struct NoLines {
    static constexpr bool kAny = false;
    void prefetch() {}
  };
  struct NextLines {
    static constexpr bool kAny = true;
    static constexpr int64_t kLine = 64 / sizeof(float);
    const float* next;
    int64_t lines;

    NextLines(const float* next, int64_t count, int64_t depth)
        : next(next), lines((count * kAheadStep / depth + kLine - 1) / kLine) {}
    __attribute__((always_inline)) void prefetch() {
      for (int64_t i = 0; i < lines; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
    }
  };

  // Sums start at zero for each sub-panel and are added to sums.from at the end: blocked summation, whose rounding error is
  // that of a chain of kDepthInL1 terms instead of K. Kept out of line: inlined beside an epilogue, gcc spills acc.
  template <int kR, class A, class Ahead>
  __attribute__((noinline)) static void multiply_tile(A a, const float* b, int64_t depth, TileSums sums, Ahead ahead) {
    Vec acc[kR][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) acc[r][0] = acc[r][1] = Vec::zero();
    for (int64_t k = 0; k < depth;) {
      const int64_t end = Ahead::kAny && k + kAheadStep < depth ? k + kAheadStep : depth;
      ahead.prefetch();
#pragma GCC unroll 4
      for (; k < end; ++k) {
        const Vec b0 = Vec::load(b), b1 = Vec::load(b + Vec::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kR; ++r) {
          const Vec broadcast = Vec::set(a.at(r));
          acc[r][0] = fma(broadcast, b0, acc[r][0]);
          acc[r][1] = fma(broadcast, b1, acc[r][1]);
        }
        a.advance();
        b += kCols;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        const int64_t lane = v * Vec::kLanes;
        const Vec sum = sums.from ? acc[r][v] + Vec::load(sums.from + r * sums.from_stride + lane) : acc[r][v];
        sum.store(sums.to + r * sums.to_stride + lane);
      }
  }
};

}  // namespace llmfast::LLMFAST_TARGET
