// The 32 x 32 sums of a GEMM tile in AMX's tiles 0 to 3, by rows of 16 x 16.
#pragma once
#include "simd/tile_amx.h"

namespace llmfast::LLMFAST_TARGET {

constexpr int kSum = 0;

// From c, rows ldc apart; nullptr: zeros.
inline void load_sums(const float* c, int64_t ldc) {
  if (!c) {
    tile_zero<kSum>();
    tile_zero<kSum + 1>();
    tile_zero<kSum + 2>();
    tile_zero<kSum + 3>();
    return;
  }
  const int64_t stride = ldc * int64_t{sizeof(float)};
  const float* lower = c + kTileRows * ldc;
  tile_stream_load<kSum>(c, stride);
  tile_stream_load<kSum + 1>(c + kTileRows, stride);
  tile_stream_load<kSum + 2>(lower, stride);
  tile_stream_load<kSum + 3>(lower + kTileRows, stride);
}

inline void store_sums(float* c, int64_t ldc) {
  const int64_t stride = ldc * int64_t{sizeof(float)};
  float* lower = c + kTileRows * ldc;
  tile_store<kSum>(c, stride);
  tile_store<kSum + 1>(c + kTileRows, stride);
  tile_store<kSum + 2>(lower, stride);
  tile_store<kSum + 3>(lower + kTileRows, stride);
}

}  // namespace llmfast::LLMFAST_TARGET
