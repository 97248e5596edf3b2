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

// Where all tiles are about as long, each unit is a section: neighbours share the most. Where lengths differ, as under
// a causal mask, a section lasts three rounds of the blocks, or their sums would differ (by half, where a head has
// about as many tiles as there are blocks); half as many where units are short, since a section's keys and values
// would outgrow the second-level cache before they are read again; four where tiles are `uneven`, their lengths not
// those of a straight line. Simulated: the longest sum is within 5% of the mean where there are many rounds of a length
// from 4096 on, mostly within 1%.
inline int forward_sections(int64_t units, int64_t group, int64_t tiles, bool lengths_differ, bool uneven,
                            int blocks) {
  if (!lengths_differ) return static_cast<int>(units);
  const int64_t works = tiles * group, least = uneven ? 4 * blocks : works >= 32 ? 3 * blocks : 3 * blocks / 2;
  const int64_t size = (least + works - 1) / works;
  return static_cast<int>(units > size ? units / size : 1);
}

}  // namespace llmfast::cuda
