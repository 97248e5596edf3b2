// Which tile of C a block computes, how large tiles are, and into how many parts the depth is cut. All of it is a
// function of the shape alone, so that a result does not depend on the GPU's size.
#pragma once
#include <cstdint>

#include "ptx/cuda.h"

namespace llmfast::cuda {

struct GemmShape {
  int64_t M, N, K;
};

// Parts of the depth: part p covers [p * depth, (p + 1) * depth).
struct Parts {
  int64_t count, depth;
};

struct TileIndex {
  int64_t m, n;
};

constexpr int kRasterRows = 8;

// Blocks run in the order of their index: eight tile rows wide, column after column, so that the blocks that are in
// flight together share operands in L2. The last group may be narrower.
__host__ __device__ constexpr TileIndex tile_of(int64_t index, int64_t tiles_m, int64_t tiles_n) {
  const int64_t group = index / (kRasterRows * tiles_n);
  const int64_t first = group * kRasterRows, rows = tiles_m - first < kRasterRows ? tiles_m - first : kRasterRows;
  const int64_t inside = index - first * tiles_n;
  return {first + inside % rows, inside / rows};
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kFullDevice = 128;  // multiprocessors of a large GPU: 80 to 160
constexpr int64_t kLeastDepth = 512;  // of a part: below, the extra pass over C costs more than idle multiprocessors

// The tile that a block computes (see mainloop.h), and into how many parts the depth is cut: blocks share it, and a
// second kernel adds their sums in ascending order.
enum class TileSize { small, large, wide };
struct GemmPlan {
  TileSize tile;
  int64_t parts;
};

// The largest tile of which there are enough to fill a device as often as it holds them (one, two, four a
// multiprocessor; the wide ones at least twice, with little of the last column of tiles empty), if need be by cutting
// the depth: weight gradients have few tiles and a great depth.
constexpr GemmPlan gemm_plan(GemmShape s, bool may_cut) {
  const int64_t wide = ceil_div(s.M, 128) * ceil_div(s.N, 256), large = ceil_div(s.M, 128) * ceil_div(s.N, 128);
  const int64_t small = ceil_div(s.M, 64) * ceil_div(s.N, 64), most = may_cut ? s.K / kLeastDepth : 1;
  if (wide >= 2 * kFullDevice && (s.N >= 1024 || ceil_div(s.N, 128) % 2 == 0)) return {TileSize::wide, 1};
  if (large >= kFullDevice) return {TileSize::large, 1};
  if (large * most >= 2 * kFullDevice) return {TileSize::large, ceil_div(2 * kFullDevice, large)};
  const int64_t wanted = 4 * kFullDevice / (small > 0 ? small : 1), parts = wanted < most ? wanted : most;
  return {TileSize::small, parts < 2 ? 1 : parts};
}

// A part's depth, a multiple of 64.
__host__ __device__ constexpr int64_t part_depth(int64_t K, int64_t parts) {
  return ceil_div(ceil_div(K, parts), 64) * 64;
}

// Floats of scratch for the parts' sums.
constexpr int64_t parts_workspace(GemmShape s) {
  const int64_t parts = gemm_plan(s, true).parts;
  return parts > 1 ? parts * s.M * s.N : 0;
}

}  // namespace llmfast::cuda
