// grad_k, grad_v and grad_q in one pass on Hopper: five products instead of the seven of separate kernels. As in
// hopper_backward_keys.h a block owns 128 keys and walks over tiles of queries; besides
//   dS^T goes through shared memory, since a query's sum runs over the keys of both warpgroups:
//   grad_q[tile] += dS K                 64 x 64 of it a warpgroup
// and each block adds its share to float32 sums in memory, by the copy engine, in L2. The sums' tiles are stored as the
// fragments lie, [warpgroup][4 columns of fragments][thread][4]; a last kernel scales and rounds them.
//
// With kOrdered the blocks of a head take turns at each 128 queries, ascending, so that the sums' bits do not depend on
// the time; the first stores its share, so that nobody zeroes the sums. Blocks get their place from a counter, so that
// whoever is waited for has started: it has a smaller place (tests/native/cuda_tiles.cpp checks that), so the block of
// the smallest place that has not finished never waits. They take tiles of queries descending, so that under a causal
// mask, too, a head's blocks begin with the same tile, one step after another; and the places of several heads
// alternate, so that few blocks of a head begin at once.
//
// Shared memory: K and V; a ring of kStages times Q, grad_out, statistics; two tiles of dS^T; 16 KB a warpgroup on
// their way to the sums. Of warpgroup 2, warp 0 asks for copies, warp 1 inspects, warps 2 and 3 add.
#pragma once
#include "attention/cuda/hopper_backward_keys.h"
#include "ptx/barrier.h"

namespace llmfast::cuda {

template <int kD_, int kQueries_, int kStages_, bool kOrdered_>
struct JointLayout {
  static constexpr int kD = kD_, kQueries = kQueries_, kStages = kStages_, kInspectors = 1;
  static constexpr bool kOrdered = kOrdered_, kDescends = kOrdered;
  static constexpr Overlap kOverlap = Overlap::sums;
  using Own = SlabTile<kOwnRows, kD>;
  using Other = SlabTile<kQueries, kD>;
  using Scores = SlabTile<kOwnRows, kQueries>;  // of keys and queries
  static_assert(kD * kQueries == 8192);
  static constexpr int kShare = 4096, kShareBytes = kShare * 4;  // floats of a tile's sums, of a warpgroup
  static constexpr int kStatisticsBytes = kQueries * static_cast<int>(sizeof(QueryStatistics));
  static constexpr int kStageBytes = 2 * Other::kBytes + kStatisticsBytes;
  static constexpr int kOthersAt = 2 * Own::kBytes, kScoresAt = kOthersAt + 2 * kStages * Other::kBytes;
  static constexpr int kSharesAt = kScoresAt + 2 * Scores::kBytes;
  static constexpr int kStatisticsAt = kSharesAt + kConsumers * kShareBytes;
  static constexpr int kPoisonAt = kStatisticsAt + kStages * kStatisticsBytes;
  static constexpr int kBarriersAt = kPoisonAt + kOwnRows * 4, kBarriers = 9 + 3 * kStages;
  static constexpr int kWorkAt = kBarriersAt + 8 * (kBarriers + 1) / 16 * 16, kWorkBytes = 128;
  static constexpr int kScratchAt = kWorkAt + kWorkBytes, kBytes = kScratchAt + kScratchBytes + kSharedAlignment;
  static_assert(kBytes <= 232448 && kSlotRows % kQueries == 0);

  char* bytes;
  uint32_t base;
  __device__ Own keys() const { return {base}; }
  __device__ Own values() const { return {base + Own::kBytes}; }
  __device__ Other queries(int stage) const { return {base + kOthersAt + 2 * stage * Other::kBytes}; }
  __device__ Other grad_out(int stage) const { return {base + kOthersAt + (2 * stage + 1) * Other::kBytes}; }
  __device__ Scores scores(int buffer) const { return {base + kScoresAt + buffer * Scores::kBytes}; }
  __device__ uint32_t share(int warpgroup) const { return base + kSharesAt + warpgroup * kShareBytes; }
  __device__ uint32_t statistics(int stage) const { return base + kStatisticsAt + stage * kStatisticsBytes; }
  __device__ uint32_t poison() const { return base + kPoisonAt; }
  __device__ uint32_t scratch() const { return base + kScratchAt; }
  __device__ uint32_t barrier(int i) const { return base + kBarriersAt + 8 * i; }
  __device__ uint32_t own() const { return barrier(0); }
  __device__ uint32_t scores_full(int buffer) const { return barrier(1 + buffer); }
  __device__ uint32_t scores_empty(int buffer) const { return barrier(3 + buffer); }
  __device__ uint32_t share_full(int warpgroup) const { return barrier(5 + warpgroup); }
  __device__ uint32_t share_empty(int warpgroup) const { return barrier(7 + warpgroup); }
  __device__ uint32_t full(int stage) const { return barrier(9 + stage); }
  __device__ uint32_t inspected(int stage) const { return barrier(9 + kStages + stage); }
  __device__ uint32_t empty(int stage) const { return barrier(9 + 2 * kStages + stage); }

