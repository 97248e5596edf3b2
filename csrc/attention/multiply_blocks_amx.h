// Products of blocks on AMX tiles; the vector units are free meanwhile.
#pragma once
#include "simd/tile_amx.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

using BlockState = TileConfig;

// Four products of 16 cycles each from four loads, then `share` units of work.
template <Sum kSum, class Work>
inline __attribute__((always_inline)) void multiply_blocks(float* c, Blocks a, Blocks b, int64_t depth, Work& work,
                                                           int64_t share) {
  constexpr int64_t kStride = kBlock * int64_t{sizeof(float)};
  constexpr int64_t kLower = kTileRows * kBlock;
  if constexpr (kSum == Sum::fresh) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  } else {
    tile_load<0>(c, kStride);
    tile_load<1>(c + kTileRows, kStride);
    tile_load<2>(c + kLower, kStride);
    tile_load<3>(c + kLower + kTileRows, kStride);
  }
  for (int64_t i = 0; i < depth; ++i) {
    const bf16 *a_block = a.first + i * a.step, *b_block = b.first + i * b.step;
    tile_load<4>(a_block, kTileRowBytes);
    tile_load<6>(b_block, kTileRowBytes);
    tile_dot<0, 4, 6>();
    tile_load<7>(b_block + kTileElements, kTileRowBytes);
    tile_dot<1, 4, 7>();
    tile_load<5>(a_block + kTileElements, kTileRowBytes);
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
    work.step(share);
  }
  tile_store<0>(c, kStride);
  tile_store<1>(c + kTileRows, kStride);
  tile_store<2>(c + kLower, kStride);
  tile_store<3>(c + kLower + kTileRows, kStride);
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
