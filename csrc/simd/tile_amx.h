// AMX: eight tile registers of 16 rows x 64 bytes, and the product of bf16 tiles. One instruction a function; kernels
// contain no assembly. Tiles are numbered at compile time.
//
//   TileConfig                       every thread that touches tiles holds one, for the length of a parallel region
//   tile_load<t>(p, stride)          row r from p + r * stride bytes; rows of 64 bytes, best aligned to 64
//   tile_stream_load<t>(p, stride)   the same for data that lives in L2: displaces little of what is in L1
//   tile_store<t>(p, stride)   tile_zero<t>()
//   tile_dot<sum, a, b>()            sum[m][n] += sum over 16 pairs k of a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]
//
// The operands of tile_dot have the forms of bf16_blocks.h: a (16 x 32) holds rows of A as they are; b is in VNNI form: 16
// pairs of rows of B, each the 16 columns of two rows interleaved.
//
// Loads and stores are compiler barriers (gcc's own intrinsics are not), so memory is read and written in program
// order, and vector work written between tile instructions stays between them. Denormals are taken as zero.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "simd/bf16_blocks.h"

#ifdef LLMFAST_EMULATED
#include "simd/emulated/tiles.h"
#endif

namespace llmfast::LLMFAST_TARGET {

// Layout fixed by LDTILECFG; whatever is not set must be zero.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

#ifdef LLMFAST_EMULATED
inline void tile_configure(const TileShapes& shapes) { emulated::ldtilecfg(&shapes); }
inline void tile_release() { emulated::tilerelease(); }
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  emulated::tileloadd(kTile, p, stride);
}
template <int kTile>
inline void tile_stream_load(const void* p, int64_t stride) {
  emulated::tileloadd(kTile, p, stride);
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  emulated::tilestored(kTile, p, stride);
}
template <int kTile>
inline void tile_zero() {
  emulated::tilezero(kTile);
}
template <int kSum, int kA, int kB>
inline void tile_dot() {
  emulated::tdpbf16ps(kSum, kA, kB);
}
#else
// All 64 bytes are the operand: with gcc 12's _tile_loadconfig, which names 8, stores to the others may be dropped.
inline void tile_configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }
inline void tile_release() { __asm__ volatile("tilerelease" : : : "memory"); }
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_stream_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kSum, int kA, int kB>
inline void tile_dot() {
  static_assert(kSum != kA && kA != kB && kSum != kB, "the instruction faults on equal tiles");
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}
#endif

// The calling thread's tiles, all eight of 16 rows x 64 bytes, from construction to destruction. Does not nest. (The
// process must hold the permission that core/isa.cpp asks for; threads share it.)
class TileConfig {
 public:
  TileConfig() {
    TileShapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = kTileRowBytes;
      shapes.rows[i] = kTileRows;
    }
    tile_configure(shapes);
  }
  ~TileConfig() { tile_release(); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

}  // namespace llmfast::LLMFAST_TARGET
