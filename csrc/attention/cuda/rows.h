// Rows of q, k, v and gradients on their way between global memory and 16-bit shared-memory tiles [kRows][kD] (swizzled
// as gemm/cuda/shared_tile.h says). The tile is zero beyond the head dim and beyond the last token.
#pragma once
#include "attention/cuda/tiles.h"
#include "gemm/cuda/shared_tile.h"
#include "ptx/convert.h"
#include "ptx/copy_async.h"
#include "ptx/memory.h"

namespace llmfast::cuda {

// Tensors whose rows are made of aligned 16-byte chunks; the others are read element by element.
struct Aligned {
  bool q, k, v, out, grad_out, grad_q, grad_k, grad_v;
};

inline bool rows_aligned(const HeadTensor& t, int64_t sequences, int64_t heads) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.token_stride % kChunk == 0 &&
         (heads == 1 || t.head_stride % kChunk == 0) && (sequences == 1 || t.sequence_stride % kChunk == 0);
}

// The first element of token `token` of a sequence.
template <class T>
__device__ T* row_of(const HeadTensor& t, int64_t sequence, int64_t head, int64_t token) {
  return static_cast<T*>(t.data) + sequence * t.sequence_stride + head * t.head_stride + token * t.token_stride;
}

// Starts the copy of rows from.. into the tile; `rows` of them exist, with D elements. kThreads work on it: the block,
// or one warp.
template <class T, int kRows, int kD, int kThreads>
__device__ void load_rows(uint32_t tile, const T* from, int64_t stride, int rows, int D, bool aligned) {
  constexpr int kRowChunks = kD / kChunk, kRowsAStep = kThreads / kRowChunks, kSteps = kRows / kRowsAStep;
  static_assert(kThreads % kRowChunks == 0 && kRows % kRowsAStep == 0);
  const int first = thread() % kThreads / kRowChunks, chunk = thread() % kRowChunks;
  const int cols = D - chunk * kChunk < 0 ? 0 : D - chunk * kChunk < kChunk ? D - chunk * kChunk : kChunk;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = first + i * kRowsAStep, count = row < rows ? cols : 0;
    const T* source = from + row * stride + chunk * kChunk;
    const uint32_t to = tile + chunk_offset<kD>(row, chunk);
    if (aligned) {
      copy_async_16(to, count > 0 ? source : from, count * 2);
    } else {
      Bytes16 bytes;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t low = 2 * w < count ? source[2 * w].bits : 0;
        const uint32_t high = 2 * w + 1 < count ? source[2 * w + 1].bits : 0;
        bytes.word[w] = low | high << 16;
      }
      store_shared(to, bytes);
    }
  }
}

// A warp's 16 rows of accumulators, scaled row by row, rounded to T, by way of its own 16 rows of a tile that nobody
// else reads any more. `rows` of the 16 exist.
template <class T, int kD>
__device__ void store_accumulators(SharedTile<kD> tile, int first_row, const float (&acc)[kD / 8][4],
                                   const float (&factor)[2], T* to, int64_t stride, int rows, int D, bool aligned) {
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kD / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_shared(tile.chunk(first_row + lane() / 4 + 8 * half, j) + lane() % 4 * 4,
                   pack_pair<T>(acc[j][2 * half] * factor[half], acc[j][2 * half + 1] * factor[half]));
  __syncwarp();
  constexpr int kRowChunks = kD / kChunk, kRowsAStep = kWarpSize / kRowChunks > 0 ? kWarpSize / kRowChunks : 1;
  static_assert(kRowChunks <= kWarpSize);
  const int chunk = lane() % kRowChunks, cols = D - chunk * kChunk;
  for (int row = lane() / kRowChunks; row < rows; row += kRowsAStep) {
    if (cols <= 0) break;
    const Bytes16 bytes = load_shared(tile.chunk(first_row + row, chunk));
    T* target = to + row * stride + chunk * kChunk;
    if (aligned && cols >= kChunk) {
      store(target, bytes);
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (i < cols) target[i] = T{static_cast<uint16_t>(bytes.word[i / 2] >> (i % 2 * 16))};
    }
  }
}

