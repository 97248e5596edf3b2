// Getting rows of q, k, v and grad_out into the layouts that product.h multiplies, as float32, and results out again.
#pragma once
#include "attention/product.h"
#include "attention/tiles.h"
#include "gemm/epilogue.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Float32 rows of some keys (or queries), in scratch or in the tensor itself.
struct RowTile {
  const float* data;
  int64_t stride;

  RowTile from(int64_t row) const { return {data + row * stride, stride}; }
};

// Rows `keys` of k or v. Adjacent float32 rows are used in place; others go into buffer, [count][rounded_up(D,
// kLanes)]: rows that lie a token of all heads apart share few L1 sets, and a tile would evict itself.
inline RowTile load_keys(const HeadGroup& group, const HeadTensor& t, KeyRange keys, int64_t D, float* buffer) {
  if (t.dtype == DType::f32 && t.token_stride == D) return {group.key_row<const float>(t, keys.begin), D};
  const int64_t stride = rounded_up(D, Vec::kLanes);
  visit_float(t.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t j = 0; j < keys.count(); ++j) {
      const T* src = group.key_row<const T>(t, keys.begin + j);
      float* dst = buffer + j * stride;
      for_each_vec(D, [&](int64_t d, auto lanes) { lanes.load(src + d).store(dst + d); });
    }
  });
  return {buffer, stride};
}

// dst[i][0..stride) = row first + i, widened, zero beyond D and for rows that `absent` names or that do not exist.
template <class T, class Absent>
void load_rows(float* dst, int64_t stride, const HeadGroup& group, const HeadTensor& t, int64_t first, int64_t count,
               int64_t D, const Absent& absent) {
  for (int64_t i = 0; i < count; ++i) {
    float* out = dst + i * stride;
    int64_t filled = 0;
    if (first + i < group.rows && !absent(i)) {
      const T* src = group.row<const T>(t, first + i);
      for_each_vec(D, [&](int64_t d, auto lanes) { lanes.store(lanes.load(src + d), out + d); });
      filled = D;
    }
    for (int64_t d = filled; d < stride; ++d) out[d] = 0.0f;
  }
}

// dst[d][lane] = factor * src[lane][d] for kWidth rows that lie `stride` apart.
inline void transpose_rows(float* dst, const float* src, int64_t stride, int64_t D, float factor) {
  constexpr int kL = Vec::kLanes;
  const Vec scale = Vec::set(factor);
  for (int64_t d = 0; d < D; d += kL)
    for (int lane = 0; lane < kWidth; lane += kL) {
      Vec block[kL];
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) block[i] = Vec::load(src + (lane + i) * stride + d) * scale;
      transpose(block);
      for (int i = 0; i < kL && d + i < D; ++i) block[i].store(dst + (d + i) * kWidth + lane);
    }
}

// Rows first..first + kWidth of out or grad_q = the columns of src[D][kWidth], lane by lane times factor.
template <class T>
void store_lanes(const HeadGroup& group, const HeadTensor& t, int64_t first, const float* src, int64_t D,
                 const float* factor) {
  constexpr int kL = Vec::kLanes;
  for (int lane = 0; lane < kWidth && first + lane < group.rows; lane += kL) {
    const Vec scale = Vec::load(factor + lane);
    const int64_t rows = group.rows - first - lane < kL ? group.rows - first - lane : kL;
    T* out[kL];
    for (int64_t i = 0; i < rows; ++i) out[i] = group.row<T>(t, first + lane + i);
    for (int64_t d = 0; d < D; d += kL) {
      Vec block[kL];
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) block[i] = Vec::load(src + (d + i < D ? d + i : D - 1) * kWidth + lane) * scale;
      transpose(block);
      for (int64_t i = 0; i < rows; ++i) {
        if (d + kL <= D) block[i].store(out[i] + d);
        else block[i].store_n(out[i] + d, D - d);
      }
    }
  }
}

// Keys of a tile whose row holds NaN or inf. Where a query does not see such a key, 0 * NaN must not reach its sum: the
// product runs over `clean`, a copy whose bad rows are zero, and `add_bad_keys` adds these rows for the lanes that see
// them.
template <int kKeys>
struct BadKeys {
  int count = 0;
  int key[kKeys];
  RowTile clean;

  // clean_buffer: [kKeys][rounded_up(D, kLanes)]
  void find(RowTile tile, int64_t keys, int64_t D, float* clean_buffer) {
    count = 0;
    for (int64_t j = 0; j < keys; ++j) {
      Vec zeros = Vec::zero();  // x * 0 is NaN where x is not finite
      const float* row = tile.data + j * tile.stride;
      for_each_vec(D, [&](int64_t d, auto lanes) { zeros = fma(lanes.load(row + d), Vec::zero(), zeros); });
      const float sum = reduce_add(zeros);
      if (sum != sum) key[count++] = static_cast<int>(j);
    }
    clean = tile;
    if (count == 0) return;
    const int64_t stride = rounded_up(D, Vec::kLanes);
    int bad = 0;
    for (int64_t j = 0; j < keys; ++j) {
      const bool zero = bad < count && key[bad] == j;
      bad += zero;
      for (int64_t d = 0; d < D; ++d) clean_buffer[j * stride + d] = zero ? 0.0f : tile.data[j * tile.stride + d];
    }
    clean = {clean_buffer, stride};
  }

  // acc[d][lane] += weights[key][lane] * tile[key][d] for bad keys in [begin, end) and lanes whose weight is not zero.
  void add(RowTile tile, KeyRange keys, const float* weights, int64_t weights_stride, int64_t D, float* acc) const {
    for (int i = 0; i < count; ++i) {
      if (key[i] < keys.begin || key[i] >= keys.end) continue;
      const float* weight = weights + (key[i] - keys.begin) * weights_stride;
      const float* row = tile.data + key[i] * tile.stride;
      for (int lane = 0; lane < kWidth; ++lane)
        if (weight[lane] != 0.0f)
          for (int64_t d = 0; d < D; ++d) acc[d * kWidth + lane] += weight[lane] * row[d];
    }
  }
};

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
