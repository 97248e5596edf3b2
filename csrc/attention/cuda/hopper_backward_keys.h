// grad_k and grad_v on Hopper: a block owns 128 keys of a kv head, a warpgroup 64 of them, and walks over all its query
// heads' tiles of kQueries queries that see them.
//   S^T = K Q^T, dP^T = V grad_out^T                  operands in shared memory
//   P^T = 2^(S^T - lse), dS^T = P^T (dP^T - delta)    in registers, from which, as they stand,
//   grad_v += P^T grad_out, grad_k += dS^T Q          read them
// The sums stay in registers from the first tile to the last: no atomics, one order.
//
// Shared memory: K and V, a ring of kStages times Q, grad_out and the rows' statistics, and the finished tiles on their
// way out. Tiles whose rows might pass no gradient are inspected: such rows become zeros. With a mask tensor the tiles
// of queries from which it hides the block's keys are left out, and those that it changes read it element by element.
#pragma once
#include "attention/cuda/hopper_backward_ring.h"
#include "attention/cuda/hopper_backward_step.h"

namespace llmfast::cuda {

// A block of keys and the queries that see it. One thread finds out and leaves it in shared memory: no registers are
// left to keep it.
struct KeysWork {
  Sequence sequence;
  int kv_head, group;
  int first;                 // key
  int first_tile, end_tile;  // of queries
  int steps;                 // tiles of all heads of the group
  Span full;                 // queries that see all the block's rows of keys
  bool inspects;             // some tile may hold rows that pass no gradient: of another sequence, or that see no key
  bool none;                 // no work is left

