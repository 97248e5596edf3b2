// Which way Hopper's backward goes: two kernels, or one pass with grad_q summed in memory (hopper_backward_joint.h), in
// turns or in any order; and the places and turns of the latter's blocks. Host and device: tests check these
// against brute force.
#pragma once
#include <atomic>

#include "attention/cuda/tiles.h"

namespace llmfast::cuda {

// ---- which way ------------------------------------------------------------------------------------------------------

// The same bits every time: kernels, in_turns. Faster for long sequences, with sums in an order that varies: any_order.
enum class BackwardWay { kernels, in_turns, any_order };

// For tests. 0: one pass wherever it can; kUnbounded: never; kByRule: see below.
constexpr int64_t kByRule = -1;
inline std::atomic<int64_t> one_pass_from{kByRule};
constexpr int64_t kLeastTurnKeys = 4096;      // fewer: waiting for turns costs what two products save
constexpr double kLeastAnyOrderQueries = 1024;  // that see a key: the sums cost the same however few there are
constexpr int64_t kLeastOnePassBlocks = 128;  // fewer leave multiprocessors idle, which grad_q's own kernel would use

// Of one head: others that share the key make more of everything, sums included.
inline double mean_queries_of_key(const AttentionParams& p) {
  constexpr int kSamples = 64;
  const Band band{static_cast<int>(p.Tq), static_cast<int>(p.Tk), p.left, p.right};
  double keys = 0;  // that a query sees
  for (int64_t i = 0; i < kSamples; ++i) {
    const Span seen = band.keys_of(static_cast<int>((2 * i + 1) * p.Tq / (2 * kSamples)));
    if (!seen.empty()) keys += static_cast<double>(seen.end - seen.begin) / kSamples;
  }
  return keys * static_cast<double>(p.Tq) / static_cast<double>(p.Tk);
}

// Nearly causal, nearly without a mask, or neither.
enum class Shape { triangle, full, band };
inline Shape shape_of(const AttentionParams& p, double queries_of_key) {
  const double part = queries_of_key / static_cast<double>(p.Tq);
  return part > 0.9 ? Shape::full : part > 0.45 && part < 0.6 ? Shape::triangle : Shape::band;
}

// Measured, H200, 2026-11-28, 16 heads, B x T = 16384, ms: two kernels, in turns (causal in sections of 528 blocks, else
// of 264), any order.   causal, 128 dims: 2k 0.925, 0.925, 0.831; 4k 1.606, 1.466, 1.401; 8k 2.96, 2.65, 2.49; 16k 5.92,
// 5.19, 5.01; four heads to a kv head 4k 3.30, 2.92, 2.82   full, 128 dims: 4k 2.71, 2.40, 2.64; 8k 5.63, 4.76, 5.05
// causal, 64 dims, in turns in sections of 264: 1k 0.354, 0.404, 0.349; 4k 0.954, 0.882, 0.810; 16k 3.25, 3.15, 2.54. Not
// measured: full masks of 64 dims, windows of thousands of keys, 64 dims in sections of 528.
inline BackwardWay backward_way(const AttentionParams& p) {
  if (p.first_q || p.mask.data || p.softcap > 0.0f || p.Tq == 0 || p.Tk == 0) return BackwardWay::kernels;
  const int64_t from = one_pass_from.load(std::memory_order_relaxed);
  if (from != kByRule)
    return from != 0 ? BackwardWay::kernels : p.any_order ? BackwardWay::any_order : BackwardWay::in_turns;
  if (p.B * p.Hkv * ((p.Tk + 127) / 128) < kLeastOnePassBlocks) return BackwardWay::kernels;
  const double mean = mean_queries_of_key(p);
  const Shape shape = shape_of(p, mean);
  const bool narrow = p.D <= 64 && p.Dv <= 64, is_long = p.Tk >= kLeastTurnKeys;
  const bool many = mean >= 4 * kLeastAnyOrderQueries;  // else blocks of keys are soon done but for waiting for turns
  if (shape == Shape::full && !narrow) return is_long && many ? BackwardWay::in_turns : BackwardWay::kernels;
  if (shape == Shape::triangle) {
    if (p.any_order && mean >= kLeastAnyOrderQueries) return BackwardWay::any_order;
    return is_long ? BackwardWay::in_turns : BackwardWay::kernels;
  }
  if (!many) return BackwardWay::kernels;
  if (p.any_order) return BackwardWay::any_order;
  return narrow ? BackwardWay::kernels : BackwardWay::in_turns;
}

// Of the heads that take turns beside each other: more make waits rarer, where all of a head's blocks begin with the
// same tile, and share the L2 cache among more.
inline int section_blocks(const AttentionParams& p) {
  return shape_of(p, mean_queries_of_key(p)) == Shape::triangle ? 528 : 264;
}

// ---- turns: blocks of keys that add to the same tiles of queries, one after another, ascending ----------------------

constexpr int kTurnQueries = 128;  // at which a block has one turn: a tile, or neighbours

// Places of blocks: a section of heads after another; in a section the first tiles of all heads, then the second ones.
struct BlockPlace {
  int tile, head;
};
__host__ __device__ inline BlockPlace block_place(int index, int tiles, int heads, int section) {
  const int first = index / (tiles * section) * section;
  const int inside = index - first * tiles, width = heads - first < section ? heads - first : section;
  return {inside / width, first + inside % width};
}

// The first block of keys that some query of the tile [first, first + queries) sees; the others follow without a gap.
__host__ __device__ inline int first_block_of_tile(const Band& band, int first, int queries, int block) {
  const int end = first + queries < band.Tq ? first + queries : band.Tq;
  return band.seen_by_any(first, end).begin / block;
}

// Tiles of queries that see some of the keys [first, end); `keys`: the band seen from the keys.
__host__ __device__ inline Span tiles_of_block(const Band& keys, int first, int end, int queries) {
  const Span seen = keys.seen_by_any(first, end);
  if (seen.empty() || keys.left + keys.right < 0) return {0, 0};
  return {seen.begin / queries, (seen.end + queries - 1) / queries};
}

}  // namespace llmfast::cuda
