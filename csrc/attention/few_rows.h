// What attention of few query rows a head group has in common, forward and backward: rows of scores [row][kBlock], lanes along
// the keys; sums over keys of weighed rows, lanes along the head dim.
#pragma once
#include "attention/operands.h"
#include "attention/softmax.h"
#include "gemm/few_rows.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kBlock = 128;  // keys
static_assert(kBlock % Vec::kLanes == 0);

// Calls body(first row, Count<n>) so that counts of 4, and 3, 2 or 1 at the end, cover `rows`.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};
template <class Body>
inline void for_row_blocks(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) body(row, Count<4>{});
  switch (rows - row) {
    case 3: return body(row, Count<3>{});
    case 2: return body(row, Count<2>{});
    case 1: return body(row, Count<1>{});
  }
}

// body(Count<rows>) for 1 to kMost rows.
template <int kMost, class Body>
inline void with_count(int64_t rows, const Body& body) {
  if (rows == kMost) return body(Count<kMost>{});
  if constexpr (kMost > 1) with_count<kMost - 1>(rows, body);
}

// scores -> softcap * tanh, for `count` keys rounded up to registers; slopes, if given: 1 - tanh^2.
inline void cap(float* scores, int64_t count, float of_tanh, float* slopes = nullptr) {
  for (int64_t j = 0; j < count; j += Vec::kLanes) {
    const Vec t = tanh_of(Vec::load(scores + j));
    (t * Vec::set(of_tanh)).store(scores + j);
    if (slopes) fnma(t, t, Vec::set(1.0f)).store(slopes + j);
  }
}

// Mask and band for one row of scores of the keys of `block`; hidden ones, and those up to a whole register, become -inf.
inline void hide(float* scores, const HeadGroup& g, int64_t row, KeyRange block) {
  const int64_t count = block.count();
  if (g.params.mask.data) {
    float bias[kBlock];
    load_mask_row(bias, g, row, block.begin, count);
    for (int64_t j = 0; j < count; ++j) scores[j] = bias[j] == -kInfinity ? -kInfinity : scores[j] + bias[j];
  }
  const KeyRange seen = g.keys_of(row);
  for (int64_t j = 0; j < count && block.begin + j < seen.begin; ++j) scores[j] = -kInfinity;
  const int64_t end = seen.end < block.end ? seen.end - block.begin : count;
  for (int64_t j = end > 0 ? end : 0; j < rounded_up(count, Vec::kLanes); ++j) scores[j] = -kInfinity;
}

// Keys of a block by number, so that hidden ones are stepped over.
struct KeyList {
  int count = 0;
  int key[kBlock];

  void add(int64_t j) { key[count++] = static_cast<int>(j); }
};

// acc[r] = acc[r] * keep[r] + sum over listed keys of weights[r][key] * values[key], for kVecs registers of head dims.
template <int kRows, int kVecs, class T, class LastLanes>
inline void weigh_columns(const float* weights, const float* keep, const KeyList& list, const T* values, int64_t stride,
                          float* acc, int64_t acc_stride, LastLanes last) {
  constexpr int kL = Vec::kLanes;
  Vec sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec::zero();
  for (int i = 0; i < list.count; ++i) {
    const T* row = values + list.key[i] * stride;
    Vec weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weight[r] = Vec::set(weights[r * kBlock + list.key[i]]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const Vec x = v + 1 < kVecs ? Vec::load(row + v * kL) : last.load(row + v * kL);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][v] = fma(weight[r], x, sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      float* at = acc + r * acc_stride + v * kL;
      fma(Vec::load(at), Vec::set(keep[r]), sum[r][v]).store(at);
    }
}

// All Dv head dims of kRows rows; eight or, at the end, four independent sums at a time hide the latency of fma (twelve of
// three rows, or values would be passed over more often than for two rows and one).
template <int kRows, class T>
inline void weigh_values(const float* weights, const float* keep, const KeyList& list, const T* values, int64_t stride,
                         int64_t Dv, float* acc, int64_t acc_stride) {
  int64_t d = 0;
  const auto whole = [&](auto count) {
    constexpr int kVecs = decltype(count)::value, kStep = kVecs * Vec::kLanes;
    for (; d + kStep <= Dv; d += kStep)
      weigh_columns<kRows, kVecs>(weights, keep, list, values + d, stride, acc + d, acc_stride, AllLanes{});
  };
  whole(Count<kRows == 3 ? 4 : 8 / kRows>{});
  whole(Count<4 / kRows>{});
  for_each_vec(Dv - d, [&](int64_t i, auto lanes) {
    weigh_columns<kRows, 1>(weights, keep, list, values + d + i, stride, acc + d + i, acc_stride, lanes);
  });
}

// Keys that every row sees, and keys that only some do; what those hold may be NaN for the others.
struct SeenKeys {
  KeyList everyone, someone;
};

// weights [row][kBlock]: 0 where hidden, and nowhere else.
inline SeenKeys keys_seen(const HeadGroup& g, KeyRange block, const float* weights) {
  SeenKeys seen;
  bool all_see_all = !g.params.mask.data;
  for (int64_t r = 0; r < g.rows && all_see_all; ++r) all_see_all = contains(g.keys_of(r), block);
  for (int64_t j = 0; j < block.count(); ++j) {
    int64_t rows = 0;
    if (all_see_all) rows = g.rows;
    else
      for (int64_t r = 0; r < g.rows; ++r) rows += weights[r * kBlock + j] != 0.0f;
    if (rows > 0) (rows == g.rows ? seen.everyone : seen.someone).add(j);
  }
  return seen;
}

// acc[r] = acc[r] * keep[r] + sum over keys of factors[r][key] * values[key]; only rows with weights[r][key] != 0 see a key.
template <class T>
void add_weighed(const float* weights, const float* factors, const float* keep, const SeenKeys& seen, const T* values,
                 int64_t stride, int64_t rows, int64_t D, float* acc, int64_t acc_stride) {
  for_row_blocks(rows, [&](int64_t r, auto count) {
    weigh_values<decltype(count)::value>(factors + r * kBlock, keep + r, seen.everyone, values, stride, D,
                                         acc + r * acc_stride, acc_stride);
  });
  for (int i = 0; i < seen.someone.count; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t key = seen.someone.key[i];
      if (weights[r * kBlock + key] == 0.0f) continue;
      const Vec factor = Vec::set(factors[r * kBlock + key]);
      float* sum = acc + r * acc_stride;
      for_each_vec(D, [&](int64_t d, auto lanes) {
        fma(factor, lanes.load(values + key * stride + d), Vec::load(sum + d)).store(sum + d);
      });
    }
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
