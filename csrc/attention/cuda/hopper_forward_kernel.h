// The Hopper attention forward as a template over its tile; attention_fwd_sm90a.cu says what it does and chooses.
#pragma once
#include "attention/cuda/hopper_forward_consumer.h"
#include "core/cuda_launch.h"

namespace llmfast::cuda {

// ---- producer -------------------------------------------------------------------------------------------------------

// One warp finds work and posts it.
template <class Tile, Masking kMasking>
__device__ __forceinline__ void hand_out_work(const HopperForwardParams& p, uint32_t base) {
  const int works = p.order.count(), blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  RingPlace<2> slot;
  HopperWork work;
  int round = 0, masks[2] = {-1, -1};  // whose bits stand beside each
  for (bool found = true; found; slot.advance()) {
    for (found = false; !found && round * blocks < works; ++round) {
      const int index = ForwardOrder::share(round, block, blocks);
      found = index < works && find_work<Tile, kMasking>(p, index, work);
    }
    if (!found) work.end_tile = -1;
    mbarrier_wait(base + Tile::kWorkEmpty + 8 * slot.stage, slot.parity ^ 1);
    if (kMasking == Masking::boolean && found && is_of_keys(p.mask)) {
      const uint32_t bits = base + Tile::kMaskAt + slot.stage * (Tile::kMaskKeys / 8);
      const int heads = p.mask.head_stride ? static_cast<int>(p.Hq) : 1;
      const int mask = work.sequence * heads + work.head % heads;
      if ((slot.stage ? masks[1] : masks[0]) != mask) note_mask(p, work, bits);
      (slot.stage ? masks[1] : masks[0]) = mask;
      narrow<Tile>(work, bits);
    }
    __syncwarp();
    if (lane() == 0) {
      post(base + Tile::kWorkAt + 64 * slot.stage, work);
      mbarrier_arrive(base + Tile::kWorkFull + 8 * slot.stage);
    }
  }
}

// One thread copies: K one tile ahead of V, from the last tile to the first. Q comes after the first K, for which there
// is place while the tile before still needs its Q.
template <class Tile>
__device__ __forceinline__ void produce(const HopperForwardParams& p, const TensorMap* q, const TensorMap* k,
                                        const TensorMap* v, uint32_t base) {
  RingPlace<2> slot;
  RingPlace<1> query;
  RingPlace<Tile::kKeyStages> key;
  RingPlace<Tile::kValueStages> value;
  for (;; slot.advance()) {
    mbarrier_wait(base + Tile::kWorkFull + 8 * slot.stage, slot.parity);
    const HopperWork work = posted(base + Tile::kWorkAt + 64 * slot.stage);
    mbarrier_arrive(base + Tile::kWorkEmpty + 8 * slot.stage);
    if (work.end_tile < 0) return;
    if (work.empty()) {
      if (!Tile::kOutApart) {  // the output needs the place of Q
        mbarrier_wait(base + Tile::kQueriesEmpty, query.parity ^ 1);
        mbarrier_arrive(base + Tile::kQueriesFull);
        query.advance();
      }
      continue;
    }
    const int sequence = p.first_q ? 0 : work.sequence;
    const auto load = [&](uint32_t to, uint32_t full, const TensorMap* map, int tile,
                          HopperForwardParams::Steps steps) {
      mbarrier_arrive_expect(full, Tile::kKeyBytes);
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel)
        bulk_load(to + panel * Tile::kKeyPanel, map, full, panel * kPanel, work.first_k + tile * Tile::kKeys,
                  work.kv_head * steps.head, sequence * steps.sequence);
    };
    // Round `tile` brings K of this tile and V of the one before.
#pragma unroll 1
    for (int tile = work.end_tile - 1; tile >= work.first_tile - 1; --tile) {
      if (tile >= work.first_tile) {
        mbarrier_wait(base + Tile::kKeysEmpty + 8 * key.stage, key.parity ^ 1);
        load(base + Tile::kKeysAt + key.stage * Tile::kKeyBytes, base + Tile::kKeysFull + 8 * key.stage, k, tile,
             p.k_steps);
        key.advance();
      }
      if (tile == work.end_tile - 1) {
        mbarrier_wait(base + Tile::kQueriesEmpty, query.parity ^ 1);
        mbarrier_arrive_expect(base + Tile::kQueriesFull, Tile::kQueryBytes);
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; ++panel)
          bulk_load(base + panel * Tile::kQueryPanel, q, base + Tile::kQueriesFull, panel * kPanel,
                    work.first_q + work.first_row, work.head * p.q_steps.head, sequence * p.q_steps.sequence);
        query.advance();
      } else {
        mbarrier_wait(base + Tile::kValuesEmpty + 8 * value.stage, value.parity ^ 1);
        load(base + Tile::kValuesAt + value.stage * Tile::kKeyBytes, base + Tile::kValuesFull + 8 * value.stage, v,
             tile + 1, p.v_steps);
        value.advance();
      }
    }
  }
}

