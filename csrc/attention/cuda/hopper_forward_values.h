// Values that hold NaN or infinity, in the Hopper attention forward (attention_fwd_sm90a.cu).
//
// A hidden key has weight 0, but 0 * NaN would spoil the sums of queries that do not see it. In tiles that hide
// something warps beside the producer look for such rows of V, while the consumers work on the scores; they note them
// in a bit mask and zero them. Consumers add a noted row's contribution, read from memory, where its weight is not 0.
#pragma once
#include "attention/cuda/hopper_forward.h"

namespace llmfast::cuda {

// Whether any element of the words of kSearchers' share of a tile is not finite: adding the exponent's lowest bit to an
// exponent of ones alone carries into the sign's place.
template <class T, class Tile>
__device__ __forceinline__ bool any_bad_value(uint32_t values, int searcher) {
  constexpr uint32_t kMask = kExponent<T> * 0x10001u, kOne = (kExponent<T> & -kExponent<T>) * 0x10001u;
  uint32_t carried = 0;
#pragma unroll 1
  for (int word = searcher; word < Tile::kWords; word += kSearchers)
#pragma unroll 1
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const uint32_t from = values + panel * Tile::kKeyPanel + word * 32 * 128 + lane() * 16;
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // four rows at a time
        const Bytes16 bytes = load_shared(word * 32 + i * 4 < Tile::kKeys ? from + i * 512 : values);
#pragma unroll
        for (int w = 0; w < 4; ++w) carried |= (bytes.word[w] & kMask) + kOne;
      }
    }
  return __any_sync(kAllLanes, (carried & 0x80008000u) != 0);
}

// Warp `searcher` of kSearchers looks through its share of a tile.
template <class T, class Tile>
__device__ __forceinline__ void search_values(uint32_t values, uint32_t bad_mask, int searcher) {
  if (!any_bad_value<T, Tile>(values, searcher)) {
    const int word = searcher + lane() * kSearchers;
    if (word < Tile::kWords) store_shared(bad_mask + word * 4, 0u);
    __syncwarp();
    return;
  }
  bool zeroed = false;
  for (int word = searcher; word < Tile::kWords; word += kSearchers) {
    uint32_t mask = 0;
#pragma unroll 1
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const uint32_t from = values + panel * Tile::kKeyPanel + word * 32 * 128 + lane() * 16;
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // four rows at a time
        const bool there = word * 32 + i * 4 < Tile::kKeys;
        const uint32_t found =
            __ballot_sync(kAllLanes, there && not_finite<T>(load_shared(there ? from + i * 512 : values)));
#pragma unroll
        for (int row = 0; row < 4; ++row)
          if (found >> 8 * row & 0xff) mask |= 1u << (4 * i + row);
      }
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      const uint32_t row = word * 32 + __ffs(static_cast<int>(rest)) - 1;
      for (int chunk = lane(); chunk < Tile::kPanels * 8; chunk += kWarpSize)
        store_shared(values + chunk / 8 * Tile::kKeyPanel + row * 128 + chunk % 8 * 16, Bytes16{{0, 0, 0, 0}});
      zeroed = true;
    }
    if (lane() == 0) store_shared(bad_mask + word * 4, mask);
  }
  if (zeroed) fence_async_proxy();
  __syncwarp();
}

// Eight neighbours of a row of D elements, zeros beyond its end.
template <class T>
__device__ __forceinline__ Bytes16 load_chunk(const T* row, int chunk, int D) {
  const T* from = row + chunk * kChunk;
  if (chunk * kChunk + kChunk <= D) return load<Bytes16>(from);
  Bytes16 bytes = {};
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    if (chunk * kChunk + j < D) bytes.word[j / 2] |= static_cast<uint32_t>(from[j].bits) << j % 2 * 16;
  return bytes;
}

// out += weights * (the noted rows of V); `values` is the first of the tile's rows in memory. Sparing with registers:
// out and weights hold most of them.
template <class T, class Tile>
__device__ __forceinline__ void add_bad_values(float (&out)[Tile::kD / 2], const float (&weights)[Tile::kKeys / 2],
                                               uint32_t bad_mask, const T* values, int64_t stride, int Dv) {
#pragma unroll 1
  for (int word = 0; word < Tile::kWords; ++word) {
    const Bytes16 words = load_shared(bad_mask + word / 4 * 16);
    const uint32_t low = word & 1 ? words.word[1] : words.word[0], high = word & 1 ? words.word[3] : words.word[2];
#pragma unroll 1
    for (uint32_t rest = word & 2 ? high : low; rest; rest &= rest - 1) {
      const int row = word * 32 + __ffs(static_cast<int>(rest)) - 1;
      // weights[row / 8 * 4 + 2 * half + row % 2], by masks: an index known at run time would need local memory.
      uint32_t bits[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 2; ++i)
        bits[i / 2 % 2] |= __float_as_uint(weights[i]) & (row / 8 == i / 4 && row % 2 == i % 2 ? kAllLanes : 0u);
      float w[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        w[half] = __uint_as_float(__shfl_sync(kAllLanes, bits[half], lane() / 4 * 4 + row % 8 / 2));
      const Bytes16 mine = load_chunk(values + row * stride, lane(), Dv);
#pragma unroll
      for (int j = 0; j < Tile::kD / kChunk; ++j) {  // chunk j is in lane j; this lane needs its word lane() % 4
        uint32_t pair = 0;
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const uint32_t taken = __shfl_sync(kAllLanes, mine.word[part], j);
          if (lane() % 4 == part) pair = taken;
        }
        float x[2];
        unpack_pair<T>(pair, x[0], x[1]);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (w[e / 2] != 0.0f) out[4 * j + e] += w[e / 2] * x[e % 2];
      }
    }
  }
}

}  // namespace llmfast::cuda
