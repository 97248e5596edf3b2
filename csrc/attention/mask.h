// Hiding keys, on score tiles that lie [key][lane] with one query row a lane: the band (causal, window) by comparing
// key numbers, the mask tensor by a tile of its values, transposed.
#pragma once
#include "attention/product.h"
#include "attention/tiles.h"
#include "gemm/epilogue.h"
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

// Mask values of one row for `count` keys from `key` on, as what to add to log2-domain scores. Finite values stay
// finite.
template <class T>
inline void load_mask_row(float* dst, const T* src, int64_t stride, int64_t count) {
  const Vec lowest = Vec::set(kLowest), hidden = Vec::set(-kInfinity);
  const auto convert = [&](Vec value) {
    const Vec scaled = value * Vec::set(kLog2E);
    return select(both(lt(scaled, lowest), gt(value, hidden)), lowest, scaled);
  };
  if (stride == 1) {
    for_each_vec(count, [&](int64_t j, auto lanes) { lanes.store(convert(lanes.load(src + j)), dst + j); });
  } else {
    for (int64_t j = 0; j < count; ++j) dst[j] = to_float(src[j * stride]);
    for_each_vec(count, [&](int64_t j, auto lanes) { lanes.store(convert(lanes.load(dst + j)), dst + j); });
  }
}
inline void load_mask_row(float* dst, const bool* src, int64_t stride, int64_t count) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) dst[j] = src[j] ? 0.0f : -kInfinity;
  } else {
    for (int64_t j = 0; j < count; ++j) dst[j] = src[j * stride] ? 0.0f : -kInfinity;
  }
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

constexpr int64_t kMostMaskKeys = 64;  // of a tile

// What the mask does to a tile of kWidth rows.
struct MaskTile {
  KeyRange keys;      // from the first to the last key that some row sees; empty: nothing is visible
  const float* bias;  // [key][kWidth] from keys.begin on: what to add to log2-domain scores, -inf: hidden; nullptr: nothing
};

// One float a lane, or one for all lanes, of each key: what bounds and classifies a tile.
struct MaskValues {
  const float* data;
  int64_t vecs;  // registers a key; 0: one float for all lanes

  bool hides(int64_t key) const { return all_are(-kInfinity, key); }
  bool adds_nothing(int64_t key) const { return all_are(0.0f, key); }

 private:
  bool all_are(float value, int64_t key) const {
    if (vecs == 0) return data[key] == value;
    Mask same = eq(Vec::load(data + key * vecs * Vec::kLanes), Vec::set(value));
    for (int64_t v = 1; v < vecs; ++v)
      same = both(same, eq(Vec::load(data + (key * vecs + v) * Vec::kLanes), Vec::set(value)));
    return all(same);
  }
};

// buffer[key][lane] = mask values of row first_row + lane, or of the last row where there are no more.
inline void load_mask_lanes(float* buffer, const HeadGroup& group, int64_t first_row, KeyRange keys, bool same_for_heads) {
  constexpr int kL = Vec::kLanes;
  const int64_t count = keys.count();
  float rows[kL][kMostMaskKeys + kL];
  for (int64_t lane = 0; lane < kWidth; lane += kL) {
    const float* row_of_lane[kL];
    int64_t before = -1;
    for (int i = 0; i < kL; ++i) {
      const int64_t row = first_row + lane + i < group.rows ? first_row + lane + i : group.rows - 1;
      const bool repeats =
          i > 0 && (row == before || (same_for_heads && group.query_of(row) == group.query_of(before)));
      if (!repeats) load_mask_row(rows[i], group, row, keys.begin, count);
      row_of_lane[i] = repeats ? row_of_lane[i - 1] : rows[i];
      before = row;
    }
    for (int64_t j = 0; j < count; j += kL) {
      Vec block[kL];
      for (int i = 0; i < kL; ++i) block[i] = Vec::load(row_of_lane[i] + j);
      transpose(block);
      for (int i = 0; i < kL && j + i < count; ++i) block[i].store(buffer + (j + i) * kWidth + lane);
    }
  }
}

// The tile of rows first_row .. first_row + kWidth and at most kMostMaskKeys keys. Its bounds move by multiples of `step`.
// `buffer` [key][kWidth] holds what has to be added.
inline MaskTile load_mask_tile(float* buffer, const HeadGroup& group, int64_t first_row, KeyRange keys, int64_t step = 1) {
  const MaskTensor& m = group.params.mask;
  if (!m.data) return {keys, nullptr};
  const int64_t count = keys.count();
  const bool same_for_heads = m.head_stride == 0 || group.group == 1, same_for_rows = same_for_heads && m.query_stride == 0;

  float row[kMostMaskKeys];
  if (same_for_rows) load_mask_row(row, group, first_row, keys.begin, count);
  else load_mask_lanes(buffer, group, first_row, keys, same_for_heads);
  const MaskValues values = same_for_rows ? MaskValues{row, 0} : MaskValues{buffer, kWidthVecs};

  int64_t begin = 0, end = count;
  while (begin < count && values.hides(begin)) ++begin;
  if (begin == count) return {{keys.begin, keys.begin}, nullptr};
  while (values.hides(end - 1)) --end;
  begin = begin / step * step;
  end = end + step - 1 < count ? (end + step - 1) / step * step : count;
  const KeyRange seen = {keys.begin + begin, keys.begin + end};
  bool adds_nothing = true;
  for (int64_t j = begin; j < end && adds_nothing; ++j) adds_nothing = values.adds_nothing(j);
  if (adds_nothing) return {seen, nullptr};
  if (same_for_rows)
    for (int64_t j = begin; j < end; ++j)
      for (int v = 0; v < kWidthVecs; ++v) Vec::set(row[j]).store(buffer + j * kWidth + v * Vec::kLanes);
  return {seen, buffer + begin * kWidth};
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
