// The Hopper attention forward as a template over its tile; attention_fwd_sm90a.cu says what it does and chooses.
#pragma once
#include "attention/cuda/hopper_forward.h"
#include "core/cuda_launch.h"

namespace llmfast::cuda {

// ---- producer --------------------------------------------------------------------------------------------------------

// One thread: Q, then K one tile ahead of V, from the last tile to the first.
template <class Tile>
__device__ __forceinline__ void produce(const HopperForwardParams& p, const TensorMap* q, const TensorMap* k,
                                        const TensorMap* v, uint32_t base, int64_t works) {
  RingPlace<1> query;
  RingPlace<Tile::kKeyStages> key;
  RingPlace<Tile::kValueStages> value;
  for_each_work(works, [&](int64_t index) {
    const HopperWork work(p, index, Tile::kRows, Tile::kKeys);
    if (!work.exists() || work.empty()) return;
    const int sequence = p.first_q ? 0 : static_cast<int>(work.sequence);
    const int head = static_cast<int>(work.head), kv_head = static_cast<int>(work.kv_head);

    mbarrier_wait(base + Tile::kQueriesEmpty, query.parity ^ 1);
    mbarrier_arrive_expect(base + Tile::kQueriesFull, Tile::kQueryBytes);
    for (int panel = 0; panel < Tile::kPanels; ++panel)
      bulk_load(base + panel * Tile::kQueryPanel, q, base + Tile::kQueriesFull, panel * kPanel,
                static_cast<int>(work.tokens.first_q) + work.first_row, head * p.q_steps.head,
                sequence * p.q_steps.sequence);
    query.advance();

    const int first_k = static_cast<int>(work.tokens.first_k);
    const auto load_keys = [&](int tile) {
      const uint32_t full = base + Tile::kKeysFull + 8 * key.stage;
      mbarrier_wait(base + Tile::kKeysEmpty + 8 * key.stage, key.parity ^ 1);
      mbarrier_arrive_expect(full, Tile::kKeyBytes);
      for (int panel = 0; panel < Tile::kPanels; ++panel)
        bulk_load(base + Tile::kKeysAt + key.stage * Tile::kKeyBytes + panel * Tile::kKeyPanel, k, full, panel * kPanel,
                  first_k + tile * Tile::kKeys, kv_head * p.k_steps.head, sequence * p.k_steps.sequence);
      key.advance();
    };
    const auto load_values = [&](int tile) {
      const uint32_t full = base + Tile::kValuesFull + 8 * value.stage;
      mbarrier_wait(base + Tile::kValuesEmpty + 8 * value.stage, value.parity ^ 1);
      mbarrier_arrive_expect(full, Tile::kKeyBytes);
      for (int panel = 0; panel < Tile::kPanels; ++panel)
        bulk_load(base + Tile::kValuesAt + value.stage * Tile::kKeyBytes + panel * Tile::kKeyPanel, v, full,
                  panel * kPanel, first_k + tile * Tile::kKeys, kv_head * p.v_steps.head,
                  sequence * p.v_steps.sequence);
      value.advance();
    };
    load_keys(work.end_tile - 1);
    for (int tile = work.end_tile - 1; tile >= work.first_tile; --tile) {
      if (tile > work.first_tile) load_keys(tile - 1);
      load_values(tile);
    }
  });
}

// The warps beside the producer's: V of tiles that hide something. They see every tile pass, as readers of V, so that
// they are never a round of the ring ahead or behind.
template <class T, class Tile>
__device__ __forceinline__ void search(const HopperForwardParams& p, uint32_t base, int64_t works, int searcher) {
  RingPlace<Tile::kValueStages> value;
  for_each_work(works, [&](int64_t index) {
    const HopperWork work(p, index, Tile::kRows, Tile::kKeys);
    if (!work.exists()) return;
    for (int tile = work.end_tile - 1; tile >= work.first_tile; --tile, value.advance()) {
      mbarrier_wait(base + Tile::kValuesFull + 8 * value.stage, value.parity);
      if (work.hides(tile, Tile::kKeys)) {
        search_values<T, Tile>(base + Tile::kValuesAt + value.stage * Tile::kKeyBytes,
                               base + Tile::kBadAt + value.stage * Tile::kWords * 4, searcher);
        if (lane() == 0) mbarrier_arrive(base + Tile::kValuesSearched + 8 * value.stage);
      }
      if (lane() == 0) mbarrier_arrive(base + Tile::kValuesEmpty + 8 * value.stage);
    }
  });
}

// ---- consumer --------------------------------------------------------------------------------------------------------

// What a consumer warpgroup carries from tile to tile.
template <class T, class Tile, bool kFinished>
struct Consumer {
  const HopperForwardParams& p;
  const uint32_t base;
  const int group;  // which warpgroup of the consumers
  const ScoreScale scale;
  RingPlace<1> query;
  RingPlace<Tile::kKeyStages> key;
  RingPlace<Tile::kValueStages> value;
  uint32_t searched = 0;  // parities of kValuesSearched, a bit for each stage

