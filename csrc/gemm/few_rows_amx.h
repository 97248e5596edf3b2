// Products with few rows of A on AMX, where B = W^T for a weight W[N,K] with contiguous rows. The tiles compute
//
//   C^T[N,M] = W[N,K] * A^T[K,M]
//
// for W's rows are a left operand as they lie in memory, while packing them as a right one (16 x 16 transposes of pairs)
// costs as much as multiplying them by 64 rows of A. Only A^T, which is small and stays in L1 or L2, is packed, in panels
// of 32 columns; every 32 x 32 tile of C^T is transposed in registers, between the next tile's products, and goes to the
// epilogue as rows of C.
//
// A thread owns groups of 32 rows of W:
//   up to kInPlacePanels panels of A^T   tiles of W are loaded from W itself, over all of K, with loads that leave L1 to A^T
//   more panels                          W is copied 32 rows x kc at a time into L1, A^T streams past it from L2
// and meanwhile reads the next group, or the next kc of this one, into L2, a line of some rows with every step of depth.
// Copies serve the rest, too: a group of fewer than 32 rows, and what K has beyond a multiple of 32; nothing beyond a row
// is read.
#pragma once
#include "gemm/few_rows_bf16.h"

namespace llmfast::LLMFAST_TARGET {

constexpr int64_t kGroup = Kernel::kCols;     // rows of W at a time, columns of C
constexpr int64_t kPanelRows = Kernel::kCols;  // rows of A in a panel of A^T
constexpr int64_t kTileOfC = kGroup * kPanelRows;
constexpr int64_t kInPlacePanels = 2;
static_assert(kGroup == kBlock && kPanelRows == kBlock, "blocks of two operand tiles");

// kGroup rows of W, `steps` times 32 of depth, as two tiles a step; then, if it is there, a block that ends the depth.
struct WeightTiles {
  const bf16* data;
  int64_t row_stride, tile_stride, step_stride;
  int64_t steps;
  const bf16* last_block;
};

// Rows of W to read ahead into L2, one line of each with every step.
struct WeightAhead {
  const bf16* data;
  int64_t row_stride, rows;

  // Inlined always: gcc 12 takes a function that only prefetches for one without effects, and drops its calls.
  __attribute__((always_inline)) void prefetch(int64_t step) const {
    const bf16* line = data + step * kBlock;
    for (int64_t i = 0; i < rows; ++i, line += row_stride) _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
  }
};

// A finished tile of C^T whose transpose and epilogue are still to run.
struct PendingColumns {
  const EpilogueRef* epilogue = nullptr;
  const float* tile = nullptr;
  int64_t m = 0, n = 0, cols = 0;
  int next = 0, rows = 0;
  alignas(64) float transposed[kTileRows * kGroup];

  int left() const { return rows - next; }

  // The next `count` rows of C, or what is left.
  void step(int count) {
    for (const int end = count < left() ? next + count : rows; next < end;) {
      const int half = next / kTileRows * kTileRows, in_half = next - half;
      if (in_half == 0) transpose_rows(half);
      const int now = end - next < kTileRows - in_half ? end - next : kTileRows - in_half;
      (*epilogue)(transposed + in_half * kGroup, m + next, n, now, cols);
      next += now;
    }
  }
  void finish() { step(left()); }