  __device__ void initialise_barriers() const {
    mbarrier_init(own(), 1);
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(scores_full(i), kConsumerWarps);
      mbarrier_init(scores_empty(i), kConsumerWarps);
      mbarrier_init(share_full(i), kConsumerWarps / kConsumers);
      mbarrier_init(share_empty(i), 1);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(inspected(stage), kInspectors);
      mbarrier_init(empty(stage), kConsumerWarps);
    }
    mbarrier_init_fence();
  }
};

// The sums of a head's queries, behind the statistics: kD floats for each row of a slot.
template <int kD>
__device__ float* query_sums(const AttentionParams& p, int64_t head, const Sequence& sequence) {
  const int64_t rows = p.Hq * slots_of_head(p.B, p.Tq, p.first_q != nullptr) * kSlotRows;
  const auto* const first = reinterpret_cast<const QueryStatistics*>(p.workspace);
  return p.workspace + 2 * rows + kCounters + (slots_of(p, head, sequence) - first) * kD;
}
// Whose turn it is at a tile: how many blocks have added their share. Behind the sums; after the last, the counter of
// places.
template <int kD>
__device__ int* turns_of(const AttentionParams& p, int64_t slot) {
  const int64_t slots = p.Hq * slots_of_head(p.B, p.Tq, p.first_q != nullptr);
  return reinterpret_cast<int*>(p.workspace + slots * kSlotRows * (2 + kD) + kCounters) + slot * kSlotTurns;
}
inline int64_t query_sums_floats(int64_t B, int64_t Hq, int64_t Tq, bool packed, int kD) {
  return Hq * slots_of_head(B, Tq, packed) * (kSlotRows * kD + kSlotTurns) + 4;
}

// Own keys that hold NaN or infinity become zeros, so that they do not spoil the sums of queries that do not see them.
// Each consumer warp looks at its own sixteen, of which it then knows: no need to wait for one warp that looks at all.
template <class T, class Layout>
__device__ __forceinline__ void inspect_own_keys(Layout shared, int first_row) {
  constexpr int kRowChunks = Layout::kD / kChunk, kRowsAStep = kWarpSize / kRowChunks;
  const int my_row = lane() / kRowChunks, my_chunk = lane() % kRowChunks;
#pragma unroll
  for (int i = 0; i < 16; i += kRowsAStep) {
    const uint32_t at = shared.keys().chunk(first_row + i + my_row, my_chunk);
    const uint32_t bad = __ballot_sync(kAllLanes, not_finite<T>(load_shared(at)));
    const bool spoilt = (bad >> (my_row * kRowChunks) & ((1u << kRowChunks) - 1)) != 0;
    if (spoilt) store_shared(at, Bytes16{{0, 0, 0, 0}});
    if (my_chunk == 0) store_shared(shared.poison() + 4 * (first_row + i + my_row), spoilt ? 0x7fc00000u : 0u);
  }
  fence_async_proxy();
  barrier_sync(1, kConsumers * kWarpgroup);  // products of both warpgroups read all keys
}

