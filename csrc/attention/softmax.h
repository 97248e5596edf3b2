// The steps between the two products, on score tiles [key][kWidth] with one query a lane: no step crosses lanes.
// Scores are in the log2 domain: the factor log2(e) is part of the scale that q was multiplied with.
#pragma once
#include "attention/mask.h"
#include "attention/product.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

// 2^x for x <= 0 as softmax needs it: everything below 2^-100 counts as 2^-100, so that products with it stay normal
// numbers (denormal results cost a microcode assist each). Hidden entries must be zeroed by the caller.
inline Vec exp2_of_gap(Vec x) { return exp2(max(Vec::set(-100.0f), x)); }

// tanh, relative error < 6e-7. An odd polynomial near 0, where (e - 1) / (e + 1) would cancel.
inline Vec tanh_of(Vec x) {
  const Vec a = abs(x), one = Vec::set(1.0f);
  const Vec e = exp2(a * Vec::set(2.0f * kLog2E));
  const Vec far = one - Vec::set(2.0f) / (e + one);
  const Vec square = x * x;
  Vec p = Vec::set(-0.00886323553f);
  p = fma(p, square, Vec::set(0.0218694885f));
  p = fma(p, square, Vec::set(-0.0539682540f));
  p = fma(p, square, Vec::set(0.133333333f));
  p = fma(p, square, Vec::set(-0.333333333f));
  const Vec near = fma(p * square, x, x);
  const Vec signed_far = select(lt(x, Vec::zero()), Vec::zero() - far, far);
  return select(lt(a, Vec::set(0.35f)), near, signed_far);
}

// What turns products into scores. Without softcap q carries scale * log2(e); with it, scale / softcap, and the score
// is softcap * log2(e) * tanh.
struct ScoreScale {
  float of_q, of_tanh;  // of_tanh 0: no softcap

  explicit ScoreScale(const AttentionParams& p)
      : of_q(p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2E),
        of_tanh(p.softcap > 0 ? p.softcap * kLog2E : 0.0f) {}
};

// What is hidden from a tile of kWidth rows: by the band, by the mask, by both or by neither.
struct Hiding {
  const LaneBand* band;    // kWidthVecs of them, or nullptr
  const float* mask_tile;  // MaskTile::bias

  bool any() const { return band || mask_tile; }
};

// score = tanh, mask, band; hidden ones become -inf.
inline void finish_scores(float* scores, int64_t keys, float of_tanh, const Hiding& hiding) {
  const Vec hidden = Vec::set(-kInfinity);
  for (int v = 0; v < kWidthVecs; ++v)
    for (int64_t j = 0; j < keys; ++j) {
      float* at = scores + j * kWidth + v * Vec::kLanes;
      Vec s = Vec::load(at);
      if (of_tanh != 0.0f) s = tanh_of(s) * Vec::set(of_tanh);
      if (hiding.mask_tile) {
        const Vec bias = Vec::load(hiding.mask_tile + j * kWidth + v * Vec::kLanes);
        s = select(eq(bias, hidden), hidden, s + bias);
      }
      if (hiding.band) s = select(hiding.band[v].sees(j), s, hidden);
      s.store(at);
    }
}

// Natural log of the sum of exp(score), from the highest log2-domain score and the sum relative to it; -inf for rows
// that saw nothing.
inline float natural_lse(float highest, float sum) {
  return sum == 0.0f ? -kInfinity : (highest + __builtin_log2f(sum)) * kLn2;
}

// Running maximum and sum of kWidth rows, and the factor by which the last tile shrank what was summed before it.
struct OnlineSoftmax {
  float highest[kWidth], sum[kWidth], keep[kWidth];

  void reset() {
    for (int lane = 0; lane < kWidth; ++lane) {
      highest[lane] = kLowest;  // not -inf: the gap between two of them is 0, and -inf - kLowest is still -inf
      sum[lane] = 0.0f;
    }
  }

  // scores -> 2^(score - highest), hidden ones -> 0.
  template <bool kHides>
  void update(float* scores, int64_t keys) {
    constexpr int kL = Vec::kLanes;
    const Vec hidden = Vec::set(-kInfinity);
    for (int v = 0; v < kWidthVecs; ++v) {
      float* const column = scores + v * kL;
      const Vec before = Vec::load(highest + v * kL);
      Vec top[4] = {before, before, before, before};
      int64_t j = 0;
      for (; j + 4 <= keys; j += 4)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) top[u] = max(Vec::load(column + (j + u) * kWidth), top[u]);
      for (; j < keys; ++j) top[0] = max(Vec::load(column + j * kWidth), top[0]);
      const Vec now = max(max(top[0], top[1]), max(top[2], top[3]));
      Vec total[2] = {Vec::zero(), Vec::zero()};
      const auto exponentiate = [&](int64_t key, int u) {
        const Vec s = Vec::load(column + key * kWidth);
        Vec p = exp2_of_gap(s - now);
        if (kHides) p = select(eq(s, hidden), Vec::zero(), p);
        p.store(column + key * kWidth);
        total[u] = total[u] + p;
      };
      for (j = 0; j + 2 <= keys; j += 2) {
        exponentiate(j, 0);
        exponentiate(j + 1, 1);
      }
      if (j < keys) exponentiate(j, 0);
      const Vec shrink = exp2_of_gap(before - now);
      now.store(highest + v * kL);
      shrink.store(keep + v * kL);
      fma(Vec::load(sum + v * kL), shrink, total[0] + total[1]).store(sum + v * kL);
    }
  }

  // 1 / sum, 0 for rows that saw nothing.
  void inverse(float* factor) const {
    for (int v = 0; v < kWidth; v += Vec::kLanes) {
      const Vec total = Vec::load(sum + v);
      select(eq(total, Vec::zero()), Vec::zero(), Vec::set(1.0f) / total).store(factor + v);
    }
  }

  float lse(int lane) const { return natural_lse(highest[lane], sum[lane]); }
};

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
