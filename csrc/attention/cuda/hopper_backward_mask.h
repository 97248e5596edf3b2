// A mask tensor in the Hopper backward: the kernel that finds out what it does to each tile (mask_classes.h), and its
// elements for a thread's accumulators.
#pragma once
#include "attention/cuda/mask_classes.h"
#include "attention/cuda/scores.h"
#include "core/cuda_launch.h"

namespace llmfast::cuda {

// What becomes of products before they are weights: only the scale; a softcap; a boolean mask hides some; a floating
// one is added.
enum class Scoring { plain, capped, hidden, added };
__host__ __device__ constexpr bool is_masked(Scoring scoring) {
  return scoring == Scoring::hidden || scoring == Scoring::added;
}

__device__ inline bool hides(bool visible) { return !visible; }
__device__ inline bool hides(float value) { return value < kHiddenBelow; }
__device__ inline bool changes(bool visible) { return !visible; }
__device__ inline bool changes(float value) { return !(value == 0.0f); }

template <class M>
__device__ inline auto mask_element_at(const char* at) {
  if constexpr (sizeof(M) == 1) return *at != 0;
  else return to_float(*reinterpret_cast<const M*>(at));
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

constexpr int kClassThreads = 256;

template <class M>
__device__ void look_at_mask(const char* first, int64_t query_stride, int64_t key_stride, int queries, int keys,
                             bool& shows, bool& changed) {
  const int key = thread() % kClassRows;  // neighbours read neighbours
  if (key >= keys) return;
#pragma unroll 8
  for (int query = thread() / kClassRows; query < queries; query += kClassThreads / kClassRows) {
    const auto element = mask_element_at<M>(first + query * query_stride + key * key_stride);
    shows |= !hides(element), changed |= changes(element);
  }
}

// A block a tile.
__global__ void __launch_bounds__(kClassThreads) classify_mask_kernel(const AttentionParams p, uint8_t* classes) {
  const MaskClasses c(p);
  const int key_tile = static_cast<int>(blockIdx.x % c.key_tiles);
  const int query_tile = static_cast<int>(blockIdx.x / c.key_tiles % c.query_tiles);
  const int plane = static_cast<int>(blockIdx.x) / (c.key_tiles * c.query_tiles);
  const int first_query = query_tile * kClassRows, first_key = key_tile * kClassRows;
  const int Tq = p.mask.query_stride ? static_cast<int>(p.Tq) : 1, Tk = static_cast<int>(p.Tk);
  const int queries = Tq - first_query < kClassRows ? Tq - first_query : kClassRows;
  const int keys = Tk - first_key < kClassRows ? Tk - first_key : kClassRows;
  const char* const first = mask_element(p, plane / c.heads, plane % c.heads, first_query, first_key);
  const int64_t bytes = size_of(p.mask.dtype), query_stride = p.mask.query_stride * bytes;
  const int64_t key_stride = p.mask.key_stride * bytes;
  bool shows = false, changed = false;
  switch (p.mask.dtype) {
    case DType::boolean: look_at_mask<uint8_t>(first, query_stride, key_stride, queries, keys, shows, changed); break;
    case DType::bf16: look_at_mask<bf16>(first, query_stride, key_stride, queries, keys, shows, changed); break;
    case DType::f16: look_at_mask<fp16>(first, query_stride, key_stride, queries, keys, shows, changed); break;
    default: look_at_mask<float>(first, query_stride, key_stride, queries, keys, shows, changed);
  }
  const bool any_shows = __syncthreads_or(shows), any_changes = __syncthreads_or(changed);
  if (thread() != 0) return;
  const uint8_t found = static_cast<uint8_t>((any_shows ? kShows : 0) | (any_changes ? kChanges : 0));
  c.note(classes, plane, query_tile, key_tile, found);
}

inline void launch_mask_classes(const AttentionParams& p, const Stream& stream, uint8_t* classes) {
  launch(stream, {static_cast<unsigned>(MaskClasses(p).tiles())}, kClassThreads, 0, classify_mask_kernel, p, classes);
}

// ---- elements of a tile that the mask changes -----------------------------------------------------------------------

// A thread's elements of accumulators [64][kColumns], of two rows (ptx/warpgroup.h): a bit for each that is hidden.
// Where the mask adds, `start` gets what the products are to be added to: mask / scale, which the scale then makes the
// mask again, and 0 where it hides. Columns that do not exist stay visible, with 0.
template <class M, int kColumns>
__device__ __forceinline__ void read_mask(const MaskRows& mask, int first_column, float scale,
                                          uint32_t (&hidden)[kColumns / 64], float (&start)[kColumns / 2]) {
  const int column = first_column + lane() % 4 * 2;
  const float inverse_scale = 1.0f / scale;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const char* at = mask.row[half] + column * mask.column_stride;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j, at += 8 * mask.column_stride)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = 4 * j + 2 * half + e;
        const bool exists = column + 8 * j + e < mask.columns;
        const auto element = mask_element_at<M>(exists ? at + e * mask.column_stride : mask.row[half]);
        const bool hides_it = exists && hides(element);
        hidden[i / 32] |= static_cast<uint32_t>(hides_it) << i % 32;
        if constexpr (sizeof(M) > 1) start[i] = exists && !hides_it ? element * inverse_scale : 0.0f;
      }
  }
}

template <Scoring kScoring, int kColumns>
__device__ __forceinline__ void read_mask(const MaskRows& mask, int first_column, float scale,
                                          uint32_t (&hidden)[kColumns / 64], float (&start)[kColumns / 2]) {
  if constexpr (kScoring == Scoring::hidden) {
    read_mask<uint8_t, kColumns>(mask, first_column, scale, hidden, start);
  } else {
    switch (mask.dtype) {
      case DType::bf16: return read_mask<bf16, kColumns>(mask, first_column, scale, hidden, start);
      case DType::f16: return read_mask<fp16, kColumns>(mask, first_column, scale, hidden, start);
      default: return read_mask<float, kColumns>(mask, first_column, scale, hidden, start);
    }
  }
}

// Whether element `i` of those accumulators is hidden: by the mask, or because its column, counted from the thread's
// first, is outside the row's range.
template <int kWords>
__device__ __forceinline__ bool is_hidden(const uint32_t (&hidden)[kWords], const Span& visible, int i) {
  return !visible.has(i / 4 * 8 + i % 2) || (hidden[i / 32] >> i % 32 & 1) != 0;
}

}  // namespace llmfast::cuda
