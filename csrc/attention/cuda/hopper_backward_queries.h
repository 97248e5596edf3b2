// grad_q on Hopper: a block owns 128 queries of a head, a warpgroup 64 of them, and walks over the tiles of kKeys keys
// that they see.
//   S = Q K^T, dP = grad_out V^T        operands in shared memory
//   P = 2^(S - lse), dS = P (dP - delta) in registers, from which, as it stands,
//   grad_q += dS K                      reads it
// It computes S and dP a second time (the keys' kernel has them too): seven products instead of five, but no sum in
// memory and one order.
//
// Shared memory: Q and grad_out, a ring of kStages times K, V and what an inspector found in K, and the finished tile
// on its way out. Tiles that hide something are inspected for keys that hold NaN or infinity. With a mask tensor tiles
// of keys that it hides from all the block's queries are left out, and those that it changes read it element by
// element.
#pragma once
#include <type_traits>

#include "attention/cuda/hopper_backward_ring.h"

namespace llmfast::cuda {

// A block of queries and the keys that they see, in shared memory.
struct QueriesWork {
  Sequence sequence;
  int head, kv_head;
  int first;                 // query
  int first_tile, end_tile;  // of keys
  int steps;                 // tiles
  Span full;                 // keys that all the block's queries see
  bool none;                 // no work is left

