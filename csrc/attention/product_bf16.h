// What attention's bf16 kernels share beside products of 32 x 32 blocks: rows brought into operand blocks, and P^T or dS^T,
// 32 queries a row in two registers, rounded into operand blocks.
//
// Block layouts, 32 x 32 each: bf16 operands as simd/bf16_blocks.h says (two tiles of 16 rows, or in VNNI form of 16
// columns); float32 results as rows of 32 floats, so a score block is [key][kWidth] as mask.h and softmax.h want it.
#pragma once
#include "attention/multiply_blocks.h"
#include "attention/operands.h"
#include "attention/softmax.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

static_assert(kWidth == kBlock, "a panel of query rows fills the lanes of two registers and the columns of two tiles");

constexpr int64_t blocks_of(int64_t count) { return (count + kBlock - 1) / kBlock; }

// The smallest range of whole blocks around `keys`.
inline KeyRange whole_blocks(KeyRange keys) { return {keys.begin / kBlock * kBlock, blocks_of(keys.end) * kBlock}; }

// ---- operands ------------------------------------------------------------------------------------------------------

// dst[i][0 .. blocks * 32) = row first + i for a panel of kWidth rows; zero beyond D, and for rows that `absent` names
// or that do not exist.
template <class Absent>
void copy_panel(bf16* dst, const HeadGroup& group, const HeadTensor& t, int64_t first, int64_t D,
                const Absent& absent) {
  const int64_t blocks = blocks_of(D);
  for (int64_t i = 0; i < kWidth; ++i, dst += blocks * kBlock) {
    const bool there = first + i < group.rows && !absent(first + i);
    const bf16* src = there ? group.row<const bf16>(t, first + i) : nullptr;
    for (int64_t d = 0; d < blocks * kBlock; d += kBlock) {
      const __mmask32 lanes = first_bf16_lanes(D - d);
      _mm512_store_si512(dst + d, there ? _mm512_maskz_loadu_epi16(lanes, src + d) : _mm512_setzero_si512());
    }
  }
}

// How many keys or dims of a block there are.
inline int64_t at_most_a_block(int64_t left) { return left < kBlock ? left : kBlock; }

// A blocks of the keys' rows, K: dst[key block][d block][key][d]. `keys` are whole blocks; what lies beyond Tk is zero.
inline void pack_key_rows(bf16* dst, const HeadGroup& group, const HeadTensor& t, KeyRange keys, int64_t D) {
  for (int64_t key = keys.begin; key < keys.end; key += kBlock)
    for (int64_t d = 0; d < D; d += kBlock, dst += kBlockElements)
      a_block_from_rows(dst, group.key_row<const bf16>(t, key) + d, t.token_stride, at_most_a_block(group.Tk - key),
                        at_most_a_block(D - d));
}

// A blocks of the keys' columns, V^T: dst[key block][d block][d][key].
inline void pack_key_columns(bf16* dst, const HeadGroup& group, const HeadTensor& t, KeyRange keys, int64_t D) {
  for (int64_t key = keys.begin; key < keys.end; key += kBlock)
    for (int64_t d = 0; d < D; d += kBlock, dst += kBlockElements)
      a_block_from_columns(dst, group.key_row<const bf16>(t, key) + d, t.token_stride, at_most_a_block(D - d),
                           at_most_a_block(group.Tk - key));
}

// Elements from the first of a row of blocks in VNNI form to the given pair of keys: 16 pairs fill the first of two
// tiles.
constexpr int64_t pair_offset(uint64_t pair) {
  return static_cast<int64_t>(pair * kBlock + pair / kTileRows * kTileElements);
}

// Keys whose row holds NaN or inf. Where a query does not see such a key, 0 * NaN must not reach its sum: in blocks
// made by pack_key_columns their columns are set to zero, and `add` adds these rows for the queries that see them.
template <int kKeys>
class BadColumns {
 public:
  // packed: pack_key_columns(packed, group, t, keys, D)
  void find_and_clear(bf16* packed, const HeadGroup& group, const HeadTensor& t, KeyRange keys, int64_t D) {
    count_ = 0;
    const int64_t end = keys.end < group.Tk ? keys.end : group.Tk;
    for (int64_t key = keys.begin; key < end; key += kBlock) {
      const int64_t rows = at_most_a_block(end - key);
      if (finite(group.key_row<const bf16>(t, key), t.token_stride, rows, D)) continue;
      for (int64_t j = key; j < key + rows; ++j)
        if (!finite(group.key_row<const bf16>(t, j), 0, 1, D)) {
          key_[count_++] = j;
          bf16* column = packed + (key - keys.begin) * blocks_of(D) * kBlock + (j - key);
          for (int64_t d = 0; d < blocks_of(D) * kBlock; ++d) column[d * kBlock] = bf16{0};
        }
    }
  }