// Adds a warpgroup's shares to the sums in memory. Its turn is asked for and passed on once for kTurnQueries: either is a
// trip to the L2 cache and back, which takes a good part of a step.
template <class Layout>
__device__ void add_shares(const AttentionParams& p, const KeysWork& w, Layout shared, int warpgroup) {
  constexpr int kQueries = Layout::kQueries, kTurns = kSlotTurns * kQueries / kSlotRows;  // of a tile
  constexpr int kTurnTiles = kTurnQueries / kQueries;
  const Band band{w.sequence.Tq, w.sequence.Tk, p.left, p.right};
  const int tiles = w.end_tile - w.first_tile, block = w.first / kOwnRows;
  int parity = 0;
#pragma unroll 1
  for (int member = 0; member < w.group; ++member) {
    const int head = w.kv_head * w.group + member;
    const int64_t slot = (slots_of(p, head, w.sequence) - slots_of_workspace(p)) / kSlotRows;
    float* const sums = query_sums<Layout::kD>(p, head, w.sequence) + warpgroup * Layout::kShare;
    int* const turns = turns_of<Layout::kD>(p, slot) + warpgroup;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i, parity ^= 1) {
      const int tile = w.tile(shared, i), turn = tile / kTurnTiles * kTurnTiles;
      bool stores = false;  // the first to come: nobody has zeroed the sums
      if (Layout::kOrdered) {
        if (i == 0 || w.tile(shared, i - 1) / kTurnTiles != tile / kTurnTiles) {
          wait_for_turn(turns + turn * kTurns,
                        block - first_block_of_tile(band, turn * kQueries, kTurnQueries, kOwnRows));
          fence_async_proxy_global();
        }
        stores = block == first_block_of_tile(band, tile * kQueries, kQueries, kOwnRows);
      }
      mbarrier_wait(shared.share_full(warpgroup), parity);
      float* const to = sums + int64_t{tile} * (2 * Layout::kShare);
      if (stores) bulk_store_bytes(to, shared.share(warpgroup), Layout::kShareBytes);
      else bulk_add_floats(to, shared.share(warpgroup), Layout::kShareBytes);
      bulk_commit();
      bulk_wait_read<0>();
      mbarrier_arrive(shared.share_empty(warpgroup));
      if (Layout::kOrdered && (i + 1 == tiles || w.tile(shared, i + 1) / kTurnTiles != tile / kTurnTiles)) {
        bulk_wait<0>();
        fence_async_proxy_global();
        add_release(turns + turn * kTurns, 1);
      }
    }
  }
  bulk_wait<0>();
}