  // `index` counts tiles of a sequence (packed: of all), then heads, then sequences.
  template <class Layout>
  __device__ static QueriesWork of(const AttentionParams& p, Layout, int index, int tiles) {
    constexpr int kKeys = Layout::kKeys;
    QueriesWork w;
    const int Hq = static_cast<int>(p.Hq), row = index / tiles;
    const int tile = tiles - 1 - index % tiles;  // under a causal mask the last is the longest
    w.head = row % Hq, w.kv_head = w.head / (Hq / static_cast<int>(p.Hkv));
    if (p.first_q) {
      const TokenTile token = token_tile(tile, p.B, p.Tq, p.first_q, kOwnRows);
      w.sequence = sequence_of(p, token.sequence), w.first = token.first;
    } else {
      w.sequence = sequence_of(p, row / Hq), w.first = tile * kOwnRows;
    }
    w.first_tile = w.end_tile = w.steps = 0, w.full = {0, 0}, w.none = false;
    if (w.nothing()) return w;
    const int Tq = w.sequence.Tq, end = w.first + kOwnRows < Tq ? w.first + kOwnRows : Tq;
    const Span seen = w.band(p).seen_by_any(w.first, end);
    w.full = w.band(p).seen_by_all(w.first, end);
    if (seen.empty() || p.left + p.right < 0) return w;
    w.first_tile = seen.begin / kKeys, w.end_tile = (seen.end + kKeys - 1) / kKeys;
    w.steps = w.end_tile - w.first_tile;
    return w;
  }
  __device__ bool hides(int first_key, int keys) const {
    return first_key < full.begin || first_key + keys > full.end;
  }
  __device__ bool nothing() const { return first >= sequence.Tq; }
  __device__ Band band(const AttentionParams& p) const { return {sequence.Tq, sequence.Tk, p.left, p.right}; }
};

template <int kD_, int kKeys_, int kStages_, bool kDrains_ = true, Overlap kOverlap_ = Overlap::sums>
struct QueriesLayout
    : RingLayout<QueriesWork, kStages_, 3 * SlabTile<kOwnRows, kD_>::kBytes + kStages_ * kKeys_ * (4 * kD_ + 4)> {
  static constexpr bool kDrains = kDrains_;  // as in KeysLayout
  static constexpr Overlap kOverlap = kOverlap_;
  static constexpr int kD = kD_, kKeys = kKeys_;
  using Own = SlabTile<kOwnRows, kD>;
  using Other = SlabTile<kKeys, kD>;
  static constexpr int kPoisonBytes = kKeys * 4, kStageBytes = 2 * Other::kBytes;
  static constexpr int kOthersAt = 2 * Own::kBytes, kFinishedAt = kOthersAt + 2 * kStages_ * Other::kBytes;
  static constexpr int kPoisonAt = kFinishedAt + Own::kBytes;
  static_assert(kPoisonAt + kStages_ * kPoisonBytes == QueriesLayout::kWorkAt);

  __device__ Own queries() const { return {this->base}; }
  __device__ Own grad_out() const { return {this->base + Own::kBytes}; }
  __device__ Other keys(int stage) const { return {this->base + kOthersAt + 2 * stage * Other::kBytes}; }
  __device__ Other values(int stage) const { return {this->base + kOthersAt + (2 * stage + 1) * Other::kBytes}; }
  __device__ Own finished() const { return {this->base + kFinishedAt}; }
  __device__ uint32_t poison(int stage) const { return this->base + kPoisonAt + stage * kPoisonBytes; }
};

// The classes of the tiles of keys for the block's queries.
__device__ inline Classes classes_of_queries(const AttentionParams& p, const QueriesWork& w) {
  const MaskClasses c(p);
  return c.of_queries(mask_classes_of(p), c.plane(static_cast<int>(w.sequence.index), w.head), w.first / kOwnRows);
}

// A key that holds NaN or infinity becomes zeros, so that it does not spoil the sums of queries that do not see it; the
// scores of those that do become NaN.
template <class T, class Layout>
__device__ void clear_bad_keys(Layout shared, int stage, int inspector) {
  constexpr int kRowChunks = Layout::kD / kChunk, kRowsAStep = kWarpSize / kRowChunks;
  const int my_row = lane() / kRowChunks, my_chunk = lane() % kRowChunks;
#pragma unroll 2
  for (int i = inspector * kRowsAStep; i < Layout::kKeys; i += Layout::kInspectors * kRowsAStep) {
    const int row = i + my_row;
    const uint32_t at = shared.keys(stage).chunk(row, my_chunk);
    const uint32_t bad = __ballot_sync(kAllLanes, not_finite<T>(load_shared(at)));
    const bool spoilt = (bad >> (my_row * kRowChunks) & ((1u << kRowChunks) - 1)) != 0;
    if (spoilt) store_shared(at, Bytes16{{0, 0, 0, 0}});
    if (my_chunk == 0) store_shared(shared.poison(stage) + 4 * row, spoilt ? 0x7fc00000u : 0u);
  }
  fence_async_proxy();
}

// Scores to weights, and weights and products to gradients of scores; columns are keys, and with kHides those outside a
// row's range and those that the mask hides, a bit an element, get zeros. `kept`: the weights, or with kCapped
// tanh(score / cap).
template <class Layout, bool kCapped, bool kHides>
__device__ __forceinline__ void weights_of_rows(const float (&scores)[Layout::kKeys / 2],
                                                float (&kept)[Layout::kKeys / 2], const float (&lse)[2],
                                                const ScoreScale& scale, const Span (&visible)[2],
                                                const uint32_t (&hidden)[Layout::kKeys / 64], const float* poison) {
#pragma unroll
  for (int j = 0; j < Layout::kKeys / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float score = scores[4 * j + i];
      if (kHides) score += poison[8 * j + i % 2];
      float& result = kept[4 * j + i];
      if (kCapped) {
        result = tanh_of(score * scale.product);
      } else {
        result = exp2_approx(fmaf(score, scale.product, -lse[i / 2]));
        if (kHides && is_hidden(hidden, visible[i / 2], 4 * j + i)) result = 0.0f;
      }
    }
}

// Of part kPart of kParts of the columns.
template <class T, class Layout, bool kCapped, bool kHides, int kPart, int kParts>
__device__ __forceinline__ void gradients_of_rows(const float (&kept)[Layout::kKeys / 2],
                                                  const float (&products)[Layout::kKeys / 2], const float (&lse)[2],
                                                  const float (&delta)[2], const ScoreScale& scale,
                                                  const Span (&visible)[2],
                                                  const uint32_t (&hidden)[Layout::kKeys / 64],
                                                  uint32_t (&packed)[Layout::kKeys / 16][4]) {
  constexpr int kColumns = Layout::kKeys / 8 / kParts;
#pragma unroll
  for (int j = kPart * kColumns; j < (kPart + 1) * kColumns; ++j) {
    float gradients[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float before = kept[4 * j + i];
      const float weight = kCapped ? exp2_approx(fmaf(before, scale.cap, -lse[i / 2])) : before;
      gradients[i] = weight * (products[4 * j + i] - delta[i / 2]);
      if (kCapped) gradients[i] *= fmaf(-before, before, 1.0f);
      if (kHides && is_hidden(hidden, visible[i / 2], 4 * j + i)) gradients[i] = 0.0f;
    }
    pack_quad<T>(packed, j, gradients);
  }
}

// A step from its products on, which are under way in two groups, scores first, to those of its sums; `hides`:
// something in the tile is hidden. The sums' products of the first half of the keys run under the gradients of the
// second.
template <class T, bool kCapped, class Layout>
__device__ __forceinline__ void add_step(Layout shared, int stage, bool hides, const float (&scores)[Layout::kKeys / 2],
                                         const float (&products)[Layout::kKeys / 2], const float (&lse)[2],
                                         const float (&delta)[2], const ScoreScale& scale, const Span (&visible)[2],
                                         const uint32_t (&hidden)[Layout::kKeys / 64], bool add,
                                         float (&grad_q)[Layout::kD / 2]) {
  constexpr int kParts = Layout::kOverlap == Overlap::sums ? 2 : 1;
  const auto* const poison =
      reinterpret_cast<const float*>(shared.bytes + (shared.poison(stage) - shared.base)) + lane() % 4 * 2;
  float kept[Layout::kKeys / 2];
  uint32_t gradients[Layout::kKeys / 16][4];
  warpgroup_wait<1>();  // scores
  if (hides) {
    weights_of_rows<Layout, kCapped, true>(scores, kept, lse, scale, visible, hidden, poison);
  } else {
    weights_of_rows<Layout, kCapped, false>(scores, kept, lse, scale, visible, hidden, nullptr);
    if (Layout::kOverlap != Overlap::none) hold(kept, shared.scratch());
  }
  warpgroup_wait<0>();  // products
  const auto add_part = [&](auto part) {
    constexpr int kPart = decltype(part)::value;
    if (hides)
      gradients_of_rows<T, Layout, kCapped, true, kPart, kParts>(kept, products, lse, delta, scale, visible, hidden,
                                                                 gradients);
    else
      gradients_of_rows<T, Layout, kCapped, false, kPart, kParts>(kept, products, lse, delta, scale, visible, hidden,
                                                                  gradients);
    warpgroup_fence();
    start_weighted_sum<T, kPart, kParts>(grad_q, gradients, shared.keys(stage), add);
  };
  add_part(std::integral_constant<int, 0>());
  if constexpr (kParts > 1) add_part(std::integral_constant<int, 1>());
  warpgroup_commit();
}

// ---- roles ----------------------------------------------------------------------------------------------------------

template <bool kMasked, class Layout>
__device__ __forceinline__ void load_keys(const AttentionParams& p, const QueriesWork& w, Layout shared,
                                          RingPlace<Layout::kStages>& place, const TensorMap* k_map,
                                          const TensorMap* v_map, const TensorMap* q_map,
                                          const TensorMap* grad_out_map) {
  const int sequence = p.first_q ? 0 : static_cast<int>(w.sequence.index);
  const int first_q = static_cast<int>(w.sequence.first_q) + w.first, first_k = static_cast<int>(w.sequence.first_k);
  const Classes classes = kMasked ? classes_of_queries(p, w) : Classes{nullptr, 0};
  mbarrier_arrive_expect(shared.own_full(), 2 * Layout::Own::kBytes);
  shared.queries().load(q_map, shared.own_full(), first_q, w.head, sequence);
  shared.grad_out().load(grad_out_map, shared.own_full(), first_q, w.head, sequence);
#pragma unroll 1
  for (int tile = w.first_tile; tile < w.end_tile; ++tile) {
    const int stage = place.stage, first = tile * Layout::kKeys;
    const uint8_t found = classes.of_token(first);
    if (kMasked && !(found & kShows)) continue;
    mbarrier_wait(shared.empty(stage), place.parity ^ 1);
    const bool changed = kMasked && (found & kChanges);
    shared.step(stage) = {first, w.head, changed, changed || w.hides(first, Layout::kKeys)};
    mbarrier_arrive_expect(shared.full(stage), Layout::kStageBytes);
    shared.keys(stage).load(k_map, shared.full(stage), first_k + first, w.kv_head, sequence);
    shared.values(stage).load(v_map, shared.full(stage), first_k + first, w.kv_head, sequence);
    place.advance();
  }
}

template <bool kMasked, class Layout>
__device__ __forceinline__ void produce_keys(const AttentionParams& p, Layout shared, int* counter, int tiles,
                                             const TensorMap* k_map, const TensorMap* v_map, const TensorMap* q_map,
                                             const TensorMap* grad_out_map) {
  const auto of = [&](int ticket) {
    QueriesWork w = QueriesWork::of(p, shared, ticket, tiles);
    if (!kMasked) return w;
    const Classes classes = classes_of_queries(p, w);
    w.steps = 0;
#pragma unroll 4
    for (int tile = w.first_tile; tile < w.end_tile; ++tile)
      w.steps += (classes.of_token(tile * Layout::kKeys) & kShows) != 0;
    return w;
  };
  hand_out(shared, counter, tiles * static_cast<int>(p.Hq * (p.first_q ? 1 : p.B)), of,
           [&](const QueriesWork& w, RingPlace<Layout::kStages>& place) {
             load_keys<kMasked>(p, w, shared, place, k_map, v_map, q_map, grad_out_map);
           });
}

template <class T, Scoring kScoring, class Layout>
__device__ __forceinline__ void consume_keys(const AttentionBackwardParams& p, Layout shared) {
  constexpr int kD = Layout::kD, kKeys = Layout::kKeys;
  constexpr bool kCapped = kScoring == Scoring::capped, kMasked = is_masked(kScoring);
  static_assert(!kMasked || Layout::kDrains, "scores that a mask starts are written when nothing is under way");
  const int first_row = uniform(thread() / kWarpgroup) * 64, my_row = warp() * 16;  // of the block's
  const int my_column = lane() % 4 * 2;
  const ScoreScale scale(p);
  CountedPlace<Layout::kStages> place;
  uint32_t own_parity = 0, inspected_parity = 0;  // the latter a bit a stage
#pragma unroll 1
  for (CountedPlace<2> post;; post.advance()) {
    mbarrier_wait(shared.posted(post.stage()), post.parity());
    const QueriesWork& w = shared.work(post.stage());
    if (uniform(w.none)) return;
    const int steps = uniform(w.steps);
    const Span full = {uniform(w.full.begin), uniform(w.full.end)};
    Span mine[2];
    float lse[2], delta[2];
    const QueryStatistics* const statistics = slots_of(p, w.head, w.sequence) + w.first + my_row + lane() / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mine[half] = w.band(p).keys_of(w.first + my_row + lane() / 4 + 8 * half);
      mine[half].begin -= my_column, mine[half].end -= my_column;
      lse[half] = statistics[8 * half].lse, delta[half] = statistics[8 * half].delta;
    }

    float grad_q[kD / 2];
    int previous = -1;  // stage of the step before
    int first = uniform(w.first_tile) * kKeys;
    if (steps > 0) {
      mbarrier_wait(shared.own_full(), own_parity);
      own_parity ^= 1;
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step, first += kKeys) {
      const int stage = place.stage();
      float scores[kKeys / 2], products[kKeys / 2];
      uint32_t hidden[kKeys / 64] = {};  // by the mask
      bool changed = false;
      mbarrier_wait(shared.full(stage), place.parity());
      if (kMasked) {
        const RingStep& posted = shared.step(stage);
        first = uniform(posted.first), changed = uniform(posted.changed);
        if (changed)
          read_mask<kScoring, kKeys>(mask_rows<false>(p, w.sequence.index, w.head, w.first + my_row, w.sequence.Tq - 1,
                                                      w.sequence.Tk),
                                     first, p.scale, hidden, scores);
      }
      const Span visible[2] = {{mine[0].begin - first, mine[0].end - first},
                               {mine[1].begin - first, mine[1].end - first}};
      const bool hides = changed || first < full.begin || first + kKeys > full.end;
      if (hides) {
        mbarrier_wait(shared.inspected(stage), inspected_parity >> stage & 1);
        inspected_parity ^= 1u << stage;
      }
      warpgroup_fence();
      start_dots<T>(scores, shared.queries(), first_row, shared.keys(stage), kScoring == Scoring::added && changed);
      warpgroup_commit();
      warpgroup_wait<1>();  // the sums of the step before
      if (!Layout::kDrains && lane() == 0 && previous >= 0) mbarrier_arrive(shared.empty(previous));
      start_dots<T>(products, shared.grad_out(), first_row, shared.values(stage));
      warpgroup_commit();
      add_step<T, kCapped>(shared, stage, hides, scores, products, lse, delta, scale, visible, hidden, step > 0,
                           grad_q);
      if (Layout::kDrains) {
        warpgroup_wait<0>();
        if (lane() == 0) mbarrier_arrive(shared.empty(stage));
      }
      previous = stage;
      place.advance();
    }
    warpgroup_wait<0>();
    if (steps > 0 && lane() == 0) {
      if (!Layout::kDrains) mbarrier_arrive(shared.empty(previous));
      mbarrier_arrive(shared.own_empty());
    }
    if (steps == 0) clear(grad_q);

    const float factor[2] = {p.scale, p.scale};
    if (lse[0] == infinity() || lse[1] == infinity())  // a row that passes no gradient, whatever it holds
#pragma unroll
      for (int i = 0; i < kD / 2; ++i)
        if (lse[i / 2 % 2] == infinity()) grad_q[i] = 0.0f;
    const int64_t token = w.sequence.first_q + w.first + my_row;
    store_tile_rows<T>(shared.finished(), my_row, grad_q, factor, row_of<T>(p.grad_q, w.sequence.index, w.head, token),
                       p.grad_q.token_stride, w.sequence.Tq - w.first - my_row, static_cast<int>(p.D));
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(shared.taken(post.stage()));
  }
}

template <class T, class Layout, Scoring kScoring>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_grad_q_kernel(const AttentionBackwardParams p, const __grid_constant__ TensorMap k_map,
                            const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap q_map,
                            const __grid_constant__ TensorMap grad_out_map, const int tiles, const bool counted) {
  char* const bytes = dynamic_shared<char>();
  const uint32_t skip = -shared_address(bytes) % kSharedAlignment;
  const Layout shared{{bytes + skip, shared_address(bytes) + skip}};
  if (thread() == 0) shared.initialise_barriers();
  __syncthreads();
  if (thread() >= kConsumers * kWarpgroup) {
    registers_shrink<kProducerRegisters>();
    const int worker = warp() - kConsumers * 4;
    if (worker > 0)
      inspect_tiles(shared, [&](int stage) { clear_bad_keys<T>(shared, stage, worker - 1); });
    else if (lane() == 0)
      produce_keys<is_masked(kScoring)>(p, shared, counted ? counters_of(p) + 1 : nullptr, tiles, &k_map, &v_map,
                                                &q_map, &grad_out_map);
  } else {
    registers_grow<kConsumerRegisters>();
    consume_keys<T, kScoring>(p, shared);
  }
}

}  // namespace llmfast::cuda