  // `index` counts tiles of a sequence (packed: of all), then heads, then sequences.
  template <class Layout>
  __device__ static KeysWork of(const AttentionParams& p, Layout layout, int index, int tiles) {
    const int heads = static_cast<int>(p.Hkv), row = index / tiles;
    return of(p, layout, index % tiles, row % heads, row / heads);
  }
  template <class Layout>
  __device__ static KeysWork of(const AttentionParams& p, Layout, int block_tile, int kv_head, int block_sequence) {
    constexpr int kQueries = Layout::kQueries;
    KeysWork w;
    w.kv_head = kv_head, w.group = static_cast<int>(p.Hq) / static_cast<int>(p.Hkv);
    if (p.first_k) {
      const TokenTile tile = token_tile(block_tile, p.B, p.Tk, p.first_k, kOwnRows);
      w.sequence = sequence_of(p, tile.sequence), w.first = tile.first;
    } else {  // under a causal mask the first is the longest
      w.sequence = sequence_of(p, block_sequence), w.first = block_tile * kOwnRows;
    }
    const int Tq = w.sequence.Tq, Tk = w.sequence.Tk, end = w.first + kOwnRows < Tk ? w.first + kOwnRows : Tk;
    w.first_tile = w.end_tile = w.steps = 0, w.full = {0, 0}, w.inspects = w.none = false;
    if (w.nothing()) return w;
    const bool others = p.first_k && w.first + kOwnRows > Tk;  // rows of the next sequence, that nothing sees
    if (!others) w.full = w.band(p).seen_by_all(w.first, end);
    const Span seen = tiles_of_block(w.band(p), w.first, end, kQueries);
    if (seen.empty()) return w;
    w.first_tile = seen.begin, w.end_tile = seen.end, w.steps = (seen.end - seen.begin) * w.group;
    const int last = w.end_tile * kQueries < Tq ? w.end_tile * kQueries - 1 : Tq - 1;
    const Band keys{Tq, Tk, p.left, p.right};
    w.inspects = (p.first_q && w.end_tile * kQueries > Tq) || keys.keys_of(w.first_tile * kQueries).empty() ||
                 keys.keys_of(last).empty();
    return w;
  }
  // Tiles of queries in the order in which a head's are taken.
  template <class Layout>
  __device__ int tile(Layout, int i) const {
    return Layout::kDescends ? end_tile - 1 - i : first_tile + i;
  }
  __device__ bool hides(int first_query, int queries) const {
    return first_query < full.begin || first_query + queries > full.end;
  }
  __device__ bool nothing() const { return first >= sequence.Tk; }
  __device__ Band band(const AttentionParams& p) const {  // of the keys: its keys are our queries
    return Band{sequence.Tq, sequence.Tk, p.left, p.right}.transposed();
  }
};

// kDrains: a step ends when its sums are done. Otherwise they go on while the next step's scores begin, which takes
// registers that a kD of 128 or tiles of 128 do not leave.
template <int kD_, int kQueries_, int kStages_, bool kDrains_ = true, Overlap kOverlap_ = Overlap::sums>
struct KeysLayout : RingLayout<KeysWork, kStages_, 4 * SlabTile<kOwnRows, kD_>::kBytes + kStages_ * kQueries_ *
                                                       (4 * kD_ + static_cast<int>(sizeof(QueryStatistics)))> {
  static constexpr bool kDrains = kDrains_, kDescends = false;
  static constexpr Overlap kOverlap = kOverlap_;
  static constexpr int kD = kD_, kQueries = kQueries_;
  using Own = SlabTile<kOwnRows, kD>;
  using Other = SlabTile<kQueries, kD>;
  static constexpr int kStatisticsBytes = kQueries * static_cast<int>(sizeof(QueryStatistics));
  static constexpr int kStageBytes = 2 * Other::kBytes + kStatisticsBytes;
  static constexpr int kOthersAt = 2 * Own::kBytes, kFinishedAt = kOthersAt + 2 * kStages_ * Other::kBytes;
  static constexpr int kStatisticsAt = kFinishedAt + 2 * Own::kBytes;
  static_assert(kStatisticsAt + kStages_ * kStatisticsBytes == KeysLayout::kWorkAt && kSlotRows % kQueries == 0);

  __device__ Own keys() const { return {this->base}; }
  __device__ Own values() const { return {this->base + Own::kBytes}; }
  __device__ Other queries(int stage) const { return {this->base + kOthersAt + 2 * stage * Other::kBytes}; }
  __device__ Other grad_out(int stage) const { return {this->base + kOthersAt + (2 * stage + 1) * Other::kBytes}; }
  __device__ Own finished(int which) const { return {this->base + kFinishedAt + which * Own::kBytes}; }
  __device__ uint32_t statistics(int stage) const { return this->base + kStatisticsAt + stage * kStatisticsBytes; }
};

// The classes of a head's tiles of queries for the block's keys.
__device__ inline Classes classes_of_keys(const AttentionParams& p, const KeysWork& w, int head) {
  const MaskClasses c(p);
  return c.of_keys(mask_classes_of(p), c.plane(static_cast<int>(w.sequence.index), head), w.first / kOwnRows);
}

// Asks for the tiles of queries, in order; note(stage, head, first, class) comes before a tile's copies.
template <bool kMasked, class Layout, class Place, class Note>
__device__ __forceinline__ void load_queries(const AttentionParams& p, const KeysWork& w, Layout shared, Place& place,
                                             const TensorMap* q_map, const TensorMap* grad_out_map, const Note& note) {
  const int sequence = p.first_q ? 0 : static_cast<int>(w.sequence.index);
  const int first_q = static_cast<int>(w.sequence.first_q), tiles = w.end_tile - w.first_tile;
  const int first_head = w.kv_head * w.group, end_head = first_head + w.group;
#pragma unroll 1
  for (int head = first_head; head < end_head; ++head) {
    const QueryStatistics* const statistics = slots_of(p, head, w.sequence);
    const Classes classes = kMasked ? classes_of_keys(p, w, head) : Classes{nullptr, 0};
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const int stage = place.stage, first = w.tile(shared, i) * Layout::kQueries;
      const uint8_t found = classes.of_token(first);
      if (kMasked && !(found & kShows)) continue;
      mbarrier_wait(shared.empty(stage), place.parity ^ 1);
      note(stage, head, first, found);
      mbarrier_arrive_expect(shared.full(stage), Layout::kStageBytes);
      shared.queries(stage).load(q_map, shared.full(stage), first_q + first, head, sequence);
      bulk_load_bytes(shared.statistics(stage), statistics + first, Layout::kStatisticsBytes, shared.full(stage));
      shared.grad_out(stage).load(grad_out_map, shared.full(stage), first_q + first, head, sequence);
      place.advance();
    }
  }
}

