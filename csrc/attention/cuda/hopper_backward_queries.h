// grad_q on Hopper: a block owns 128 queries of a head, a warpgroup 64 of them, and walks over the tiles of kKeys keys
// that they see.
//   S = Q K^T, dP = grad_out V^T        operands in shared memory
//   P = 2^(S - lse), dS = P (dP - delta) in registers, from which, as it stands,
//   grad_q += dS K                      reads it
// It computes S and dP a second time (the keys' kernel has them too): seven products instead of five, but no sum in
// memory and one order.
//
// Shared memory: Q and grad_out, and a ring of kStages times K, V and what an inspector found in K. Barriers as in
// hopper_backward_keys.h; tiles that hide something are inspected for keys that hold NaN or infinity.
#pragma once
#include "attention/cuda/hopper_backward.h"

namespace llmfast::cuda {

template <int kD_, int kKeys_, int kStages_, bool kDrains_ = true>
struct QueriesLayout {
  static constexpr bool kDrains = kDrains_;  // as in KeysLayout
  static constexpr int kInspectors = 3;
  static constexpr int kD = kD_, kKeys = kKeys_, kStages = kStages_;
  using Own = SlabTile<kOwnRows, kD>;
  using Other = SlabTile<kKeys, kD>;
  static constexpr int kPoisonBytes = kKeys * 4, kStageBytes = 2 * Other::kBytes;
  static constexpr int kOthersAt = 2 * Own::kBytes, kPoisonAt = kOthersAt + 2 * kStages * Other::kBytes;
  static constexpr int kBarriersAt = kPoisonAt + kStages * kPoisonBytes;
  static constexpr int kWorkAt = kBarriersAt + 8 * (2 + 3 * kStages) / 16 * 16, kWorkBytes = 128;
  static constexpr int kBytes = kWorkAt + kWorkBytes + kSharedAlignment;
  static_assert(kBytes <= 232448);

  uint32_t base;
  __device__ Own queries() const { return {base}; }
  __device__ Own grad_out() const { return {base + Own::kBytes}; }
  __device__ Other keys(int stage) const { return {base + kOthersAt + 2 * stage * Other::kBytes}; }
  __device__ Other values(int stage) const { return {base + kOthersAt + (2 * stage + 1) * Other::kBytes}; }
  __device__ uint32_t poison(int stage) const { return base + kPoisonAt + stage * kPoisonBytes; }
  __device__ uint32_t own() const { return base + kBarriersAt; }
  __device__ uint32_t full(int stage) const { return own() + 8 * (1 + stage); }
  __device__ uint32_t inspected(int stage) const { return own() + 8 * (1 + kStages + stage); }
  __device__ uint32_t empty(int stage) const { return own() + 8 * (1 + 2 * kStages + stage); }

  __device__ void initialise_barriers() const {
    mbarrier_init(own(), 1);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(inspected(stage), kInspectors);
      mbarrier_init(empty(stage), kConsumerWarps);
    }
    mbarrier_init_fence();
  }
};

// What a block of queries works on, in shared memory.
struct QueriesWork {
  Sequence sequence;
  int head, kv_head;
  int first;                 // query
  int first_tile, end_tile;  // of keys
  Span full;                 // keys that all the block's queries see
  bool inspects;             // some tile hides something

  template <class Layout>
  __device__ static QueriesWork of(const AttentionParams& p, Layout) {
    constexpr int kKeys = Layout::kKeys;
    QueriesWork w;
    const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x);  // under a causal mask the last is the longest
    w.head = static_cast<int>(blockIdx.y), w.kv_head = w.head / static_cast<int>(p.Hq / p.Hkv);
    if (p.first_q) {
      const TokenTile token = token_tile(tile, p.B, p.Tq, p.first_q, kOwnRows);
      w.sequence = sequence_of(p, token.sequence), w.first = token.first;
    } else {
      w.sequence = sequence_of(p, blockIdx.z), w.first = tile * kOwnRows;
    }
    w.first_tile = w.end_tile = 0, w.full = {0, 0}, w.inspects = false;
    if (w.nothing()) return w;
    const int Tq = w.sequence.Tq, end = w.first + kOwnRows < Tq ? w.first + kOwnRows : Tq;
    const Span seen = w.band(p).seen_by_any(w.first, end);
    w.full = w.band(p).seen_by_all(w.first, end);
    if (seen.empty()) return w;
    w.first_tile = seen.begin / kKeys, w.end_tile = (seen.end + kKeys - 1) / kKeys;
    w.inspects = !w.full.contains({w.first_tile * kKeys, w.end_tile * kKeys});
    return w;
  }
  __device__ bool nothing() const { return first >= sequence.Tq; }
  __device__ Band band(const AttentionParams& p) const { return {sequence.Tq, sequence.Tk, p.left, p.right}; }
};

