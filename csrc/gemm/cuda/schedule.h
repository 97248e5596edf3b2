// Which tile of C a block computes, how large tiles are, and into how many parts the depth is cut. All of it is a
// function of the shape alone, so that a result does not depend on the GPU's size.
#pragma once
#include <cstdint>

#include "ptx/cuda.h"

namespace llmfast::cuda {

struct GemmShape {
  int64_t M, N, K;
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

constexpr int64_t kFullDevice = 128;  // tiles that keep a large GPU busy: it has 80 to 160 multiprocessors
constexpr int64_t kLeastDepth = 512;  // of a part: below, the extra pass over C costs more than idle multiprocessors

// 128x128 tiles where they fill a device, 64x64 otherwise.
constexpr bool prefers_large_tiles(GemmShape s) { return ceil_div(s.M, 128) * ceil_div(s.N, 128) >= kFullDevice; }

// Parts of the depth, each a multiple of 64 long, summed in ascending order afterwards: for products with few tiles and
// great depth (weight gradients, few rows).
constexpr int64_t depth_parts(GemmShape s) {
  if (prefers_large_tiles(s)) return 1;
  const int64_t tiles = ceil_div(s.M, 64) * ceil_div(s.N, 64);
  const int64_t wanted = kFullDevice * 2 / (tiles > 0 ? tiles : 1), most = s.K / kLeastDepth;
  const int64_t parts = wanted < most ? wanted : most;
  return parts < 2 ? 1 : parts;
}
__host__ __device__ constexpr int64_t part_depth(int64_t K, int64_t parts) { return ceil_div(ceil_div(K, parts), 64) * 64; }

// Floats of scratch for the parts' sums.
constexpr int64_t parts_workspace(GemmShape s) {
  const int64_t parts = depth_parts(s);
  return parts > 1 ? parts * s.M * s.N : 0;
}

}  // namespace llmfast::cuda
