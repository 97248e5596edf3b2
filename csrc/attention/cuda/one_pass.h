// Which of Hopper's two ways the backward goes: two kernels, or one pass with grad_q summed in memory
// (hopper_backward_joint.h), and the places and turns of the latter's blocks. Host and device: tests check these
// against brute force.
#pragma once
#include <atomic>

#include "attention/cuda/tiles.h"

namespace llmfast::cuda {

// ---- which way ------------------------------------------------------------------------------------------------------

// In one pass from so many queries on that see a key, on average, since its sums cost the same however few there are.
// 0: always, where it can; kUnbounded: never. Each way gives the same bits every time. Measured (16 heads, two kernels
// against one pass, ms; H200 unless said): causal 4k 1.60 and 1.51 (128 dims), 0.98 and 0.88 (64); causal 8k 2.95 and
// 2.75; full 4k 2.72 and 2.84; four heads to a kv head, causal 4k, 3.45 and 3.52; H100: 64 dims causal 16k (32 heads)
// 6.33 and 6.42.
inline std::atomic<int64_t> one_pass_from{2048};
constexpr int64_t kLeastOnePassKeys = 8192, kLeastTriangle = 4096;
constexpr int64_t kLeastOnePassBlocks = 128;  // fewer leave multiprocessors idle, which grad_q's own kernel would use

inline double mean_queries_of_key(const AttentionParams& p) {
  constexpr int kSamples = 64;
  const Band band{static_cast<int>(p.Tq), static_cast<int>(p.Tk), p.left, p.right};
  double keys = 0;  // that a query sees
  for (int64_t i = 0; i < kSamples; ++i) {
    const Span seen = band.keys_of(static_cast<int>((2 * i + 1) * p.Tq / (2 * kSamples)));
    if (!seen.empty()) keys += static_cast<double>(seen.end - seen.begin) / kSamples;
  }
  return keys * static_cast<double>(p.Tq) / static_cast<double>(p.Tk) * static_cast<double>(p.Hq / p.Hkv);
}

inline bool in_one_pass(const AttentionParams& p) {
  if (p.first_q || p.mask.data || p.softcap > 0.0f || p.Tq == 0 || p.Tk == 0) return false;
  const int64_t from = one_pass_from.load(std::memory_order_relaxed);
  if (from == 0) return true;
  if (p.Hq != p.Hkv || p.B * p.Hkv * ((p.Tk + 127) / 128) < kLeastOnePassBlocks) return false;
  const double mean = mean_queries_of_key(p), all = static_cast<double>(p.Tq);
  const bool triangle = mean > 0.45 * all && mean < 0.6 * all;  // nearly causal
  const bool narrow = p.D <= 64 && p.Dv <= 64;
  if (triangle) return p.Tk >= kLeastTriangle && !(narrow && p.Tk > kLeastOnePassKeys) && mean >= static_cast<double>(from);
  return !narrow && p.Tk >= kLeastOnePassKeys && mean >= static_cast<double>(2 * from);
}

// ---- turns: blocks of keys that add to the same tile of queries, one after another, ascending -----------------------

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