  __device__ Consumer(const HopperForwardParams& p, uint32_t base, int group)
      : p(p), base(base), group(group), scale(p) {}

  __device__ __forceinline__ void release(int barrier) const {
    if (lane() == 0) mbarrier_arrive(base + barrier);
  }
  __device__ __forceinline__ void meet_group() const { barrier_sync(1 + group, kWarpgroup); }

  // The tensor cores go round among the warpgroups, so that one's softmax runs under another's products.
  __device__ __forceinline__ void await_turn() const {
    if constexpr (Tile::kTurns) barrier_sync(1 + Tile::kConsumers + group, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (Tile::kTurns)
      barrier_arrive(1 + Tile::kConsumers + (group + 1) % Tile::kConsumers, 2 * kWarpgroup);
  }

  __device__ __forceinline__ uint32_t queries() const { return base + group * kGroupRows * 128; }
  __device__ __forceinline__ void start_scores(float (&scores)[Tile::kKeys / 2]) {
    issue_scores<T, Tile>(scores, queries(), base + Tile::kKeysAt + key.stage * Tile::kKeyBytes);
  }
  __device__ __forceinline__ void start_values(float (&out)[Tile::kD / 2],
                                               const uint32_t (&weights)[Tile::kKeys / 16][4]) {
    issue_values<T, Tile>(out, weights, base + Tile::kValuesAt + value.stage * Tile::kKeyBytes);
  }
  __device__ __forceinline__ void await_keys() const {
    mbarrier_wait(base + Tile::kKeysFull + 8 * key.stage, key.parity);
  }
  __device__ __forceinline__ void await_values() const {
    mbarrier_wait(base + Tile::kValuesFull + 8 * value.stage, value.parity);
  }
  __device__ __forceinline__ void release_keys() {
    release(Tile::kKeysEmpty + 8 * key.stage);
    key.advance();
  }
  __device__ __forceinline__ void release_values() {
    release(Tile::kValuesEmpty + 8 * value.stage);
    value.advance();
  }

  __device__ __forceinline__ int my_row(const HopperWork& work, int half) const {
    return work.first_row + group * kGroupRows + warp() % 4 * 16 + lane() / 4 + 8 * half;
  }

  // Before the products with a tile that hides something: its keys beyond the band, and its values with NaN.
  __device__ __forceinline__ void hide(float (&scores)[Tile::kKeys / 2], const HopperWork& work, int tile) const {
    const Band band{work.tokens.Tq, work.tokens.Tk, p.left, p.right};
    const Span visible[2] = {band.keys_of(my_row(work, 0)), band.keys_of(my_row(work, 1))};
    hide_outside(as_fragments(scores), visible, tile * Tile::kKeys);
  }
  __device__ __forceinline__ void add_bad(float (&out)[Tile::kD / 2], const float (&weights)[Tile::kKeys / 2],
                                          const HopperWork& work, int tile) {
    mbarrier_wait(base + Tile::kValuesSearched + 8 * value.stage, searched >> value.stage & 1);
    searched ^= 1u << value.stage;
    const uint32_t mask = base + Tile::kBadAt + value.stage * Tile::kWords * 4;
    uint32_t any = 0;
#pragma unroll
    for (int word = 0; word < Tile::kWords; word += 4) {
      const Bytes16 words = load_shared(mask + word * 4);
      any |= words.word[0] | words.word[1] | words.word[2] | words.word[3];
    }
    if (any)
      add_bad_values<T, Tile>(out, weights, mask,
                              row_of<const T>(p.v, work.sequence, work.kv_head,
                                              work.tokens.first_k + int64_t{tile} * Tile::kKeys),
                              p.v.token_stride, static_cast<int>(p.Dv));
  }

  // Products, softmax and products of one tile, one after the other.
  __device__ __forceinline__ void step(const HopperWork& work, int tile, float (&out)[Tile::kD / 2],
                                       HopperSoftmax& softmax) {
    float scores[Tile::kKeys / 2], keep[2];
    uint32_t weights[Tile::kKeys / 16][4];
    await_keys();
    warpgroup_fence();
    start_scores(scores);
    warpgroup_wait<0>();
    pin_registers(scores);
    release_keys();
    const bool hides = work.hides(tile, Tile::kKeys);
    if constexpr (kFinished) scale_scores(as_fragments(scores), scale);
    if (hides) hide(scores, work, tile);
    softmax.update(scores, scale.factor(), keep);
    scale_rows(out, keep);
    await_values();
    if (hides) add_bad(out, scores, work, tile);
    pack_weights<T>(weights, scores);
    warpgroup_fence();
    start_values(out, weights);
    warpgroup_wait<0>();
    pin_registers(out);
    release_values();
  }

  // out / sum by way of shared memory, and lse.
  __device__ __forceinline__ void finish(const HopperWork& work, float (&out)[Tile::kD / 2], HopperSoftmax& softmax,
                                         const TensorMap* out_map) {
    const bool elected = thread() % kWarpgroup == 0;
    const int first = work.first_row + group * kGroupRows;
    softmax.finish();
    const float factor[2] = {softmax.inverse(0), softmax.inverse(1)};
    scale_rows(out, factor);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = my_row(work, half);
      if (lane() % 4 == 0 && row < work.tokens.Tq)
        *row_of<float>(p.lse, work.sequence, work.head, work.tokens.first_q + row) =
            natural_lse(softmax.highest[half], softmax.sum[half]);
    }

    const uint32_t staged = base + Tile::kOutAt + group * kGroupRows * 128;
    if (elected) bulk_wait_read<0>();  // the tile before has left
    meet_group();
    const int row = warp() % 4 * 16 + lane() % 16;
#pragma unroll
    for (int c = 0; c < Tile::kD; c += 16) {
      const uint32_t words[4] = {pack_pair<T>(out[c / 2], out[c / 2 + 1]), pack_pair<T>(out[c / 2 + 2], out[c / 2 + 3]),
                                 pack_pair<T>(out[c / 2 + 4], out[c / 2 + 5]),
                                 pack_pair<T>(out[c / 2 + 6], out[c / 2 + 7])};
      const int chunk = c % kPanel / kChunk + lane() / 16;
      stmatrix_x4(staged + c / kPanel * Tile::kQueryPanel + row * 128 + (chunk ^ row % 8) * 16, words);
    }
    const int rows = work.end_row - first;
    if (!p.first_q || rows >= kGroupRows) {
      fence_async_proxy();
      meet_group();
      if (elected && rows > 0) {
        const int sequence = p.first_q ? 0 : static_cast<int>(work.sequence);
        for (int panel = 0; panel * kPanel < static_cast<int>(p.Dv); ++panel)
          bulk_store(out_map, staged + panel * Tile::kQueryPanel, panel * kPanel,
                     static_cast<int>(work.tokens.first_q) + first, static_cast<int>(work.head), sequence);
        bulk_commit();
      }
    } else {  // the rows below belong to the next sequence
      meet_group();
      T* const to = row_of<T>(p.out, work.sequence, work.head, work.tokens.first_q + first);
      const int Dv = static_cast<int>(p.Dv);
      for (int i = thread() % kWarpgroup; i < rows * (Tile::kD / kChunk); i += kWarpgroup) {
        const int r = i / (Tile::kD / kChunk), chunk = i % (Tile::kD / kChunk), cols = Dv - chunk * kChunk;
        if (cols <= 0) continue;
        const Bytes16 bytes = load_shared(staged + chunk / 8 * Tile::kQueryPanel + r * 128 + (chunk % 8 ^ r % 8) * 16);
        T* const target = to + r * p.out.token_stride + chunk * kChunk;
        if (cols >= kChunk) {
          store(target, bytes);
        } else {
#pragma unroll
          for (int j = 0; j < kChunk; ++j)
            if (j < cols) target[j] = T{static_cast<uint16_t>(bytes.word[j / 2] >> (j % 2 * 16))};
        }
      }
      meet_group();
    }
  }