// Whole warps: V of tiles that hide something. They see every tile pass, as readers of V, so that
// they are never a round of the ring ahead or behind.
template <class T, class Tile>
__device__ __forceinline__ void search(uint32_t base, int searcher) {
  RingPlace<2> slot;
  RingPlace<Tile::kValueStages> value;
  for (;; slot.advance()) {
    mbarrier_wait(base + Tile::kWorkFull + 8 * slot.stage, slot.parity);
    const HopperWork work = posted(base + Tile::kWorkAt + 64 * slot.stage);
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(base + Tile::kWorkEmpty + 8 * slot.stage);
    if (work.end_tile < 0) return;
#pragma unroll 1
    for (int tile = work.end_tile - 1; tile >= work.first_tile; --tile, value.advance()) {
      mbarrier_wait(base + Tile::kValuesFull + 8 * value.stage, value.parity);
      if (work.hides(tile)) {
        search_values<T, Tile>(base + Tile::kValuesAt + value.stage * Tile::kKeyBytes,
                               base + Tile::kBadAt + value.stage * Tile::kWords * 4, searcher);
        if (lane() == 0) mbarrier_arrive(base + Tile::kValuesSearched + 8 * value.stage);
      }
      if (lane() == 0) mbarrier_arrive(base + Tile::kValuesEmpty + 8 * value.stage);
    }
  }
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <class T, class Tile, Masking kMasking>
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
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(base + Tile::kWorkFull + 8 * i, 1);
      mbarrier_init(base + Tile::kWorkEmpty + 8 * i, kReaders + kSearchers + 1);
    }
    mbarrier_init_fence();
    for (const TensorMap* map : {&q, &k, &v, &out}) prefetch_map(map);
  }
  __syncthreads();
  if (thread() < kWarpgroup) {
    registers_shrink<Tile::kProducerRegisters>();
    if (warp() >= 2) search<T, Tile>(base, warp() - 2);
    else if (thread() == 0) produce<Tile>(p, &q, &k, &v, base);
    else if (warp() == 1) hand_out_work<Tile, kMasking>(p, base);
  } else {
    registers_grow<Tile::kConsumerRegisters>();
    Consumer<T, Tile, kMasking>(p, base, warp() / 4 - 1).run(&out);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Heads of all sequences as a tensor of four dimensions. One along which nothing moves has size 1.
inline MappedTensor mapped_heads(const HeadTensor& t, int64_t D, int64_t tokens, int64_t heads, int64_t sequences,
                                 int box_rows) {
  MappedTensor m{t.data,
                 t.dtype,
                 4,
                 {D, tokens, heads, sequences},
                 {1, t.token_stride, t.head_stride, t.sequence_stride},
                 {kPanel, box_rows, 1, 1},
                 Swizzle::bytes128};
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

// The order of work of `blocks` blocks.
template <class Tile>
ForwardOrder order_of(const AttentionParams& p, int blocks) {
  const int64_t group = p.Hq / p.Hkv, sequences = p.first_q ? 1 : p.B, units = sequences * p.Hkv;
  const int64_t tiles = tile_count(p.B, p.Tq, p.first_q != nullptr, Tile::kRows) / (p.first_q ? 1 : p.B);
  const bool lengths_differ = p.right < p.Tk / 2 && p.left >= p.Tk / 2;
  constexpr bool kUneven = Tile::kConsumers > 2;  // 192 queries against 128 keys: steps of 1 and 2
  const int sections = forward_sections(units, group, tiles, lengths_differ, kUneven, blocks);
  return {static_cast<int>(units), static_cast<int>(group), static_cast<int>(tiles), sections};
}

// Masking::boolean has room for so many bits of keys; it reads rows in pieces of 16 bytes.
template <class Tile>
Masking masking_of(const AttentionParams& p) {
  const MaskTensor& m = p.mask;
  if (p.softcap > 0.0f || !(p.scale > 0.0f)) return Masking::anything;
  if (!m.data) return Masking::band;
  if (m.dtype != DType::boolean) return Masking::anything;
  if (is_of_keys(m)) return p.Tk <= Tile::kMaskKeys ? Masking::boolean : Masking::anything;
  const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.query_stride % 16 == 0 &&
                       m.head_stride % 16 == 0 && m.sequence_stride % 16 == 0;
  return Tile::kRowMasks && m.key_stride == 1 && aligned ? Masking::boolean : Masking::anything;
}

// `sections` 0: as order_of() says.
template <class T, class Tile, Masking kMasking>
void launch_hopper_forward(const AttentionParams& params, const Stream& stream, int blocks, int sections = 0) {
  HopperForwardParams p;
  static_cast<AttentionParams&>(p) = params;
  p.order = order_of<Tile>(p, blocks);
  if (sections) p.order.sections = sections;
  p.q_steps = steps_of(p.q), p.k_steps = steps_of(p.k), p.v_steps = steps_of(p.v);
  const HopperForwardTensors t(p, Tile::kRows, Tile::kKeys);
  const int works = p.order.count();
  launch(stream, {static_cast<unsigned>(works < blocks ? works : blocks)}, Tile::kThreads, size_t{Tile::kBytes},
         hopper_forward_kernel<T, Tile, kMasking>, p, make_tensor_map(t.q), make_tensor_map(t.k), make_tensor_map(t.v),
         make_tensor_map(t.out));
}

}  // namespace llmfast::cuda