template <class Layout>
__device__ void produce_keys(const AttentionParams& p, const QueriesWork& w, Layout shared, const TensorMap* k_map,
                             const TensorMap* v_map, const TensorMap* q_map, const TensorMap* grad_out_map) {
  const int first_tile = w.first_tile, end_tile = w.end_tile, kv_head = w.kv_head;
  if (first_tile == end_tile) return;
  const int sequence = p.first_q ? 0 : static_cast<int>(w.sequence.index);
  const int first_q = static_cast<int>(w.sequence.first_q) + w.first, first_k = static_cast<int>(w.sequence.first_k);
  mbarrier_arrive_expect(shared.own(), 2 * Layout::Own::kBytes);
  shared.queries().load(q_map, shared.own(), first_q, w.head, sequence);
  shared.grad_out().load(grad_out_map, shared.own(), first_q, w.head, sequence);
  RingPlace<Layout::kStages> place;
#pragma unroll 1
  for (int tile = first_tile; tile < end_tile; ++tile, place.advance()) {
    const int stage = place.stage, first = first_k + tile * Layout::kKeys;
    mbarrier_wait(shared.empty(stage), place.parity ^ 1);
    mbarrier_arrive_expect(shared.full(stage), Layout::kStageBytes);
    shared.keys(stage).load(k_map, shared.full(stage), first, kv_head, sequence);
    shared.values(stage).load(v_map, shared.full(stage), first, kv_head, sequence);
  }
}

// A key that holds NaN or infinity becomes zeros, so that it does not spoil the sums of queries that do not see it; the
// scores of those that do become NaN.
template <class T, class Layout>
__device__ void inspect_keys(const QueriesWork& w, Layout shared, int inspector) {
  constexpr int kRowChunks = Layout::kD / kChunk, kRowsAStep = kWarpSize / kRowChunks;
  const int my_row = lane() / kRowChunks, my_chunk = lane() % kRowChunks;
  RingPlace<Layout::kStages> place;
  for (int tile = w.first_tile; tile < w.end_tile; ++tile, place.advance()) {
    const int stage = place.stage, first = tile * Layout::kKeys;
    mbarrier_wait(shared.full(stage), place.parity);
    if (!w.full.contains({first, first + Layout::kKeys})) {
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
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(shared.inspected(stage));
  }
}

// Scores to weights, and weights and products to gradients of scores; columns are keys, and with kHides those outside a
// row's range get zeros. `kept`: the weights, or with kCapped tanh(score / cap).
template <class Layout, bool kCapped, bool kHides>
__device__ __forceinline__ void weights_of_rows(const float (&scores)[Layout::kKeys / 2],
                                                float (&kept)[Layout::kKeys / 2], const float (&lse)[2],
                                                const ScoreScale& scale, const Span (&visible)[2],
                                                const float* poison) {
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
        if (kHides && !visible[i / 2].has(8 * j + i % 2)) result = 0.0f;
      }
    }
}