  __device__ __forceinline__ void run(const TensorMap* out_map, int64_t works) {
    for_each_work(works, [&](int64_t index) {
      const HopperWork work(p, index, Tile::kRows, Tile::kKeys);
      if (!work.exists()) return;
      float out[Tile::kD / 2];
#pragma unroll
      for (int i = 0; i < Tile::kD / 2; ++i) out[i] = 0.0f;
      HopperSoftmax softmax;
      if (!work.empty()) {
        mbarrier_wait(base + Tile::kQueriesFull, query.parity);
        for (int tile = work.end_tile - 1; tile >= work.first_tile; --tile) step(work, tile, out, softmax);
        if (Tile::kOutApart) release(Tile::kQueriesEmpty);
        query.advance();
      }
      finish(work, out, softmax, out_map);
      if (!Tile::kOutApart && !work.empty()) {
        if (thread() % kWarpgroup == 0) bulk_wait_read<0>();
        meet_group();
        release(Tile::kQueriesEmpty);
      }
    });
    if (thread() % kWarpgroup == 0) bulk_wait<0>();
  }
};

// ---- kernel ----------------------------------------------------------------------------------------------------------

template <class T, class Tile, bool kFinished>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    hopper_forward_kernel(const HopperForwardParams p, const __grid_constant__ TensorMap q,
                          const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                          const __grid_constant__ TensorMap out) {
  const uint32_t base = (shared_address(dynamic_shared<char>()) + 1023) & ~1023u;
  if (thread() == 0) {
    constexpr int kReaders = Tile::kConsumers * 4;  // warps
    mbarrier_init(base + Tile::kQueriesFull, 1);
    mbarrier_init(base + Tile::kQueriesEmpty, kReaders);
    for (int i = 0; i < Tile::kKeyStages; ++i) {
      mbarrier_init(base + Tile::kKeysFull + 8 * i, 1);
      mbarrier_init(base + Tile::kKeysEmpty + 8 * i, kReaders);
    }
    for (int i = 0; i < Tile::kValueStages; ++i) {
      mbarrier_init(base + Tile::kValuesFull + 8 * i, 1);
      mbarrier_init(base + Tile::kValuesEmpty + 8 * i, kReaders + kSearchers);
      mbarrier_init(base + Tile::kValuesSearched + 8 * i, kSearchers);
    }
    mbarrier_init_fence();
    for (const TensorMap* map : {&q, &k, &v, &out}) prefetch_map(map);
  }
  __syncthreads();
  const int64_t works = p.query_tiles * p.Hq;
  if (thread() < kWarpgroup) {
    registers_shrink<Tile::kProducerRegisters>();
    if (thread() == 0) produce<Tile>(p, &q, &k, &v, base, works);
    else if (warp() > 0) search<T, Tile>(p, base, works, warp() - 1);
  } else {
    registers_grow<Tile::kConsumerRegisters>();
    Consumer<T, Tile, kFinished>(p, base, warp() / 4 - 1).run(&out, works);
  }
}

// ---- host ------------------------------------------------------------------------------------------------------------

// Heads of all sequences as a tensor of four dimensions. One along which nothing moves has size 1.
inline MappedTensor mapped_heads(const HeadTensor& t, int64_t D, int64_t tokens, int64_t heads, int64_t sequences,
                                 int box_rows) {
  MappedTensor m{t.data, t.dtype, 4, {D, tokens, heads, sequences}, {1, t.token_stride, t.head_stride, t.sequence_stride},
                 {kPanel, box_rows, 1, 1}, Swizzle::bytes128};
  if (tokens == 1) m.stride[1] = kPanel;
  for (int i = 2; i < 4; ++i)
    if (m.size[i] == 1 || m.stride[i] == 0) m.size[i] = 1, m.stride[i] = kPanel;
  return m;
}
inline HopperForwardParams::Steps steps_of(const HeadTensor& t) {
  return {t.sequence_stride != 0, t.head_stride != 0};
}

struct HopperForwardTensors {
  MappedTensor q, k, v, out;