// How many tiles the mask leaves.
template <class Layout>
__device__ int shown_steps(const AttentionParams& p, const KeysWork& w, Layout) {
  int steps = 0;
#pragma unroll 1
  for (int head = w.kv_head * w.group; head < (w.kv_head + 1) * w.group; ++head) {
    const Classes classes = classes_of_keys(p, w, head);
#pragma unroll 4
    for (int tile = w.first_tile; tile < w.end_tile; ++tile)
      steps += (classes.of_token(tile * Layout::kQueries) & kShows) != 0;
  }
  return steps;
}

template <class Layout>
__device__ void load_own(const AttentionParams& p, const KeysWork& w, Layout shared, uint32_t barrier,
                         const TensorMap* k_map, const TensorMap* v_map) {
  const int sequence = p.first_q ? 0 : static_cast<int>(w.sequence.index);
  const int first = static_cast<int>(w.sequence.first_k) + w.first;
  mbarrier_arrive_expect(barrier, 2 * Layout::Own::kBytes);
  shared.keys().load(k_map, barrier, first, w.kv_head, sequence);
  shared.values().load(v_map, barrier, first, w.kv_head, sequence);
}

// Rows that pass no gradient become zeros: whatever they hold must not meet a weight of 0.
template <class Layout>
__device__ void clear_absent_queries(Layout shared, int stage, int inspector) {
  constexpr int kRowChunks = Layout::kD / kChunk;
  const auto* const statistics =
      reinterpret_cast<const QueryStatistics*>(shared.bytes + (shared.statistics(stage) - shared.base));
#pragma unroll 1
  for (int row = inspector; row < Layout::kQueries; row += Layout::kInspectors)
    if (statistics[row].lse == infinity() && lane() < 2 * kRowChunks) {
      const auto tile = lane() < kRowChunks ? shared.queries(stage) : shared.grad_out(stage);
      store_shared(tile.chunk(row, lane() % kRowChunks), Bytes16{{0, 0, 0, 0}});
    }
  fence_async_proxy();
}

// ---- roles ----------------------------------------------------------------------------------------------------------

template <bool kMasked, class Layout>
__device__ __forceinline__ void produce_queries(const AttentionParams& p, Layout shared, int* counter, int tiles,
                                                const TensorMap* k_map, const TensorMap* v_map, const TensorMap* q_map,
                                                const TensorMap* grad_out_map) {
  const auto of = [&](int ticket) {
    KeysWork w = KeysWork::of(p, shared, ticket, tiles);
    if (kMasked) w.steps = shown_steps(p, w, shared);
    return w;
  };
  hand_out(shared, counter, tiles * static_cast<int>(p.Hkv * (p.first_q ? 1 : p.B)), of,
           [&](const KeysWork& w, RingPlace<Layout::kStages>& place) {
             load_own(p, w, shared, shared.own_full(), k_map, v_map);
             const auto note = [&](int stage, int head, int first, uint8_t found) {
               const bool changed = kMasked && (found & kChanges);
               const bool inspects = w.inspects || changed || (kMasked && w.hides(first, Layout::kQueries));
               shared.step(stage) = {first, head, changed, inspects};
             };
             load_queries<kMasked>(p, w, shared, place, q_map, grad_out_map, note);
           });
}

