// AMX tile registers and the instructions of AMX-TILE and AMX-BF16 as plain functions; simd/tile_amx.h calls them in a
// build with LLMFAST_EMULATE_ISA=1. Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
// What would raise #UD or #GP on the real machine aborts with a message. Stricter than the machine in one thing:
// loading a configuration while one is loaded aborts, for that is a kernel called inside another kernel's tile region.
#pragma once
#include "simd/emulated/avx512.h"

namespace llmfast::LLMFAST_TARGET::emulated {

struct TileRegisters {
  bool configured;
  uint16_t colsb[8];
  uint8_t rows[8];
  alignas(64) uint8_t data[8][16][64];  // zero outside rows x colsb
};
inline thread_local TileRegisters tile_registers = {};

inline TileRegisters& usable_tiles(const char* instruction) {
  if (!tile_registers.configured) {
    fprintf(stderr, "llmfast, emulated instruction: %s without a tile configuration on this thread\n", instruction);
    abort();
  }
  return tile_registers;
}

// config: byte 0 palette, 1 start row, 16 + 2 i colsb and 48 + i rows of tile i; all others reserved.
inline void ldtilecfg(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  TileRegisters& tiles = tile_registers;
  require(!tiles.configured, "LDTILECFG while a tile configuration is loaded on this thread");
  require(bytes[0] == 1, "LDTILECFG of a palette other than 1");
  for (int i = 1; i < 64; ++i)
    require(bytes[i] == 0 || (i >= 16 && i < 32) || (i >= 48 && i < 56), "LDTILECFG with a reserved byte set");
  for (int i = 0; i < 8; ++i) {
    __builtin_memcpy(&tiles.colsb[i], bytes + 16 + 2 * i, 2);
    tiles.rows[i] = bytes[48 + i];
    require(tiles.colsb[i] <= 64 && tiles.rows[i] <= 16 && (tiles.colsb[i] == 0) == (tiles.rows[i] == 0),
            "LDTILECFG with a tile larger than 16 rows of 64 bytes, or with rows and no columns");
  }
  __builtin_memset(tiles.data, 0, sizeof(tiles.data));
  tiles.configured = true;
}

inline void tilerelease() {
  __builtin_memset(&tile_registers, 0, sizeof(tile_registers));
}

inline void tilezero(int tile) {
  TileRegisters& tiles = usable_tiles("TILEZERO");
  __builtin_memset(tiles.data[tile], 0, sizeof(tiles.data[tile]));
}

inline void tileloadd(int tile, const void* base, int64_t stride) {
  TileRegisters& tiles = usable_tiles("TILELOADD");
  require(tiles.rows[tile] != 0, "TILELOADD of a tile with no rows");
  __builtin_memset(tiles.data[tile], 0, sizeof(tiles.data[tile]));
  for (int r = 0; r < tiles.rows[tile]; ++r)
    __builtin_memcpy(tiles.data[tile][r], static_cast<const char*>(base) + r * stride, tiles.colsb[tile]);
}

inline void tilestored(int tile, void* base, int64_t stride) {
  TileRegisters& tiles = usable_tiles("TILESTORED");
  require(tiles.rows[tile] != 0, "TILESTORED of a tile with no rows");
  for (int r = 0; r < tiles.rows[tile]; ++r)
    __builtin_memcpy(static_cast<char*>(base) + r * stride, tiles.data[tile][r], tiles.colsb[tile]);
}

// Even and odd products of a row are summed apart, then together, then added to the destination.
// Out of line and through memory, so that no arithmetic moves out from between the writes of MXCSR.
__attribute__((noinline)) inline void tdpbf16ps_flushing(TileRegisters* tiles, int sum, int a, int b) {
  const auto odd = [](__m512i v) { return (__m512)((__v16su)v & 0xffff0000u); };
  const auto even = [](__m512i v) { return (__m512)((__v16su)v << 16); };
  const int pairs = tiles->colsb[a] / 4;
  for (int m = 0; m < tiles->rows[sum]; ++m) {
    __m512 evens = {}, odds = {};
    for (int k = 0; k < pairs; ++k) {
      uint32_t pair;
      __builtin_memcpy(&pair, tiles->data[a][m] + 4 * k, 4);
      const __m512i left = set1_epi32(static_cast<int>(pair)), right = load_unaligned<__m512i>(tiles->data[b][k]);
      evens = fmadd_ps(even(left), even(right), evens);
      odds = fmadd_ps(odd(left), odd(right), odds);
    }
    const __m512 total = load_unaligned<__m512>(tiles->data[sum][m]) + (evens + odds);
    __builtin_memcpy(tiles->data[sum][m], &total, tiles->colsb[sum]);
  }
}

inline void tdpbf16ps(int sum, int a, int b) {
  TileRegisters& tiles = usable_tiles("TDPBF16PS");
  require(sum != a && a != b && sum != b, "TDPBF16PS with the same tile twice");
  require(tiles.rows[sum] == tiles.rows[a] && tiles.colsb[sum] == tiles.colsb[b] && tiles.colsb[a] == 4 * tiles.rows[b],
          "TDPBF16PS of tiles whose shapes do not fit");
  require(tiles.rows[sum] != 0 && tiles.rows[b] != 0 && tiles.colsb[sum] % 4 == 0, "TDPBF16PS of an unconfigured tile");
  flushing_denormals([&] { tdpbf16ps_flushing(&tiles, sum, a, b); });
}

}  // namespace llmfast::LLMFAST_TARGET::emulated