template <class T, class Layout, bool kCapped, bool kHides>
__device__ __forceinline__ void gradients_of_rows(const float (&kept)[Layout::kKeys / 2],
                                                  const float (&products)[Layout::kKeys / 2], const float (&lse)[2],
                                                  const float (&delta)[2], const ScoreScale& scale,
                                                  const Span (&visible)[2],
                                                  uint32_t (&packed)[Layout::kKeys / 16][4]) {
#pragma unroll
  for (int j = 0; j < Layout::kKeys / 8; ++j) {
    float gradients[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float before = kept[4 * j + i];
      const float weight = kCapped ? exp2_approx(fmaf(before, scale.cap, -lse[i / 2])) : before;
      gradients[i] = weight * (products[4 * j + i] - delta[i / 2]);
      if (kCapped) gradients[i] *= fmaf(-before, before, 1.0f);
      if (kHides && !visible[i / 2].has(8 * j + i % 2)) gradients[i] = 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      packed[j / 2][j % 2 * 2 + half] = pack_pair<T>(gradients[2 * half], gradients[2 * half + 1]);
  }
}

template <class T, bool kCapped, class Layout>
__device__ __forceinline__ void consume_keys(const AttentionBackwardParams& p, const QueriesWork& w, Layout shared,
                                             const char* bytes) {
  constexpr int kD = Layout::kD, kKeys = Layout::kKeys;
  const int first_row = uniform(thread() / kWarpgroup) * 64, my_row = warp() * 16;  // of the block's
  const int my_column = lane() % 4 * 2;
  const int first_tile = uniform(w.first_tile), end_tile = uniform(w.end_tile);
  const Span full = {uniform(w.full.begin), uniform(w.full.end)};
  const uint32_t ready = w.inspects ? shared.inspected(0) : shared.full(0);
  const ScoreScale scale(p);
  Span mine[2];
  float lse[2], delta[2];
  const QueryStatistics* const statistics = slots_of(p, w.head, w.sequence) + w.first + my_row + lane() / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mine[half] = w.band(p).keys_of(w.first + my_row + lane() / 4 + 8 * half);
    lse[half] = statistics[8 * half].lse, delta[half] = statistics[8 * half].delta;
  }

  float grad_q[kD / 2];
  RingPlace<Layout::kStages> place;
  int previous = -1;  // stage of the step before
  if (first_tile < end_tile) mbarrier_wait(shared.own(), 0);
#pragma unroll 1
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int stage = place.stage, first = tile * kKeys;
    const auto keys = shared.keys(stage), values = shared.values(stage);
    const Span visible[2] = {{mine[0].begin - first - my_column, mine[0].end - first - my_column},
                             {mine[1].begin - first - my_column, mine[1].end - first - my_column}};
    float scores[kKeys / 2], products[kKeys / 2], kept[kKeys / 2];
    uint32_t gradients[kKeys / 16][4];
    mbarrier_wait(shared.full(stage), place.parity);
    mbarrier_wait(ready + 8 * stage, place.parity);
    warpgroup_fence();
    start_dots<T>(scores, shared.queries(), first_row, keys);
    warpgroup_commit();
    warpgroup_wait<1>();  // the sums of the step before
    if (!Layout::kDrains && lane() == 0 && previous >= 0) mbarrier_arrive(shared.empty(previous));
    start_dots<T>(products, shared.grad_out(), first_row, values);
    warpgroup_commit();
    warpgroup_wait<1>();  // scores
    if (first < full.begin || first + kKeys > full.end) {
      const auto* const poison =
          reinterpret_cast<const float*>(bytes + (shared.poison(stage) - shared.base)) + my_column;
      weights_of_rows<Layout, kCapped, true>(scores, kept, lse, scale, visible, poison);
      warpgroup_wait<0>();
      gradients_of_rows<T, Layout, kCapped, true>(kept, products, lse, delta, scale, visible, gradients);
    } else {
      weights_of_rows<Layout, kCapped, false>(scores, kept, lse, scale, visible, nullptr);
      warpgroup_wait<0>();
      gradients_of_rows<T, Layout, kCapped, false>(kept, products, lse, delta, scale, visible, gradients);
    }
    warpgroup_fence();
    start_weighted_sum<T>(grad_q, gradients, keys, tile > first_tile);
    warpgroup_commit();
    if (Layout::kDrains) {
      warpgroup_wait<0>();
      if (lane() == 0) mbarrier_arrive(shared.empty(stage));
    }
    previous = stage;
    place.advance();
  }
  warpgroup_wait<0>();
  if (first_tile == end_tile) clear(grad_q);

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) factor[half] = p.scale;
  if (lse[0] == infinity() || lse[1] == infinity())  // a row that passes no gradient, whatever it holds
#pragma unroll
    for (int i = 0; i < kD / 2; ++i)
      if (lse[i / 2 % 2] == infinity()) grad_q[i] = 0.0f;
  const int64_t token = w.sequence.first_q + w.first + my_row;
  store_tile_rows<T>(shared.queries(), my_row, grad_q, factor, row_of<T>(p.grad_q, w.sequence.index, w.head, token),
                     p.grad_q.token_stride, w.sequence.Tq - w.first - my_row, static_cast<int>(p.D));
}

template <class T, class Layout, bool kCapped>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_grad_q_kernel(const AttentionBackwardParams p, const __grid_constant__ TensorMap k_map,
                            const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap q_map,
                            const __grid_constant__ TensorMap grad_out_map) {
  char* const bytes = dynamic_shared<char>();
  const uint32_t skip = -shared_address(bytes) % kSharedAlignment;
  const Layout shared{shared_address(bytes) + skip};
  QueriesWork& work = *reinterpret_cast<QueriesWork*>(bytes + skip + Layout::kWorkAt);
  static_assert(sizeof(QueriesWork) <= Layout::kWorkBytes);
  if (thread() == 0) {
    work = QueriesWork::of(p, shared);
    shared.initialise_barriers();
  }
  __syncthreads();
  if (work.nothing()) return;
  if (thread() >= kConsumers * kWarpgroup) {
    registers_shrink<kProducerRegisters>();
    const int worker = warp() - kConsumers * 4;
    if (worker == 0 && lane() == 0) produce_keys(p, work, shared, &k_map, &v_map, &q_map, &grad_out_map);
    if (worker > 0 && work.inspects) inspect_keys<T>(work, shared, worker - 1);
  } else {
    registers_grow<kConsumerRegisters>();
    consume_keys<T, kCapped>(p, work, shared, bytes + skip);
  }
}

}  // namespace llmfast::cuda