template <class T, bool kCapped, class Layout>
__device__ __forceinline__ void consume_jointly(const AttentionBackwardParams& p, const KeysWork& w, Layout shared) {
  constexpr int kD = Layout::kD, kQueries = Layout::kQueries;
  const int warpgroup = uniform(thread() / kWarpgroup), first_row = warpgroup * 64, my_row = warp() * 16;
  const int my_column = lane() % 4 * 2;
  const int first_tile = uniform(w.tile(shared, 0)), tiles = uniform(w.end_tile - w.first_tile);
  const int steps = uniform(w.steps);
  const Span full = {uniform(w.full.begin), uniform(w.full.end)};
  const uint32_t ready = w.inspects ? shared.inspected(0) : shared.full(0);
  const ScoreScale scale(p);
  Span mine[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = w.first + my_row + lane() / 4 + 8 * half;
    mine[half] = key < w.sequence.Tk ? w.band(p).keys_of(key) : Span{0, 0};  // the next sequence's
  }

  float grad_k[kD / 2], grad_v[kD / 2], sums[32];
  // A warpgroup's part of a step's share of grad_q, 64 x 64, over the keys of both: started a step later, when the other
  // one's gradients have long come.
  const auto start_query_sums = [&](int step) {
    constexpr int kQuerySlab = kQueries == 128 ? Layout::Scores::kSlabBytes : 0;
    constexpr int kColumnSlab = kD == 128 ? Layout::Own::kSlabBytes : 0;
    const auto gradients = shared.scores(step & 1);
    mbarrier_wait(shared.scores_full(step & 1), step >> 1 & 1);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < kOwnRows / 16; ++k)
      warpgroup_product<64, T, Major::mn, Major::mn>(sums, advanced(gradients.by_columns(k), warpgroup * kQuerySlab),
                                                     advanced(shared.keys().by_columns(k), warpgroup * kColumnSlab),
                                                     k > 0);
  };
  const auto hand_on_query_sums = [&](int step) {
    if (lane() == 0) mbarrier_arrive(shared.scores_empty(step % 2));
    mbarrier_wait(shared.share_empty(warpgroup), step % 2 ^ 1);
    const uint32_t share = shared.share(warpgroup) + thread() % kWarpgroup * 16;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      store_shared(share + j * (kWarpgroup * 16),
                   Bytes16{{__float_as_uint(sums[4 * j]), __float_as_uint(sums[4 * j + 1]),
                            __float_as_uint(sums[4 * j + 2]), __float_as_uint(sums[4 * j + 3])}});
    fence_async_proxy();
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(shared.share_full(warpgroup));
  };
  RingPlace<Layout::kStages> place;
  int first = first_tile * kQueries, left = tiles;  // query, and tiles of this head
  if (steps > 0) {
    mbarrier_wait(shared.own(), 0);
    inspect_own_keys<T>(shared, my_row);
  }
  float factor[2];  // NaN for a spoilt key: its scores are NaN
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Bytes16 four = load_shared(shared.poison() + (my_row + lane() / 4 + 8 * half) / 4 * 16);
    const uint32_t pair = lane() / 4 % 2 ? four.word[1] : four.word[0];
    const uint32_t other = lane() / 4 % 2 ? four.word[3] : four.word[2];
    factor[half] = scale.product + __uint_as_float(lane() / 4 % 4 < 2 ? pair : other);
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int stage = place.stage, buffer = step % 2, round = step / 2 % 2;
    const auto queries = shared.queries(stage), grad_out = shared.grad_out(stage);
    const Span visible[2] = {{mine[0].begin - first - my_column, mine[0].end - first - my_column},
                             {mine[1].begin - first - my_column, mine[1].end - first - my_column}};
    float scores[kQueries / 2], products[kQueries / 2];
    constexpr uint32_t hidden[kQueries / 64] = {};  // by a mask: there is none
    mbarrier_wait(shared.full(stage), place.parity);
    mbarrier_wait(ready + 8 * stage, place.parity);
    warpgroup_fence();
    start_dots<T>(scores, shared.keys(), first_row, queries);
    warpgroup_commit();
    start_dots<T>(products, shared.values(), first_row, grad_out);
    warpgroup_commit();
    const auto tile_of_scores = shared.scores(buffer);
    const auto share_gradients = [&](const uint32_t (&gradients)[kQueries / 16][4]) {
      mbarrier_wait(shared.scores_empty(buffer), round ^ 1);
#pragma unroll
      for (int k = 0; k < kQueries / 16; ++k)
        stmatrix_x4(tile_of_scores.chunk(my_row + lane() % 16, 2 * k + lane() / 16), gradients[k]);
      fence_async_proxy();
      __syncwarp();
      if (lane() == 0) mbarrier_arrive(shared.scores_full(buffer));
    };
    const bool hides = first < full.begin || first + kQueries > full.end;
    add_step<T, kCapped>(shared, stage, hides, scores, products, factor, scale, visible, hidden, step > 0, grad_k,
                         grad_v, [&](const uint32_t(&gradients)[kQueries / 16][4]) {
                           share_gradients(gradients);
                           // In step 0 of whatever is there, for nobody: with a branch ptxas serialises all products.
                           start_query_sums(step - 1);
                           warpgroup_commit();
                         });
    warpgroup_wait<1>();  // all but grad_k
    if (step > 0) hand_on_query_sums(step - 1);
    warpgroup_wait<0>();
    if (lane() == 0) mbarrier_arrive(shared.empty(stage));
    place.advance();
    first += Layout::kDescends ? -kQueries : kQueries;
    if (--left == 0) first = first_tile * kQueries, left = tiles;
  }
  if (steps > 0) {
    start_query_sums(steps - 1);
    warpgroup_commit();
    warpgroup_wait<0>();
    hand_on_query_sums(steps - 1);
  }
  if (steps == 0) {
    clear(grad_k);
    clear(grad_v);
  }
  // The other warpgroup may still be reading our keys for its last sums: rows of K are not ours alone here.
  barrier_sync(1, kConsumers * kWarpgroup);

  const int rows = w.sequence.Tk - w.first - my_row;
  const int64_t sequence = w.sequence.index, token = w.sequence.first_k + w.first + my_row;
  const float one[2] = {1.0f, 1.0f}, scales[2] = {p.scale, p.scale};
  store_tile_rows<T>(shared.keys(), my_row, grad_k, scales, row_of<T>(p.grad_k, sequence, w.kv_head, token),
                     p.grad_k.token_stride, rows, static_cast<int>(p.D));
  store_tile_rows<T>(shared.values(), my_row, grad_v, one, row_of<T>(p.grad_v, sequence, w.kv_head, token),
                     p.grad_v.token_stride, rows, static_cast<int>(p.Dv));
}