 private:
  // Rows [first, first + 16) of C from columns of the tile.
  void transpose_rows(int first) {
    for (int64_t j = 0; j < kGroup; j += kTileRows) {
      Vec r[Vec::kLanes];
      for (int64_t i = 0; i < kTileRows; ++i) r[i] = Vec::load(tile + (j + i) * kPanelRows + first);
      transpose(r);
      for (int64_t i = 0; i < kTileRows; ++i) r[i].store(transposed + i * kGroup + j);
    }
  }
};

// Sums in tiles 0-3, by rows of W and then of A; 4-5 hold W, 6-7 A^T.
constexpr int kW = 4, kX = 6;

template <bool kStream, int kTile>
inline void load_operand(const bf16* p, int64_t row_stride) {
  if constexpr (kStream) tile_stream_load<kTile>(p, row_stride * int64_t{sizeof(bf16)});
  else tile_load<kTile>(p, row_stride * int64_t{sizeof(bf16)});
}

// Adds 32 of depth: two tiles of W times kTilesOfX of A^T. between() runs in the products' shadow.
template <bool kInPlace, int kTilesOfX, class Between>
inline __attribute__((always_inline)) void add_step(const bf16* w, int64_t row_stride, int64_t tile_stride, const bf16* x,
                                                    const Between& between) {
  load_operand<kInPlace, kW>(w, row_stride);
  load_operand<!kInPlace, kX>(x, kBlock);
  tile_dot<0, kW, kX>();
  if constexpr (kTilesOfX == 2) {
    load_operand<!kInPlace, kX + 1>(x + kTileElements, kBlock);
    tile_dot<1, kW, kX + 1>();
  }
  between();
  load_operand<kInPlace, kW + 1>(w + tile_stride, row_stride);
  tile_dot<2, kW + 1, kX>();
  if constexpr (kTilesOfX == 2) tile_dot<3, kW + 1, kX + 1>();
}

// c_out[32][32] = (c_in or 0) + w * x, of which only the first 16 * kTilesOfX columns are computed.
template <bool kInPlace, int kTilesOfX>
void multiply_group(const WeightTiles& w, const bf16* x, const float* c_in, float* c_out, const WeightAhead& ahead,
                    PendingColumns& pending) {
  constexpr int64_t kStride = kPanelRows * int64_t{sizeof(float)}, kLower = kTileRows * kPanelRows;
  const int rows_a_step = static_cast<int>(w.steps ? (pending.left() + w.steps - 1) / w.steps : 0);
  if (c_in) {
    tile_stream_load<0>(c_in, kStride);
    tile_stream_load<2>(c_in + kLower, kStride);
    if constexpr (kTilesOfX == 2) {
      tile_stream_load<1>(c_in + kTileRows, kStride);
      tile_stream_load<3>(c_in + kLower + kTileRows, kStride);
    }
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  const bf16* data = w.data;
  for (int64_t step = 0; step < w.steps; ++step, data += w.step_stride, x += kBlockElements)
    add_step<kInPlace, kTilesOfX>(data, w.row_stride, w.tile_stride, x, [&] {
      pending.step(rows_a_step);
      ahead.prefetch(step);
    });
  if (w.last_block) add_step<kInPlace, kTilesOfX>(w.last_block, kBlock, kTileElements, x, [] {});
  pending.finish();
  tile_store<0>(c_out, kStride);
  tile_store<2>(c_out + kLower, kStride);
  if constexpr (kTilesOfX == 2) {
    tile_store<1>(c_out + kTileRows, kStride);
    tile_store<3>(c_out + kLower + kTileRows, kStride);
  }
}

// Columns `cols` of C, which begin at a group, on the calling thread, which holds tiles. xt: panels of A^T.
template <bool kInPlace>
void multiply_columns(const bf16* xt, MatrixRef weight, GemmSize size, Range cols, const EpilogueRef& epilogue) {
  const int64_t panels = (size.M + kPanelRows - 1) / kPanelRows, depth = padded_depth(size.K);
  const int64_t chunks = kInPlace ? 1 : (depth + Kernel::kDepthInL1 - 1) / Kernel::kDepthInL1;
  const int64_t chunk = round_up((depth + chunks - 1) / chunks, kBlock);
  bf16* const copied = workspace<bf16>(Slot::packed_a, kGroup * chunk);
  float* const tiles = workspace<float>(Slot::tile, (panels + 2) * kTileOfC);
  float* const finished[2] = {tiles + panels * kTileOfC, tiles + (panels + 1) * kTileOfC};
  int flip = 0;
  PendingColumns pending;
  alignas(64) bf16 last_block[kBlockElements];
  const auto at = [&](int64_t n, int64_t k) { return static_cast<const bf16*>(weight.offset(n, k).data); };
  const int64_t share = (kGroup + panels - 1) / panels;  // of the rows ahead, for each panel

  for (int64_t n = cols.begin; n < cols.end; n += kGroup) {
    const int64_t count = cols.end - n < kGroup ? cols.end - n : kGroup;
    for (int64_t k = 0; k < size.K; k += chunk) {
      const int64_t now = size.K - k < chunk ? size.K - k : chunk;
      WeightTiles w = {copied, kBlock, kTileElements, kBlockElements, padded_depth(now) / kBlock, nullptr};
      if (kInPlace && count == kGroup) {
        w = {at(n, k), weight.row_stride, kTileRows * weight.row_stride, kBlock, now / kBlock, nullptr};
        if (now % kBlock) {
          a_block_from_rows(last_block, at(n, k + now / kBlock * kBlock), weight.row_stride, kGroup, now % kBlock);
          w.last_block = last_block;
        }
      } else {
        Kernel::pack_a(copied, weight.offset(n, k), count, now);
      }
      const bool first = k == 0, last = k + now == size.K, more = !last || n + kGroup < cols.end;
      const bf16* const next = !more ? nullptr : last ? at(n + kGroup, 0) : at(n, k + chunk);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t m = panel * kPanelRows, rows = size.M - m < kPanelRows ? size.M - m : kPanelRows;
        const bool reads_ahead = more && panel * share < kGroup;
        const WeightAhead ahead = {next + panel * share * weight.row_stride, weight.row_stride, reads_ahead ? share : 0};
        float *const tile = tiles + panel * kTileOfC, *const out = last ? finished[flip] : tile;
        const auto multiply = rows > kTileRows ? multiply_group<kInPlace, 2> : multiply_group<kInPlace, 1>;
        multiply(w, xt + m * depth + k * kPanelRows, first ? nullptr : tile, out, ahead, pending);
        if (!last) continue;
        pending.epilogue = &epilogue;
        pending.tile = out;
        pending.m = m, pending.n = n, pending.cols = count;
        pending.next = 0, pending.rows = static_cast<int>(rows);
        flip ^= 1;
      }
    }
  }
  pending.finish();
}

inline void gemm_few_rows(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  if (size.M <= kDotRows) return gemm_by_dots<kDotRows>(a, b, size, epilogue);
  bf16* const xt = workspace<bf16>(Slot::packed_b, packed_b_elements(size.M, size.K));
  pack_b(xt, a.transposed(), size.M, size.K);
  const int threads = threads_for(size.M * size.N * size.K, 1 << 17);
  const auto multiply = size.M <= kInPlacePanels * kPanelRows ? multiply_columns<true> : multiply_columns<false>;
  for_each_part(threads, [&](int part) {
    Kernel::ThreadState state;
    (void)state;
    const Range cols = slice(size.N, part, threads, kGroup);
    if (cols.begin < cols.end) multiply(xt, b.transposed(), size, cols, epilogue);
  });
}

}  // namespace llmfast::LLMFAST_TARGET
