// What a consumer warpgroup of the Hopper attention forward does: its 64 queries of a tile against all their keys.
#pragma once
#include "attention/cuda/hopper_forward_values.h"

namespace llmfast::cuda {

// What it carries from tile to tile. `out` and `scores` are accumulators: loops over them are unrolled, and everything
// that takes them is inlined, so that they stay in registers.
template <class T, class Tile, Masking kMasking>
struct Consumer {
  static constexpr bool kFinished = kMasking == Masking::anything;  // scores, before softmax: see ScoreScale
  using Scores = float[Tile::kKeys / 2];
  using Out = float[Tile::kD / 2];
  using Weights = uint32_t[Tile::kKeys / 16][4];

  const HopperForwardParams& p;
  const uint32_t base;
  const int group;  // which of the consumers
  const ScoreScale scale;
  uint32_t slot = 0;  // shared address of the work
  RingPlace<Tile::kKeyStages> key;
  RingPlace<Tile::kValueStages> value;
  uint32_t searched = 0;  // parities of kValuesSearched, a bit for each stage

  __device__ Consumer(const HopperForwardParams& p, uint32_t base, int group)
      : p(p), base(base), group(group), scale(p) {}

  __device__ __forceinline__ float factor() const { return kFinished ? 1.0f : scale.product; }

