// An operand of a product in global memory, and its way into shared memory.
//
// The operand is an mn x k matrix with any strides. Tiles of it are stored with the contiguous side as rows: k-major
// [mn][k] or mn-major [k][mn] (see shared_tile.h). Where that side has stride 1 and every row starts at a multiple of
// 16 bytes, chunks of 8 elements go by cp.async, zero-filled beyond the edge; otherwise element by element through
// registers, into the same layout.
#pragma once
#include "core/types.h"
#include "gemm/cuda/shared_tile.h"
#include "ptx/copy_async.h"
#include "ptx/memory.h"

namespace llmfast::cuda {

constexpr int kDepth = 32;  // of a tile

struct Operand {
  const void* data;
  int64_t stride_mn, stride_k;
  bool vector = false;  // tiles go by cp.async: set when the layout of the tiles is known

  // Whether rows along the contiguous side are made of whole, aligned 16-byte chunks.
  bool fits_chunks(Major major) const {
    const int64_t across = major == Major::k ? stride_mn : stride_k, along = major == Major::k ? stride_k : stride_mn;
    return along == 1 && across % kChunk == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
};

// A matrix [mn, k], or [k, mn].
inline Operand operand(const TensorView& t) { return {t.data, t.stride[0], t.stride[1]}; }
inline Operand operand_transposed(const TensorView& t) { return {t.data, t.stride[1], t.stride[0]}; }

// A thread's share of the copies of one operand: kSteps chunks a tile, kRowsAStep rows apart.
template <class T, Major kMajor, int kMn, int kThreads>
class OperandLoader {
 public:
  static constexpr int kRows = kMajor == Major::k ? kMn : kDepth;
  static constexpr int kCols = kMajor == Major::k ? kDepth : kMn;
  static constexpr int kBytes = kMn * kDepth * 2;

  // Tiles of rows first_mn.. of the operand, from depth `k` on; sizes are those of the whole operand.
  __device__ OperandLoader(const Operand& operand, int64_t first_mn, int64_t mn, int64_t k, int64_t depth_end)
      : vector_(operand.vector) {
    row_ = static_cast<int>(threadIdx.x) / kRowChunks;
    chunk_ = static_cast<int>(threadIdx.x) % kRowChunks;
    const int64_t mn_left = mn - first_mn, k_left = depth_end - k;
    rows_left_ = static_cast<int>((kMajor == Major::k ? mn_left : k_left) - row_);
    cols_left_ = static_cast<int>((kMajor == Major::k ? k_left : mn_left) - chunk_ * kChunk);
    row_stride_ = kMajor == Major::k ? operand.stride_mn : operand.stride_k;
    col_stride_ = kMajor == Major::k ? operand.stride_k : operand.stride_mn;
    safe_ = static_cast<const T*>(operand.data);
    source_ = safe_ + first_mn * operand.stride_mn + k * operand.stride_k + row_ * row_stride_ +
              chunk_ * kChunk * col_stride_;
  }

  // Starts the copy of the next tile of kDepth.
  __device__ void load_next(uint32_t tile) {
    const uint32_t target = tile + chunk_offset<kCols>(row_, chunk_);
    const int cols = cols_left_ < 0 ? 0 : cols_left_ < kChunk ? cols_left_ : kChunk;
    const auto for_each_chunk = [&](const auto& copy) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i)  // a multiple of 8 rows apart: the same swizzle
        copy(target + i * kRowsAStep * kCols * 2, source_ + i * kRowsAStep * row_stride_,
             rows_left_ > i * kRowsAStep ? cols : 0);
    };
    if (vector_)
      for_each_chunk([&](uint32_t to, const T* from, int count) {
        copy_async_16(to, count > 0 ? from : safe_, count * 2);
      });
    else
      for_each_chunk([&](uint32_t to, const T* from, int count) { copy_elements(to, from, count); });
    if (kMajor == Major::k) {
      source_ += kDepth * col_stride_;
      cols_left_ -= kDepth;
    } else {
      source_ += kDepth * row_stride_;
      rows_left_ -= kDepth;
    }
  }

 private:
  static constexpr int kRowChunks = kCols / kChunk;
  static constexpr int kSteps = kRows * kRowChunks / kThreads;
  static constexpr int kRowsAStep = kThreads / kRowChunks;
  static_assert(kThreads % kRowChunks == 0 && kRows * kRowChunks % kThreads == 0 && kRowsAStep % 8 == 0);

  __device__ void copy_elements(uint32_t to, const T* from, int count) const {
    Bytes16 chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < count ? from[2 * i * col_stride_].bits : 0;
      const uint32_t high = 2 * i + 1 < count ? from[(2 * i + 1) * col_stride_].bits : 0;
      chunk.word[i] = low | high << 16;
    }
    store_shared(to, chunk);
  }

  const T *source_, *safe_;
  int64_t row_stride_, col_stride_;
  int row_, chunk_, rows_left_, cols_left_;
  bool vector_;
};

}  // namespace llmfast::cuda
