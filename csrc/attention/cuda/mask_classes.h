// What a mask tensor does to each tile of 128 queries by 128 keys, for the Hopper backward: tiles that it hides wholly
// are passed by, and only those that it changes are read element by element.
//
// A small kernel looks at the whole mask once and leaves a byte a tile in the workspace, twice: with the tiles of
// queries side by side for each tile of keys, and the other way round. Dimensions along which the mask does not move
// (stride 0) count once. What it hides: a boolean false, or a number below kHiddenBelow, -inf included: beside the lse
// of a row that passes a gradient, at least kNoGradient, its weight is 0 in float32 whatever the score.
#pragma once
#include "attention/attention.h"
#include "ptx/cuda.h"

namespace llmfast::cuda {

constexpr int kClassRows = 128;  // queries, and keys, of a tile
constexpr uint8_t kShows = 1;    // lets some query see some key
constexpr uint8_t kChanges = 2;  // hides something, or adds to a score
constexpr float kHiddenBelow = 4.0f * kNoGradient;

// Of the tiles along a row or column of them; without a mask tensor all of them show all.
struct Classes {
  const uint8_t* first;  // nullptr: no mask
  int step;

  __host__ __device__ uint8_t of_token(int token) const { return first ? first[token / kClassRows * step] : kShows; }
};

// Planes of the mask, and tiles of each: fewer than 2^31 in all.
struct MaskClasses {
  int sequences, heads;        // that differ
  int query_tiles, key_tiles;  // the former 1 if all queries are alike

  __host__ __device__ explicit MaskClasses(const AttentionParams& p)
      : sequences(p.mask.sequence_stride ? static_cast<int>(p.B) : 1),
        heads(p.mask.head_stride ? static_cast<int>(p.Hq) : 1),
        query_tiles(p.mask.query_stride ? static_cast<int>((p.Tq + kClassRows - 1) / kClassRows) : 1),
        key_tiles(static_cast<int>((p.Tk + kClassRows - 1) / kClassRows)) {}
  __host__ __device__ int64_t tiles() const { return int64_t{sequences} * heads * query_tiles * key_tiles; }
  int64_t floats() const { return (2 * tiles() + 3) / 4; }

  __host__ __device__ int plane(int sequence, int head) const {
    return (sequences > 1 ? sequence : 0) * heads + (heads > 1 ? head : 0);
  }
  // Of a tile of keys by tiles of queries, of which there may be one for all; and of a tile of queries by tiles of
  // keys.
  __host__ __device__ Classes of_keys(const uint8_t* all, int plane, int key_tile) const {
    return {all + (plane * key_tiles + key_tile) * query_tiles, query_tiles > 1 ? 1 : 0};
  }
  __host__ __device__ Classes of_queries(const uint8_t* all, int plane, int query_tile) const {
    return {all + tiles() + (plane * query_tiles + (query_tiles > 1 ? query_tile : 0)) * key_tiles, 1};
  }
  __host__ __device__ void note(uint8_t* all, int plane, int query_tile, int key_tile, uint8_t found) const {
    all[(plane * key_tiles + key_tile) * query_tiles + query_tile] = found;
    all[tiles() + (plane * query_tiles + query_tile) * key_tiles + key_tile] = found;
  }
};

}  // namespace llmfast::cuda
