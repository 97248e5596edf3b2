// The vector half of the backward in bf16 blocks: a square of 32 keys x 32 query rows, from the products S^T and dP^T to the
// weights P^T = 2^(S^T - lse) and dS^T = P^T * (dP^T - delta) (* 1 - tanh^2), as bf16 operand blocks.
#pragma once
#include "attention/product_bf16.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kKeys = 64;  // of a tile
constexpr int64_t kRows = 64;  // of a block
constexpr int64_t kPanels = kRows / kWidth, kKeyBlocks = kKeys / kBlock;
static_assert(kRows % kWidth == 0 && kKeys % kBlock == 0);

// P^T and dS^T of a tile and a block of rows. As operands: A blocks [key block][panel], for sums over rows, and VNNI
// blocks [panel][key block] of dS^T, for sums over keys.
struct Weights {
  bf16 *p, *ds, *ds_pairs;

  static constexpr int64_t kElements = 3 * kKeys * kRows;  // of a tile and a block
  explicit Weights(bf16* space = nullptr) : p(space), ds(space + kKeys * kRows), ds_pairs(space + 2 * kKeys * kRows) {}

  static int64_t offset(int64_t key_block, int64_t panel) { return (key_block * kPanels + panel) * kBlockElements; }
  static int64_t pairs_offset(int64_t key_block, int64_t panel) {
    return (panel * kKeyBlocks + key_block) * kBlockElements;
  }
  Weights at(int64_t key_block, int64_t panel) const {
    Weights square;
    square.p = p + offset(key_block, panel);
    square.ds = ds + offset(key_block, panel);
    square.ds_pairs = ds_pairs + pairs_offset(key_block, panel);
    return square;
  }
  void clear() const {
    for (int64_t i = 0; i < kBlockElements; i += kBlock) {
      _mm512_store_si512(p + i, _mm512_setzero_si512());
      _mm512_store_si512(ds + i, _mm512_setzero_si512());
      _mm512_store_si512(ds_pairs + i, _mm512_setzero_si512());
    }
  }
};

// One square's products S^T and dP^T -> P^T and dS^T, two keys a unit. kPlain: nothing is hidden, no softcap.
template <bool kPlain>
class Differentiation {
 public:
  Differentiation(const float* scores, const float* grads, Weights out, const float* lse, const float* delta,
                  const ScoreScale& scale, const Hiding& hiding)
      : scores_(scores),
        grads_(grads),
        out_(out),
        factor_(Vec::set(kPlain || scale.of_tanh == 0.0f ? scale.of_q : 1.0f)),
        of_tanh_(scale.of_tanh),
        of_q_(scale.of_q),
        mask_tile_(hiding.mask_tile),
        band_(hiding.band) {
#pragma GCC unroll 2
    for (int v = 0; v < kWidthVecs; ++v) {
      offset_[v] = Vec::zero() - Vec::load(lse + v * Vec::kLanes);
      delta_[v] = Vec::load(delta + v * Vec::kLanes);
    }
  }

  static constexpr int64_t kUnits = kBlock / 2;

  __attribute__((always_inline)) void step(int64_t count) {
    const int64_t end = pair_ + count < kUnits ? pair_ + count : kUnits;
    for (; pair_ < end; ++pair_) {
      Vec p[2][kWidthVecs], ds[2][kWidthVecs];
#pragma GCC unroll 2
      for (int key = 0; key < 2; ++key) {
#pragma GCC unroll 2
        for (int v = 0; v < kWidthVecs; ++v) differentiate(2 * pair_ + key, v, &p[key][v], &ds[key][v]);
        store_row(out_.p + (2 * pair_ + key) * kBlock, p[key][0], p[key][1]);
        store_row(out_.ds + (2 * pair_ + key) * kBlock, ds[key][0], ds[key][1]);
      }
      store_pair(out_.ds_pairs + pair_offset(pair_), ds[0], ds[1]);
    }
  }

 private:
  __attribute__((always_inline)) void differentiate(int64_t key, int v, Vec* p, Vec* ds) const {
    const int64_t at = key * kWidth + v * Vec::kLanes;
    Vec score = Vec::load(scores_ + at);
    if constexpr (kPlain) {
      *p = coarse_exp2(fma(score, factor_, offset_[v]));
      *ds = *p * (Vec::load(grads_ + at) - delta_[v]);
    } else {
      const Vec hidden = Vec::set(-kInfinity), one = Vec::set(1.0f);
      Vec slope = one, bias = Vec::zero();
      if (of_tanh_ != 0.0f) {
        const Vec t = tanh_of(score * Vec::set(of_q_));
        score = t * Vec::set(of_tanh_);
        slope = fnma(t, t, one);
      }
      if (mask_tile_) bias = Vec::load(mask_tile_ + at);
      *p = coarse_exp2(fma(score, factor_, bias) + offset_[v]);
      *ds = *p * (Vec::load(grads_ + at) - delta_[v]) * slope;
      if (mask_tile_) {
        *p = select(eq(bias, hidden), Vec::zero(), *p);
        *ds = select(eq(bias, hidden), Vec::zero(), *ds);
      }
      if (band_) {
        *p = select(band_[v].sees(key), *p, Vec::zero());
        *ds = select(band_[v].sees(key), *ds, Vec::zero());
      }
    }
  }

  const float *scores_, *grads_;
  const Weights out_;
  const Vec factor_;
  const float of_tanh_, of_q_;
  const float* mask_tile_;
  const LaneBand* band_;
  Vec offset_[kWidthVecs], delta_[kWidthVecs];
  int64_t pair_ = 0;
};

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