// ---- rows that hold NaN or infinity --------------------------------------------------------------------------------
// A hidden key has weight 0, but 0 * NaN would spoil the sums of queries that do not see it. Tiles that hide something
// are searched (a tile in which all is visible needs none of this); if there is a bad row, its contribution is added
// element by element where the weight is not 0, and the product runs over zeros instead.

template <class T>
constexpr uint32_t kExponent = 0x7f80u;
template <>
constexpr uint32_t kExponent<fp16> = 0x7c00u;

template <class T>
__device__ inline bool not_finite(Bytes16 bytes) {
  constexpr uint32_t kLow = kExponent<T>, kHigh = kLow << 16;
  bool bad = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) bad |= (bytes.word[i] & kLow) == kLow || (bytes.word[i] & kHigh) == kHigh;
  return bad;
}

// A tile belongs to the block, or to one warp.
template <int kThreads>
__device__ void wait_for_others() {
  if (kThreads == kWarpSize) __syncwarp();
  else __syncthreads();
}

// Whether this thread's share of the tile holds such a number.
template <class T, int kRows, int kD, int kThreads>
__device__ bool finds_bad_number(SharedTile<kD> tile) {
  bool bad = false;
#pragma unroll
  for (int i = thread() % kThreads; i < kRows * kD / kChunk; i += kThreads)
    bad |= not_finite<T>(load_shared(tile.address + i * 16));
  return bad;
}

// acc[rows of the warp][kD] += weights[rows][kRows] tile[kRows][kD] for the bad rows of the tile, which become zeros.
// All threads that share the tile call. flags: kRows ints of shared memory.
template <class T, int kRows, int kD, int kThreads>
__device__ __forceinline__ void add_bad_rows(SharedTile<kD> tile, int* flags, const float (&weights)[kRows / 8][4],
                                          float (&acc)[kD / 8][4]) {
  const int first = thread() % kThreads;
  for (int row = first; row < kRows; row += kThreads) {
    bool bad = false;
    for (int c = 0; c < kD / kChunk; ++c) bad |= not_finite<T>(load_shared(tile.chunk(row, c)));
    flags[row] = bad;
  }
  wait_for_others<kThreads>();
  for (int row = 0; row < kRows; ++row) {
    if (!flags[row]) continue;
    // weights[row / 8][2 * half + row % 2], by masks: an index known at run time would move the array to local memory.
    uint32_t bits[2] = {0, 0};
    const uint32_t odd = 0u - (row & 1);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t even_bits = __float_as_uint(weights[j][2 * half]);
        const uint32_t odd_bits = __float_as_uint(weights[j][2 * half + 1]);
        bits[half] |= ((odd_bits & odd) | (even_bits & ~odd)) & (row / 8 == j ? kAllLanes : 0u);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float w = __uint_as_float(__shfl_sync(kAllLanes, bits[half], lane() / 4 * 4 + row % 8 / 2));
      if (w == 0.0f) continue;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        float low, high;
        const Bytes16 bytes = load_shared(tile.chunk(row, j));
        const uint32_t left = lane() & 1 ? bytes.word[1] : bytes.word[0];
        const uint32_t right = lane() & 1 ? bytes.word[3] : bytes.word[2];
        unpack_pair<T>(lane() & 2 ? right : left, low, high);
        acc[j][2 * half] += w * low;
        acc[j][2 * half + 1] += w * high;
      }
    }
  }
  wait_for_others<kThreads>();
  for (int row = first / (kD / kChunk); row < kRows; row += kThreads / (kD / kChunk))
    if (flags[row]) store_shared(tile.chunk(row, first % (kD / kChunk)), Bytes16{{0, 0, 0, 0}});
  wait_for_others<kThreads>();
}

}  // namespace llmfast::cuda
