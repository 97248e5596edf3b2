// Hiding keys, on score tiles that lie [key][lane] with one query row a lane: the band (causal, window) by comparing
// key numbers, the mask tensor by a tile of its values, transposed.
#pragma once
#include "attention/tiles.h"
#include "simd/math.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLowest = -3.40282347e38f;  // log2-domain score that no finite one is below

// Keys visible to kLanes rows, counted from a tile's first key. Lanes without a row see nothing.
struct LaneBand {
  Vec begin, end;

  LaneBand(const HeadGroup& group, int64_t first_row, int64_t first_key) {
    float begins[Vec::kLanes], ends[Vec::kLanes];
    int64_t query = group.query_of(first_row), rows_of_query = first_row % group.group;
    for (int lane = 0; lane < Vec::kLanes; ++lane) {
      const KeyRange keys = first_row + lane < group.rows ? group.keys_of_query(query) : KeyRange{0, 0};
      begins[lane] = clamped(keys.begin - first_key);
      ends[lane] = clamped(keys.end - first_key);
      if (++rows_of_query == group.group) {
        rows_of_query = 0;
        ++query;
      }
    }
    begin = Vec::load(begins);
    end = Vec::load(ends);
  }

  Mask sees(int64_t key) const {
    const Vec j = Vec::set(static_cast<float>(key));
    return both(ge(j, begin), lt(j, end));
  }

 private:
  static float clamped(int64_t key) { return static_cast<float>(key < -1 ? -1 : key > (1 << 20) ? (1 << 20) : key); }
};

enum class MaskKind {
  all_hidden,  // nothing in the tile is visible
  mixed,       // the tile holds what to add to log2-domain scores, -inf: hidden
  all_visible  // adds nothing
};

// Mask values of one row for `count` keys from `key` on, as what to add to log2-domain scores. Finite values stay
// finite.
template <class T>
inline void load_mask_row(float* dst, const T* src, int64_t stride, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const float value = to_float(src[j * stride]);
    const float scaled = value * kLog2E;
    dst[j] = scaled < kLowest && value > -kInfinity ? kLowest : scaled;
  }
}
inline void load_mask_row(float* dst, const bool* src, int64_t stride, int64_t count) {
  for (int64_t j = 0; j < count; ++j) dst[j] = src[j * stride] ? 0.0f : -kInfinity;
}
inline void load_mask_row(float* dst, const HeadGroup& group, int64_t row, int64_t key, int64_t count) {
  const MaskTensor& m = group.params.mask;
  const int64_t offset = group.sequence * m.sequence_stride + group.head_of(row) * m.head_stride +
                         group.query_of(row) * m.query_stride + key * m.key_stride;
  switch (m.dtype) {
    case DType::boolean: return load_mask_row(dst, static_cast<const bool*>(m.data) + offset, m.key_stride, count);
    case DType::bf16: return load_mask_row(dst, static_cast<const bf16*>(m.data) + offset, m.key_stride, count);
    case DType::f16: return load_mask_row(dst, static_cast<const fp16*>(m.data) + offset, m.key_stride, count);
    default: return load_mask_row(dst, static_cast<const float*>(m.data) + offset, m.key_stride, count);
  }
}

// tile[key][lane], row stride `stride`, for keys.count() keys and `lanes` (a multiple of kLanes) rows from first_row
// on.
inline MaskKind load_mask_tile(float* tile, int64_t stride, const HeadGroup& group, int64_t first_row, int64_t lanes,
                               KeyRange keys) {
  constexpr int kL = Vec::kLanes;
  constexpr int64_t kChunk = 64;  // keys at a time, so that the rows to transpose stay in L1
  bool hidden = false, visible = false, biased = false;
  float rows[kL][kChunk + kL];
  for (int64_t lane = 0; lane < lanes; lane += kL)
    for (int64_t j0 = 0; j0 < keys.count(); j0 += kChunk) {
      const int64_t count = keys.count() - j0 < kChunk ? keys.count() - j0 : kChunk;
      for (int i = 0; i < kL; ++i) {
        const int64_t row = first_row + lane + i;
        if (row < group.rows) load_mask_row(rows[i], group, row, keys.begin + j0, count);
        else for (int64_t j = 0; j < count; ++j) rows[i][j] = -kInfinity;
        for (int64_t j = count; j < count + kL; ++j) rows[i][j] = 0.0f;
        if (row >= group.rows) continue;
        for (int64_t j = 0; j < count; ++j) {
          hidden |= rows[i][j] == -kInfinity;
          visible |= rows[i][j] != -kInfinity;
          biased |= rows[i][j] != 0.0f;
        }
      }
      for (int64_t j = 0; j < count; j += kL) {
        Vec block[kL];
        for (int i = 0; i < kL; ++i) block[i] = Vec::load(rows[i] + j);
        transpose(block);
        for (int i = 0; i < kL && j + i < count; ++i) block[i].store(tile + (j0 + j + i) * stride + lane);
      }
    }
  return !visible ? MaskKind::all_hidden : biased || hidden ? MaskKind::mixed : MaskKind::all_visible;
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
