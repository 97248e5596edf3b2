// Which keys matter to which queries, and which tile of which sequence a block works on. Host and device: tests check
// these against brute force.
#pragma once
#include "attention/attention.h"
#include "ptx/cuda.h"

namespace llmfast::cuda {

struct Span {
  int begin, end;

  __host__ __device__ bool empty() const { return begin >= end; }
  __host__ __device__ bool has(int i) const { return begin <= i && i < end; }
  __host__ __device__ bool contains(Span inner) const { return begin <= inner.begin && inner.end <= end; }
};

__host__ __device__ inline int clamped(int64_t value, int most) {
  return value < 0 ? 0 : value > most ? most : static_cast<int>(value);
}

// The band of one sequence: query i sees keys i + Tk - Tq - left .. i + Tk - Tq + right. Both ends grow with i, so the
// range of a block of queries follows from its first and last. Seen from the keys it is a band again.
struct Band {
  int Tq, Tk;
  int64_t left, right;

  __host__ __device__ Span keys_of(int query) const {
    const int64_t diagonal = int64_t{query} + Tk - Tq;
    return {clamped(diagonal - left, Tk), clamped(diagonal + right + 1, Tk)};
  }
  __host__ __device__ Band transposed() const { return {Tk, Tq, right, left}; }

  // Keys that some, or all, of the queries [first, end) see.
  __host__ __device__ Span seen_by_any(int first, int end) const {
    return {keys_of(first).begin, keys_of(end - 1).end};
  }
  __host__ __device__ Span seen_by_all(int first, int end) const {
    return {keys_of(end - 1).begin, keys_of(first).end};
  }
};

// One sequence: its tokens before it, and its lengths. Offsets of packed sequences come from the caller's device
// memory: whatever they hold, no access leaves the tensors, which have p.Tq and p.Tk tokens in all.
struct Sequence {
  int64_t index, first_q, first_k;
  int Tq, Tk;
};

__host__ __device__ inline Sequence sequence_of(const AttentionParams& p, int64_t index) {
  if (!p.first_q) return {index, 0, 0, static_cast<int>(p.Tq), static_cast<int>(p.Tk)};
  const int total_q = static_cast<int>(p.Tq), total_k = static_cast<int>(p.Tk);
  const int q = clamped(p.first_q[index], total_q), k = clamped(p.first_k[index], total_k);
  const int q_end = clamped(p.first_q[index + 1], total_q), k_end = clamped(p.first_k[index + 1], total_k);
  return {index, q, k, q_end > q ? q_end - q : 0, k_end > k ? k_end - k : 0};
}

// Tiles of `rows` tokens over all sequences. Packed: lengths are known on the device alone, so each sequence gets the
// tiles numbered first / rows + index up to the next sequence's, one more than it may need; those beyond its end are
// empty. Dense: as many as there are, the last first, because under a causal mask it is the longest.
__host__ __device__ inline int64_t tile_count(int64_t sequences, int64_t tokens, bool packed, int rows) {
  return packed ? tokens / rows + sequences : sequences * ((tokens + rows - 1) / rows);
}

struct TokenTile {
  int64_t sequence;
  int first;  // token of the sequence
};

// `first`: token offsets of packed sequences, or null; `tokens`: of each sequence, or packed of all.
__host__ __device__ inline TokenTile token_tile(int64_t index, int64_t sequences, int64_t tokens, const int64_t* first,
                                                int rows) {
  if (!first) {
    const int64_t tiles = (tokens + rows - 1) / rows;
    return {index / tiles, static_cast<int>((tiles - 1 - index % tiles) * rows)};
  }
  int64_t low = 0, high = sequences;  // the last sequence whose first tile is not after index
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (clamped(first[middle], static_cast<int>(tokens)) / rows + middle <= index) low = middle;
    else high = middle;
  }
  const int64_t tile = index - (clamped(first[low], static_cast<int>(tokens)) / rows + low);
  return {low, static_cast<int>(tile * rows)};
}

}  // namespace llmfast::cuda