template <class T, class Layout, bool kCapped>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_grad_joint_kernel(const AttentionBackwardParams p, const __grid_constant__ TensorMap k_map,
                                const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap q_map,
                                const __grid_constant__ TensorMap grad_out_map, const int tiles, const int section) {
  char* const bytes = dynamic_shared<char>();
  const uint32_t skip = -shared_address(bytes) % kSharedAlignment;
  const Layout shared{bytes + skip, shared_address(bytes) + skip};
  KeysWork& work = *reinterpret_cast<KeysWork*>(bytes + skip + Layout::kWorkAt);
  static_assert(sizeof(KeysWork) <= Layout::kWorkBytes);
  if (thread() == 0) {
    const int slots = static_cast<int>(p.Hq * slots_of_head(p.B, p.Tq, p.first_q != nullptr));
    const int index = Layout::kOrdered ? atomicAdd(turns_of<Layout::kD>(p, slots), 1) : static_cast<int>(blockIdx.x);
    const int Hkv = static_cast<int>(p.Hkv), heads = p.first_q ? Hkv : Hkv * static_cast<int>(p.B);
    const BlockPlace place = block_place(index, tiles, heads, section);
    work = KeysWork::of(p, shared, place.tile, place.head % Hkv, place.head / Hkv);
    shared.initialise_barriers();
  }
  __syncthreads();
  if (work.nothing()) return;
  if (thread() >= kConsumers * kWarpgroup) {
    registers_shrink<kProducerRegisters>();
    const int worker = warp() - kConsumers * 4;
    if (worker == 0 && lane() == 0 && work.steps > 0) {
      load_own(p, work, shared, shared.own(), &k_map, &v_map);
      RingPlace<Layout::kStages> place;
      load_queries<false>(p, work, shared, place, &q_map, &grad_out_map, [](int, int, int, uint8_t) {});
    }
    if (worker == 1) {
      RingPlace<Layout::kStages> place;
      for (int step = 0; step < work.steps && work.inspects; ++step, place.advance()) {
        mbarrier_wait(shared.full(place.stage), place.parity);
        clear_absent_queries(shared, place.stage, 0);
        __syncwarp();
        if (lane() == 0) mbarrier_arrive(shared.inspected(place.stage));
      }
    }
    if (worker >= 2 && lane() == 0) add_shares(p, work, shared, worker - 2);
  } else {
    registers_grow<kConsumerRegisters>();
    consume_jointly<T, kCapped>(p, work, shared);
  }
}

// Sums to grad_q: a block a warpgroup's share of a tile, 64 queries by 64 columns.
template <class T, int kD>
__global__ void __launch_bounds__(kWarpgroup) round_query_sums_kernel(const AttentionBackwardParams p) {
  constexpr int kQueries = 8192 / kD, kTilesOfSlot = kSlotRows / kQueries;
  const int64_t slot = blockIdx.x / (2 * kTilesOfSlot), head = blockIdx.y;
  const int tile = static_cast<int>(blockIdx.x / 2 % kTilesOfSlot), part = static_cast<int>(blockIdx.x % 2);
  const TokenTile place = slot_place(p, slot);
  const Sequence sequence = sequence_of(p, place.sequence);
  const int first = place.first + tile * kQueries + (kQueries == 128 ? part * 64 : 0) + warp() * 16;
  const int column = kD == 128 ? part * 64 : 0;
  const float* const from = query_sums<kD>(p, head, sequence) +
                            int64_t{place.first + tile * kQueries} * kD + part * 4096 + thread() * 4;
  if (place.first + tile * kQueries >= sequence.Tq) return;
  const QueryStatistics* const statistics = slots_of(p, head, sequence) + first + lane() / 4;
  float sums[32];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Bytes16 four = load_streaming<Bytes16>(from + j * (kWarpgroup * 4));
#pragma unroll
    for (int e = 0; e < 4; ++e)  // a row that passes no gradient has zeros, whatever it holds
      sums[4 * j + e] = statistics[e / 2 * 8].lse == infinity() ? 0.0f : __uint_as_float(four.word[e]);
  }
  char* const bytes = dynamic_shared<char>();
  const SlabTile<64, 64> shared{shared_address(bytes) + (-shared_address(bytes) % kSharedAlignment)};
  const float factor[2] = {p.scale, p.scale};
  const int64_t token = sequence.first_q + first;
  store_tile_rows<T>(shared, warp() * 16, sums, factor,
                     row_of<T>(p.grad_q, place.sequence, head, token) + column, p.grad_q.token_stride,
                     sequence.Tq - first, static_cast<int>(p.D) - column);
}

}  // namespace llmfast::cuda