  // ---- waiting and letting go
  __device__ __forceinline__ void release(int barrier) const {
    if (lane() == 0) mbarrier_arrive(base + barrier);
  }
  __device__ __forceinline__ void meet_group() const { barrier_sync(1 + group, kWarpgroup); }
  // The tensor cores go round among the warpgroups, so that one's softmax runs under another's products.
  __device__ __forceinline__ void await_turn() const {
    barrier_sync(1 + Tile::kConsumers + group, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void give_turn(int to) const {
    barrier_arrive(1 + Tile::kConsumers + to, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void pass_turn() const { give_turn(group + 1 == Tile::kConsumers ? 0 : group + 1); }
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

  // Q has been read for the last time: the next tile's may come while this one's softmax and output go on.
  __device__ __forceinline__ void release_queries(bool last) const {
    if (Tile::kOutApart && last) release(Tile::kQueriesEmpty);
  }

  // ---- products
  __device__ __forceinline__ void start_scores(Scores& scores) const {
    warpgroup_fence();
    issue_scores<T, Tile>(scores, base + group * kGroupRows * 128,
                          base + Tile::kKeysAt + key.stage * Tile::kKeyBytes);
  }
  __device__ __forceinline__ void start_values(Out& out, const Weights& weights) const {
    warpgroup_fence();
    issue_values<T, Tile>(out, weights, base + Tile::kValuesAt + value.stage * Tile::kKeyBytes);
  }

  // ---- tiles that hide something
  __device__ __forceinline__ int my_row(int half) const {  // of the tile
    return group * kGroupRows + warp() % 4 * 16 + lane() / 4 + 8 * half;
  }
  __device__ __forceinline__ void hide(Scores& scores, int tile) const {
    const HopperWork work = posted(slot);
    const Span visible[2] = {work.keys_of(my_row(0)), work.keys_of(my_row(1))};
    hide_outside(as_fragments(scores), visible, tile * Tile::kKeys);
    if constexpr (kMasking == Masking::boolean) hide_masked(scores, tile);
  }
  __device__ __forceinline__ void hide_masked(Scores& scores, int tile) const {
    if (Tile::kRowMasks && !is_of_keys(p.mask)) return;
    const uint32_t bits = base + Tile::kMaskAt + (slot - base - Tile::kWorkAt) / 64 * (Tile::kMaskKeys / 8);
#pragma unroll
    for (int j = 0; j < Tile::kKeys / 8; j += 2) {
      const uint32_t mine = mask_piece(bits, tile * Tile::kKeys + 8 * j) >> lane() % 4 * 2;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (!(mine >> (8 * (i / 4) + i % 2) & 1)) scores[4 * j + i] = -infinity();
    }
  }
  // A boolean mask of rows: what it says about this thread's two rows and every fourth 16 keys of the tile; the other
  // keys are with the row's other three lanes.
  __device__ __forceinline__ void read_mask(uint32_t (&bits)[2], int tile) const {
    constexpr int kPieces = Tile::kKeys / 16;
    const HopperWork work = posted(slot);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = work.first_row + my_row(half), read = row < work.end_row ? row : work.end_row - 1;
      const char* const mask = mask_element(p, work.sequence, work.head, read, 0);
      bits[half] = 0;
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += 4)
        if (piece + lane() % 4 < kPieces)
          bits[half] |= mask_bits(mask, tile * Tile::kKeys + 16 * (piece + lane() % 4), work.Tk) << 4 * piece;
    }
  }
  // Whether the mask lets any row of this warpgroup see any key of the tile. The word of each warp stands where masks
  // of keys have their bits; two places in turn, since a slow warp may still read when a fast one is at the next tile.
  __device__ __forceinline__ bool group_sees(const uint32_t (&bits)[2], int tile) const {
    const uint32_t votes = base + Tile::kMaskAt + tile % 2 * 128 + group * 16;
    const bool any = __any_sync(kAllLanes, (bits[0] | bits[1]) != 0);
    if (lane() == 0) store_shared(votes + warp() % 4 * 4, any ? 1u : 0u);
    meet_group();
    const Bytes16 all = load_shared(votes);
    return (all.word[0] | all.word[1] | all.word[2] | all.word[3]) != 0;
  }
  __device__ __forceinline__ void hide_in_rows(Scores& scores, const uint32_t (&bits)[2]) const {
    constexpr int kPieces = Tile::kKeys / 16;
#pragma unroll
    for (int from = 0; from < 4; ++from)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t mine = __shfl_sync(kAllLanes, bits[half], lane() / 4 * 4 + from) >> lane() % 4 * 2;
#pragma unroll
        for (int piece = from; piece < kPieces; piece += 4)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (!(mine >> (4 * (piece - from) + 8 * (i / 2) + i % 2) & 1))
              scores[8 * piece + 4 * (i / 2) + 2 * half + i % 2] = -infinity();
      }
  }
  // Scores as they are before softmax; with a mask tensor, every tile is one that hides something.
  __device__ __forceinline__ void finish_scores(Scores& scores, int tile) const {
    if constexpr (!kFinished) return;
    scale_scores(as_fragments(scores), scale);
    if (!p.mask.data) return;
    const HopperWork work = posted(slot);
    const int first = work.first_row + group * kGroupRows + warp() % 4 * 16;
    add_mask(as_fragments(scores), mask_rows<false>(p, work.sequence, work.head, first, work.end_row - 1, work.Tk),
             tile * Tile::kKeys);
  }
  __device__ __forceinline__ void await_search() {
    mbarrier_wait(base + Tile::kValuesSearched + 8 * value.stage, searched >> value.stage & 1);
    searched ^= 1u << value.stage;
  }
  __device__ __forceinline__ void add_bad(Out& out, const Scores& weights, int tile) {
    await_search();
    const uint32_t mask = base + Tile::kBadAt + value.stage * Tile::kWords * 4;
    uint32_t any = 0;
#pragma unroll
    for (int word = 0; word < Tile::kWords; word += 4) {
      const Bytes16 words = load_shared(mask + word * 4);
      any |= words.word[0] | words.word[1] | words.word[2] | words.word[3];
    }
    if (!any) return;
    const HopperWork work = posted(slot);
    add_bad_values<T, Tile>(
        out, weights, mask,
        row_of<const T>(p.v, work.sequence, work.kv_head, int64_t{work.first_k} + int64_t{tile} * Tile::kKeys),
        p.v.token_stride, static_cast<int>(p.Dv));
  }

  // ---- the loop over keys
  __device__ __forceinline__ void pass_by(bool last) {  // a tile that hides all
    await_keys();
    release_keys();
    release_queries(last);
    await_values();
    await_search();
    release_values();
  }

  // Products, softmax and products of one tile that hides something, one after the other.
  __device__ __forceinline__ void step(int tile, bool last, Out& out, HopperSoftmax& softmax) {
    const bool by_rows = kMasking == Masking::boolean && Tile::kRowMasks && !is_of_keys(p.mask);
    uint32_t bits[2];
    if (by_rows) {
      read_mask(bits, tile);
      if (!group_sees(bits, tile)) return pass_by(last);
    }
    Scores scores;
    Weights weights;
    float keep[2];
    await_keys();
    start_scores(scores);
    warpgroup_wait<0>();
    pin_registers(scores);
    release_keys();
    release_queries(last);
    finish_scores(scores, tile);
    hide(scores, tile);
    if (by_rows) hide_in_rows(scores, bits);
    softmax.update(scores, factor(), keep);
    scale_rows(out, keep);
    await_values();
    add_bad(out, scores, tile);
    pack_weights<T>(weights, scores);
    start_values(out, weights);
    warpgroup_wait<0>();
    pin_registers(out);
    release_values();
  }

  // `tiles` of which all but the first, `tile`, hide nothing: Q K^T of one and P V of the one before are issued
  // together, and the softmax of the one runs under the P V of the other. ptxas would move the wait for P V up to the
  // wait for Q K^T; a store of what the softmax ends with holds it below.
  __device__ __forceinline__ void overlapped_steps(int tile, bool hides, int tiles, bool last, Out& out,
                                                   HopperSoftmax& softmax) {
    Scores scores;
    Weights weights;
    float keep[2];
    await_keys();
    await_turn();
    start_scores(scores);
    pass_turn();
    warpgroup_wait<0>();
    pin_registers(scores);
    release_keys();
    release_queries(last && tiles == 1);
    if constexpr (kFinished) scale_scores(as_fragments(scores), scale);
    if (hides) hide(scores, tile);
    softmax.update(scores, factor(), keep);
    scale_rows(out, keep);
    if (hides) add_bad(out, scores, tile);
    keep[0] = keep[1] = 1.0f;
    pack_weights<T>(weights, scores);
#pragma unroll 1
    for (int left = tiles - 1; left > 0; --left) {
      await_keys();
      await_turn();
      start_scores(scores);
      scale_rows(out, keep);
      await_values();
      start_values(out, weights);
      pass_turn();
      warpgroup_wait<1>();
      pin_registers(scores);
      release_keys();
      release_queries(last && left == 1);
      if constexpr (kFinished) scale_scores(as_fragments(scores), scale);
      softmax.update(scores, factor(), keep);
      store_shared(base + Tile::kScratchAt + lane() * 4, __float_as_uint(softmax.sum[0] + softmax.sum[1]));
      warpgroup_wait<0>();
      pin_registers(out);
      release_values();
      pack_weights<T>(weights, scores);
    }
    scale_rows(out, keep);
    await_values();
    start_values(out, weights);
    warpgroup_wait<0>();
    pin_registers(out);
    release_values();
  }

  __device__ __forceinline__ void all_steps(const HopperWork& work, Out& out, HopperSoftmax& softmax) {
    // Tiles that hide something: at the end, then at the beginning; those between, and the one after which they come.
    const int full = work.full_end - work.full_first;
#pragma unroll 1
    for (int tile = work.end_tile - 1; tile >= work.first_tile; --tile) {
      const bool joins = full > 0 && (tile == work.full_end || tile == work.full_end - 1);
      if (joins) {
        const bool hides = tile == work.full_end;
        overlapped_steps(tile, hides, full + hides, work.full_first == work.first_tile, out, softmax);
        tile = work.full_first;
      } else {
        step(tile, tile == work.first_tile, out, softmax);
      }
    }
  }

  // ---- out / sum by way of shared memory, and lse
  __device__ __forceinline__ void finish(Out& out, HopperSoftmax& softmax, const TensorMap* out_map) const {
    const HopperWork work = posted(slot);
    const bool elected = thread() % kWarpgroup == 0;
    const int first = work.first_row + group * kGroupRows;
    softmax.finish();
    const float factor[2] = {softmax.inverse(0), softmax.inverse(1)};
    scale_rows(out, factor);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = work.first_row + my_row(half);
      if (lane() % 4 == 0 && row < work.end_row)
        *row_of<float>(p.lse, work.sequence, work.head, int64_t{work.first_q} + row) =
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
    const int rows = work.end_row - first, Dv = static_cast<int>(p.Dv);
    if (!p.first_q || rows >= kGroupRows) {
      fence_async_proxy();
      meet_group();
      if (elected && rows > 0) {
        const int sequence = p.first_q ? 0 : work.sequence;
        for (int panel = 0; panel * kPanel < Dv; ++panel)
          bulk_store(out_map, staged + panel * Tile::kQueryPanel, panel * kPanel, work.first_q + first, work.head,
                     sequence);
        bulk_commit();
      }
    } else {  // the rows below belong to the next sequence
      meet_group();
      T* const to = row_of<T>(p.out, work.sequence, work.head, int64_t{work.first_q} + first);
#pragma unroll 1
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
      if (!Tile::kOutApart) fence_async_proxy();  // Q comes here next
      meet_group();
    }
  }

  __device__ __forceinline__ void run(const TensorMap* out_map) {
    RingPlace<2> place;
    RingPlace<1> query;
    if (group == 0) give_turn(0);
    for (;; place.advance()) {
      mbarrier_wait(base + Tile::kWorkFull + 8 * place.stage, place.parity);
      slot = base + Tile::kWorkAt + 64 * place.stage;
      const HopperWork work = posted(slot);
      if (work.end_tile < 0) break;
      Out out;
#pragma unroll
      for (int i = 0; i < Tile::kD / 2; ++i) out[i] = 0.0f;
      HopperSoftmax softmax;
      if (!Tile::kOutApart || !work.empty()) {
        mbarrier_wait(base + Tile::kQueriesFull, query.parity);
        all_steps(work, out, softmax);
        query.advance();
      }
      finish(out, softmax, out_map);
      if (!Tile::kOutApart) {
        if (thread() % kWarpgroup == 0) bulk_wait_read<0>();
        meet_group();
        release(Tile::kQueriesEmpty);
      }
      __syncwarp();
      release(Tile::kWorkEmpty + 8 * place.stage);
    }
    if (group == 0) await_turn();  // nobody waits for the last turn that was given
    if (thread() % kWarpgroup == 0) bulk_wait<0>();
  }
};

}  // namespace llmfast::cuda