template <class T, Scoring kScoring, class Layout>
__device__ __forceinline__ void consume_queries(const AttentionBackwardParams& p, Layout shared) {
  constexpr int kD = Layout::kD, kQueries = Layout::kQueries;
  constexpr bool kCapped = kScoring == Scoring::capped, kMasked = is_masked(kScoring);
  static_assert(!kMasked || Layout::kDrains, "scores that a mask starts are written when nothing is under way");
  const int first_row = uniform(thread() / kWarpgroup) * 64, my_row = warp() * 16;  // of the block's
  const int my_column = lane() % 4 * 2;
  const ScoreScale scale(p);
  const float factor[2] = {scale.product, scale.product};
  CountedPlace<Layout::kStages> place;
  uint32_t own_parity = 0, inspected_parity = 0;  // the latter a bit a stage
#pragma unroll 1
  for (CountedPlace<2> post;; post.advance()) {
    mbarrier_wait(shared.posted(post.stage()), post.parity());
    const KeysWork& w = shared.work(post.stage());
    if (uniform(w.none)) return;
    const int steps = uniform(w.steps);
    bool inspects = uniform(w.inspects);
    const Span full = {uniform(w.full.begin), uniform(w.full.end)};
    Span mine[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mine[half] = w.band(p).keys_of(w.first + my_row + lane() / 4 + 8 * half);
      mine[half].begin -= my_column, mine[half].end -= my_column;
    }

    float grad_k[kD / 2], grad_v[kD / 2];
    int previous = -1;  // stage of the step before
    int first = uniform(w.first_tile) * kQueries;
    if (steps > 0) {
      mbarrier_wait(shared.own_full(), own_parity);
      own_parity ^= 1;
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int stage = place.stage();
      float scores[kQueries / 2], products[kQueries / 2];
      uint32_t hidden[kQueries / 64] = {};  // by the mask
      bool changed = false;
      mbarrier_wait(shared.full(stage), place.parity());
      if (kMasked) {
        const RingStep& posted = shared.step(stage);
        first = uniform(posted.first), inspects = uniform(posted.inspects), changed = uniform(posted.changed);
        if (changed)
          read_mask<kScoring, kQueries>(mask_rows<true>(p, w.sequence.index, posted.head, w.first + my_row,
                                                        w.sequence.Tk - 1, w.sequence.Tq),
                                        first, p.scale, hidden, scores);
      }
      const Span visible[2] = {{mine[0].begin - first, mine[0].end - first},
                               {mine[1].begin - first, mine[1].end - first}};
      if (inspects) {
        mbarrier_wait(shared.inspected(stage), inspected_parity >> stage & 1);
        inspected_parity ^= 1u << stage;
      }
      warpgroup_fence();
      start_dots<T>(scores, shared.keys(), first_row, shared.queries(stage), kScoring == Scoring::added && changed);
      warpgroup_commit();
      warpgroup_wait<1>();  // the sums of the step before: only now there are registers for the products
      if (!Layout::kDrains && lane() == 0 && previous >= 0) mbarrier_arrive(shared.empty(previous));
      start_dots<T>(products, shared.values(), first_row, shared.grad_out(stage));
      warpgroup_commit();
      const bool hides = changed || first < full.begin || first + kQueries > full.end;
      add_step<T, kCapped>(shared, stage, hides, scores, products, factor, scale, visible, hidden, step > 0, grad_k,
                           grad_v, [](const auto&) {});
      if (Layout::kDrains) {
        warpgroup_wait<0>();
        if (lane() == 0) mbarrier_arrive(shared.empty(stage));
      }
      previous = stage;
      place.advance();
      first += kQueries;
      if (first == w.end_tile * kQueries) first = w.first_tile * kQueries;
    }
    warpgroup_wait<0>();
    if (steps > 0 && lane() == 0) {
      if (!Layout::kDrains) mbarrier_arrive(shared.empty(previous));
      mbarrier_arrive(shared.own_empty());
    }
    if (steps == 0) {
      clear(grad_k);
      clear(grad_v);
    }

    const int rows = w.sequence.Tk - w.first - my_row;
    const int64_t sequence = w.sequence.index, token = w.sequence.first_k + w.first + my_row;
    const float one[2] = {1.0f, 1.0f}, scales[2] = {p.scale, p.scale};
    store_tile_rows<T>(shared.finished(0), my_row, grad_k, scales, row_of<T>(p.grad_k, sequence, w.kv_head, token),
                       p.grad_k.token_stride, rows, static_cast<int>(p.D));
    store_tile_rows<T>(shared.finished(1), my_row, grad_v, one, row_of<T>(p.grad_v, sequence, w.kv_head, token),
                       p.grad_v.token_stride, rows, static_cast<int>(p.Dv));
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(shared.taken(post.stage()));
  }
}

// `counter`: of work, for blocks that take one tile after another; without, a block takes the one of its index.
template <class T, class Layout, Scoring kScoring>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_grad_kv_kernel(const AttentionBackwardParams p, const __grid_constant__ TensorMap k_map,
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
      inspect_tiles(shared, [&](int stage) { clear_absent_queries(shared, stage, worker - 1); });
    else if (lane() == 0)
      produce_queries<is_masked(kScoring)>(p, shared, counted ? counters_of(p) : nullptr, tiles, &k_map, &v_map,
                                                   &q_map, &grad_out_map);
  } else {
    registers_grow<kConsumerRegisters>();
    consume_queries<T, kScoring>(p, shared);
  }
}

}  // namespace llmfast::cuda