  // sums[d][kWidth] += weights[key][..] * row of key, for bad keys in `keys` and queries whose weight is not zero.
  // weights: blocks of 32 keys in VNNI form, as store_pair makes them.
  void add(float* sums, const bf16* weights, const HeadGroup& group, const HeadTensor& t, KeyRange keys,
           int64_t D) const {
    for (int64_t i = 0; i < count_; ++i) {
      if (key_[i] < keys.begin || key_[i] >= keys.end) continue;
      const int64_t j = key_[i] - keys.begin;
      const bf16* pair = weights + pair_offset(j / 2) + j % 2;
      const bf16* row = group.key_row<const bf16>(t, key_[i]);
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const float weight = to_float(pair[lane / kTileRows * kTileElements + lane % kTileRows * 2]);
        if (weight == 0.0f) continue;
        for (int64_t d = 0; d < D; ++d) sums[d * kWidth + lane] += weight * to_float(row[d]);
      }
    }
  }

 private:
  // Adding one to an exponent of all ones carries into the (cleared) sign bit.
  static bool finite(const bf16* first, int64_t stride, int64_t rows, int64_t D) {
    const __m512i exponents = _mm512_set1_epi32(0x7f807f80), one = _mm512_set1_epi32(0x00800080);
    __m512i carries = _mm512_setzero_si512();
    for (int64_t d = 0; d < D; d += kBlock) {
      const __mmask32 lanes = first_bf16_lanes(D - d);
      for (int64_t i = 0; i < rows; ++i) {
        const __m512i x = _mm512_maskz_loadu_epi16(lanes, first + i * stride + d);
        carries = _mm512_or_si512(carries, _mm512_add_epi32(_mm512_and_si512(x, exponents), one));
      }
    }
    const __m512i signs = _mm512_and_si512(carries, _mm512_set1_epi32(static_cast<int>(0x80008000)));
    return _mm512_cmpneq_epi32_mask(signs, _mm512_setzero_si512()) == 0;
  }

  int64_t count_ = 0;
  int64_t key_[kKeys];
};

// ---- weights -------------------------------------------------------------------------------------------------------

// 2^x for what is then rounded to bf16: relative error 7.5e-5, a 25th of the rounding's. Clamped as in exp2_of_gap; NaN
// stays NaN.
inline Vec coarse_exp2(Vec x) {
  x = max(Vec::set(-100.0f), x);
  const Vec n = round_even(x), f = x - n;
  Vec p = Vec::set(0.0551716736f);
  p = fma(p, f, Vec::set(0.242611122f));
  p = fma(p, f, Vec::set(0.693260995f));
  p = fma(p, f, Vec::set(0.999928069f));
  return scale_exp2(p, n);
}

// x0 .. x15 y0 .. y15 as bf16.
inline __m512i narrow_bf16(Vec x, Vec y) { return (__m512i)_mm512_cvtne2ps_pbh(y.v, x.v); }

// A row of an A block: 32 queries of one key.
inline void store_row(bf16* row, Vec low, Vec high) { _mm512_store_si512(row, narrow_bf16(low, high)); }

// Two keys of a block in VNNI form; even[v], odd[v]: queries 16 v .. 16 v + 15. `pair` points to the first tile's row.
inline void store_pair(bf16* pair, const Vec (&even)[kWidthVecs], const Vec (&odd)[kWidthVecs]) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_store_si512(pair, _mm512_permutexvar_epi16(order, narrow_bf16(even[0], odd[0])));
  _mm512_store_si512(pair + kTileElements, _mm512_permutexvar_epi16(order, narrow_bf16(even[1], odd[1])));
}

// What score blocks need before they are exponentiated, unless they are plain: turns products into log2-domain scores,
// hidden ones into -inf.
inline void finish_products(float* scores, int64_t keys, const ScoreScale& scale, const Hiding& hiding) {
  const Vec factor = Vec::set(scale.of_q);
  for (int64_t i = 0; i < keys * kWidth; i += Vec::kLanes) (Vec::load(scores + i) * factor).store(scores + i);
  finish_scores(scores, keys, scale.of_tanh, hiding);
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
