// In which order the Hopper attention forward takes its work, and which block takes what. Host and device: tests check
// that each piece comes once, and that blocks get equal shares.
#pragma once
#include "attention/attention.h"
#include "ptx/cuda.h"

namespace llmfast::cuda {

// Pieces of work are tiles of queries, of each head. A unit is a key/value head of one sequence (packed: of all) with
// the `group` query heads that read it; units are taken in `sections`. In a section a tile of every head comes before
// the next tile of any: its pieces get longer or shorter slowly where the mask is causal, and neighbours share keys.
// The last section goes from the last, longest, tile to the first; the one before it the other way, so that lengths
// never jump, and so on.
struct ForwardOrder {
  int units, group, tiles, sections;

  struct Piece {
    int unit, head, tile;  // head: of the unit
  };

  __host__ __device__ int count() const { return units * group * tiles; }

  __host__ __device__ Piece at(int index) const {
    const int size = units / sections, larger = units % sections;  // the first `larger` sections have a unit more
    const int works = size * group * tiles, more = works + group * tiles;
    const bool in_larger = index < larger * more;
    const int past = in_larger ? index : index - larger * more;
    const int section = in_larger ? past / more : larger + past / works;
    const int rest = in_larger ? past % more : past % works, heads = (size + in_larger) * group;
    const int tile = rest / heads, head = rest % heads;
    const int first = section * size + (section < larger ? section : larger);
    return {first + head / group, head % group, (sections - section) % 2 == 1 ? tiles - 1 - tile : tile};
  }

  // Which piece block `block` of `blocks` takes in round `round`: there and back, so that no block gets the longer one
  // of each round. May be beyond the last.
  __host__ __device__ static int share(int round, int block, int blocks) {
    return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
  }
};

// Sections for units of `tokens` keys of `key_bytes` (K and V together). Where all tiles are about as long, each unit
// is one: neighbours share the most. Where lengths differ, as under a causal mask, a section is at least four rounds of
// the blocks, or their sums would differ, and as many units as leave their keys and values in the second-level cache.
inline int forward_sections(int64_t units, int64_t group, int64_t tiles, bool lengths_differ, int64_t tokens,
                            int64_t key_bytes, int blocks) {
  constexpr int64_t kRounds = 4, kCacheBytes = 40 << 20;
  if (!lengths_differ) return static_cast<int>(units);
  const int64_t work = tiles * group, least = (kRounds * blocks + work - 1) / work;
  const int64_t cached = kCacheBytes / (tokens * key_bytes + 1), size = least > cached ? least : cached;
  return static_cast<int>(units / size > 1 ? units / size : 1);
}

}  // namespace llmfast::cuda
