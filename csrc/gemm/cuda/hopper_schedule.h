// The order in which persistent blocks take the tiles of C, which tile size, and into how many parts the depth is cut,
// on compute capability 9.0. The choice is a function of the shape alone: a result does not depend on the GPU's size.
#pragma once
#include "gemm/cuda/schedule.h"

namespace llmfast::cuda {

constexpr int kHopperDepth = 64;  // of a step: a row of 128 bytes

// What a block does at a time: a tile and `steps` of depth from first_k on.
struct Work {
  int tile_m, tile_n, first_k, steps, part;
};

// Block b takes items b, b + gridDim.x, ...: all tiles of the first part, then of the next. Tiles go `raster` tile rows
// wide, column after column, so that the blocks in flight share operands in L2; the last group may be narrower.
struct Schedule {
  int tiles_m, tiles_n, parts, steps_a_part, steps, raster;

  __host__ __device__ Schedule(GemmShape shape, Parts depth, int tile_m, int tile_n, int raster_)
      : tiles_m(static_cast<int>(ceil_div(shape.M, tile_m))),
        tiles_n(static_cast<int>(ceil_div(shape.N, tile_n))),
        parts(static_cast<int>(depth.count)),
        steps_a_part(static_cast<int>(ceil_div(depth.depth, kHopperDepth))),
        steps(static_cast<int>(ceil_div(shape.K, kHopperDepth))),
        raster(raster_) {}

  __host__ __device__ int items() const { return tiles_m * tiles_n * parts; }
  __host__ __device__ Work at(int item) const {
    const int part = parts == 1 ? 0 : item / (tiles_m * tiles_n), index = item - part * tiles_m * tiles_n;
    const int group = index / (raster * tiles_n), first = group * raster;
    const int rows = tiles_m - first < raster ? tiles_m - first : raster, inside = index - first * tiles_n;
    const int first_step = part * steps_a_part, left = steps - first_step;
    return {first + inside % rows, inside / rows, first_step * kHopperDepth, left < steps_a_part ? left : steps_a_part,
            part};
  }
};

// 64x32 (of few rows), 128x128, 128x192 (of parts alone), 128x256
enum class HopperTileSize { narrow, large, middle, wide };
struct HopperPlan {
  HopperTileSize tile;
  int64_t parts, clocks;
};

// The cheapest tile size and a depth in one to sixteen parts, in clocks of a multiprocessor: rounds of tiles over a
// device of 132, each `step` clocks for 64 of depth and a fixed part for its ends, and, with several parts, their way
// through memory. On an H100 80GB HBM3 (benchmarks/native/hopper_gemm.cu, 2026-11-26, 1755 MHz) the model and the
// measurement, in microseconds: 65536x3072x768 436 and 443, 4096x4096x4096 173 and 182; 3072x768x65536 in seven parts
// of wide tiles 442 and 459.
//
// `may_be_narrow`: up to 64 rows are bound by the reading of B, and their blocks should be many, so that no second
// kernel is needed. A step of a narrow tile is 12 KB, 300 clocks by 40 bytes a clock and multiprocessor, which is what
// tiles of 128 x 256 get at full speed (48 KB in 1150 clocks); predicted, not measured.
constexpr HopperPlan hopper_plan(GemmShape s, bool may_cut, bool may_be_narrow = false) {
  constexpr int64_t kMultiprocessors = 132, kMostParts = 16, kAddClocks = 8000, kBytesAClock = 1600;
  struct Cost {
    HopperTileSize tile;
    int64_t m, n, step, ends, least_parts, most_parts;
  };
  constexpr Cost kCosts[] = {{HopperTileSize::wide, 128, 256, 1150, 2500, 1, kMostParts},
                             {HopperTileSize::middle, 128, 192, 870, 2200, 2, kMostParts},
                             {HopperTileSize::large, 128, 128, 640, 1500, 1, kMostParts},
                             {HopperTileSize::narrow, 64, 32, 300, 1500, 1, 1}};
  HopperPlan best{HopperTileSize::wide, 1, -1};
  for (const Cost& cost : kCosts) {
    if (cost.tile == HopperTileSize::narrow && (!may_be_narrow || s.M > cost.m)) continue;
    for (int64_t parts = cost.least_parts; parts <= (may_cut ? cost.most_parts : 1); ++parts) {
      if (parts > 1 && s.K < parts * kLeastDepth) break;
      const int64_t depth = ceil_div(ceil_div(s.K, parts), 64);
      if (parts > 1 && ceil_div(ceil_div(s.K, 64), depth) != parts) continue;  // the last would be empty
      const int64_t tiles = ceil_div(s.M, cost.m) * ceil_div(s.N, cost.n) * parts;
      int64_t clocks = ceil_div(tiles, kMultiprocessors) * (depth * cost.step + cost.ends);
      if (parts > 1) clocks += kAddClocks + 8 * parts * s.M * s.N / kBytesAClock;
      if (best.clocks < 0 || clocks < best.clocks) best = {cost.tile, parts, clocks};
    }
  }
  return best;
}

// Floats of scratch for the parts' sums; and for those of whichever product runs, this or gemm.h's.
constexpr int64_t hopper_parts_workspace(GemmShape s) {
  const int64_t parts = hopper_plan(s, true).parts;
  return parts > 1 ? parts * s.M * s.N : 0;
}
constexpr int64_t product_workspace(GemmShape s) {
  const int64_t portable = parts_workspace(s), hopper = hopper_parts_workspace(s);
  return portable > hopper ? portable : hopper;
}

}  // namespace llmfast::cuda
