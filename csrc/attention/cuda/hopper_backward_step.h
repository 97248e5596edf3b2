// A tile of queries against a block's keys, transposed, in the Hopper backward: from products, which are under way, to
// the weights and gradients in registers, and on to the products that add them to grad_k and grad_v. Of the keys'
// kernel and of the one pass.
#pragma once
#include "attention/cuda/hopper_backward.h"
#include "attention/cuda/hopper_backward_mask.h"

namespace llmfast::cuda {

// Scores to weights, and weights and products to gradients of scores; columns are queries, and with kHides those
// outside a row's range and those that the mask hides, a bit an element, get zeros. `factor`: of a row's products.
// `kept`: the weights, or with kCapped tanh(score / cap). Registers of products are only read: ptxas serialises
// products whose accumulators other instructions write while some are under way.
template <class Layout, bool kCapped, bool kHides>
__device__ __forceinline__ void weights_of_scores(const float (&scores)[Layout::kQueries / 2],
                                                  float (&kept)[Layout::kQueries / 2], uint32_t statistics,
                                                  const float (&factor)[2], const ScoreScale& scale,
                                                  const Span (&visible)[2],
                                                  const uint32_t (&hidden)[Layout::kQueries / 64]) {
#pragma unroll
  for (int j = 0; j < Layout::kQueries / 8; ++j) {
    const Bytes16 pair = load_shared(statistics + j * 64);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float lse = __uint_as_float(pair.word[i % 2 * 2]);
      float& result = kept[4 * j + i];
      if (kCapped) {
        result = tanh_of(scores[4 * j + i] * factor[i / 2]);
      } else {
        result = exp2_approx(fmaf(scores[4 * j + i], factor[i / 2], -lse));
        if (kHides && is_hidden(hidden, visible[i / 2], 4 * j + i)) result = 0.0f;
      }
    }
  }
}

// kWeighs: also packs the weights, which with kCapped exist only here.
template <class T, class Layout, bool kCapped, bool kHides, bool kWeighs>
__device__ __forceinline__ void gradients_of_scores(const float (&kept)[Layout::kQueries / 2],
                                                    const float (&products)[Layout::kQueries / 2], uint32_t statistics,
                                                    const ScoreScale& scale, const Span (&visible)[2],
                                                    const uint32_t (&hidden)[Layout::kQueries / 64],
                                                    uint32_t (&packed_weights)[Layout::kQueries / 16][4],
                                                    uint32_t (&packed_gradients)[Layout::kQueries / 16][4]) {
#pragma unroll
  for (int j = 0; j < Layout::kQueries / 8; ++j) {
    const Bytes16 pair = load_shared(statistics + j * 64);
    float weights[4], gradients[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float lse = __uint_as_float(pair.word[i % 2 * 2]), delta = __uint_as_float(pair.word[i % 2 * 2 + 1]);
      const float before = kept[4 * j + i];
      const bool hides = kHides && is_hidden(hidden, visible[i / 2], 4 * j + i);
      weights[i] = kCapped ? (hides ? 0.0f : exp2_approx(fmaf(before, scale.cap, -lse))) : before;
      gradients[i] = weights[i] * (products[4 * j + i] - delta);
      if (kCapped) gradients[i] *= fmaf(-before, before, 1.0f);
      if (hides) gradients[i] = 0.0f;
    }
    if (kWeighs) pack_quad<T>(packed_weights, j, weights);
    pack_quad<T>(packed_gradients, j, gradients);
  }
}

// A step from its products on, which are under way in two groups, scores first, to those of its sums; `hides`:
// something in the tile is hidden. between(gradients) runs before the last products.
template <class T, bool kCapped, class Layout, class Between>
__device__ __forceinline__ void add_step(Layout shared, int stage, bool hides,
                                         const float (&scores)[Layout::kQueries / 2],
                                         const float (&products)[Layout::kQueries / 2], const float (&factor)[2],
                                         const ScoreScale& scale, const Span (&visible)[2],
                                         const uint32_t (&hidden)[Layout::kQueries / 64], bool add,
                                         float (&grad_k)[Layout::kD / 2], float (&grad_v)[Layout::kD / 2],
                                         const Between& between) {
  constexpr bool kEarly = Layout::kOverlap == Overlap::sums && !kCapped;
  constexpr bool kHolds = Layout::kOverlap != Overlap::none && !kEarly;
  const uint32_t statistics =
      shared.statistics(stage) + lane() % 4 * 2 * static_cast<int>(sizeof(QueryStatistics));
  float kept[Layout::kQueries / 2];
  uint32_t weights[Layout::kQueries / 16][4], gradients[Layout::kQueries / 16][4];
  warpgroup_wait<1>();  // scores
  if (hides) weights_of_scores<Layout, kCapped, true>(scores, kept, statistics, factor, scale, visible, hidden);
  else weights_of_scores<Layout, kCapped, false>(scores, kept, statistics, factor, scale, visible, hidden);
  if (kEarly) {
#pragma unroll
    for (int j = 0; j < Layout::kQueries / 8; ++j)
      pack_quad<T>(weights, j, {kept[4 * j], kept[4 * j + 1], kept[4 * j + 2], kept[4 * j + 3]});
    warpgroup_fence();
    start_weighted_sum<T>(grad_v, weights, shared.grad_out(stage), add);
    warpgroup_commit();
  }
  if (kHolds && !hides) hold(kept, shared.scratch());  // tiles that hide something are few, and short of registers
  warpgroup_wait<kEarly ? 1 : 0>();  // products
  if (hides)
    gradients_of_scores<T, Layout, kCapped, true, !kEarly>(kept, products, statistics, scale, visible, hidden, weights,
                                                           gradients);
  else
    gradients_of_scores<T, Layout, kCapped, false, !kEarly>(kept, products, statistics, scale, visible, hidden, weights,
                                                            gradients);
  between(gradients);
  warpgroup_fence();
  if (!kEarly) start_weighted_sum<T>(grad_v, weights, shared.grad_out(stage), add);
  start_weighted_sum<T>(grad_k, gradients, shared.queries(stage), add);
  warpgroup_commit();
}

}  // namespace llmfast::cuda