  HopperForwardTensors(const AttentionParams& p, int rows, int keys) {
    const int64_t sequences = p.first_q ? 1 : p.B;
    q = mapped_heads(p.q, p.D, p.Tq, p.Hq, sequences, rows);
    k = mapped_heads(p.k, p.D, p.Tk, p.Hkv, sequences, keys);
    v = mapped_heads(p.v, p.Dv, p.Tk, p.Hkv, sequences, keys);
    out = mapped_heads(p.out, p.Dv, p.Tq, p.Hq, sequences, kGroupRows);
  }
  bool fit(const AttentionParams& p) const {
    const bool out_moves = (p.out.head_stride != 0 || p.Hq == 1) && (p.out.sequence_stride != 0 || out.size[3] == 1);
    return can_map(q) && can_map(k) && can_map(v) && can_map(out) && out_moves;
  }
};

// `blocks`: of the grid; 0: one for each piece of work.
template <class T, class Tile>
void launch_hopper_forward(const AttentionParams& params, const Stream& stream, int blocks) {
  HopperForwardParams p;
  static_cast<AttentionParams&>(p) = params;
  p.query_tiles = tile_count(p.B, p.Tq, p.first_q != nullptr, Tile::kRows);
  p.q_steps = steps_of(p.q), p.k_steps = steps_of(p.k), p.v_steps = steps_of(p.v);
  const HopperForwardTensors t(p, Tile::kRows, Tile::kKeys);
  const int64_t works = p.query_tiles * p.Hq;
  const bool finished = p.softcap > 0.0f || !(p.scale > 0.0f);
  launch(stream, {static_cast<unsigned>(blocks == 0 || works < blocks ? works : blocks)}, Tile::kThreads,
         size_t{Tile::kBytes},
         finished ? hopper_forward_kernel<T, Tile, true> : hopper_forward_kernel<T, Tile, false>, p,
         make_tensor_map(t.q), make_tensor_map(t.k), make_tensor_map(t.v), make_tensor_map(t.out));
}

}  // namespace llmfast::cuda
