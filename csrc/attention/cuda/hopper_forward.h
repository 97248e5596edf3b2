// Parts of the Hopper attention forward (attention_fwd_sm90a.cu): shared-memory plan, work, masks of keys, softmax on
// accumulators, products.
#pragma once
#include "attention/cuda/forward_order.h"
#include "attention/cuda/rows.h"
#include "attention/cuda/scores.h"
#include "ptx/barrier.h"
#include "ptx/bulk_copy.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "ptx/warpgroup.h"

namespace llmfast::cuda {

constexpr int kWarpgroup = 128, kGroupRows = 64;  // threads of a warpgroup; queries that one owns
constexpr int kPanel = 64;                        // elements in a 128-byte row of a box

// What may hide keys or change scores. band: `left` and `right` alone; boolean: also a boolean mask tensor; anything:
// also any other, a softcap, a scale that is not positive.
enum class Masking { band, boolean, anything };

// kConsumers warpgroups of 64 queries against kKeys keys a step, heads padded to kD. kOutApart: the output has shared
// memory of its own, so that the next tile's Q can come while this tile's output goes.
template <int kD_, int kConsumers_, int kKeys_, int kKeyStages_, int kValueStages_, bool kOutApart_,
          int kProducerRegisters_, int kConsumerRegisters_>
struct HopperForwardTile {
  static constexpr int kD = kD_, kConsumers = kConsumers_, kKeys = kKeys_, kRows = kConsumers * kGroupRows;
  static constexpr int kKeyStages = kKeyStages_, kValueStages = kValueStages_;
  static constexpr bool kOutApart = kOutApart_;
  static constexpr int kProducerRegisters = kProducerRegisters_, kConsumerRegisters = kConsumerRegisters_;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers), kPanels = kD / kPanel;
  static constexpr int kQueryPanel = kRows * 128, kKeyPanel = kKeys * 128;  // bytes
  static constexpr int kQueryBytes = kPanels * kQueryPanel, kKeyBytes = kPanels * kKeyPanel;
  static constexpr int kWords = (kKeys + 127) / 128 * 4;  // of a bit for each key

  static constexpr int kOutAt = kOutApart ? kQueryBytes : 0;
  static constexpr int kKeysAt = kOutAt + kQueryBytes, kValuesAt = kKeysAt + kKeyStages * kKeyBytes;
  static constexpr int kBadAt = kValuesAt + kValueStages * kKeyBytes;  // which values hold NaN or infinity
  static constexpr int kWorkAt = kBadAt + kValueStages * kWords * 4;  // two HopperWork
  static constexpr int kScratchAt = kWorkAt + 2 * 64;                 // nobody reads it
  static constexpr int kMaskKeys = kD <= 128 ? 16384 : 4096;  // most keys of a boolean mask of keys, a bit each
  static constexpr bool kRowMasks = kD <= 128;  // Masking::boolean also takes masks of rows; else registers run short
  static constexpr int kMaskAt = kScratchAt + 4 * kWarpSize;  // beside each HopperWork
  static constexpr int kBarriersAt = kMaskAt + 2 * kMaskKeys / 8;
  static constexpr int kQueriesFull = kBarriersAt, kQueriesEmpty = kQueriesFull + 8;
  static constexpr int kKeysFull = kQueriesEmpty + 8, kKeysEmpty = kKeysFull + 8 * kKeyStages;
  static constexpr int kValuesFull = kKeysEmpty + 8 * kKeyStages, kValuesEmpty = kValuesFull + 8 * kValueStages;
  static constexpr int kValuesSearched = kValuesEmpty + 8 * kValueStages;
  static constexpr int kWorkFull = kValuesSearched + 8 * kValueStages, kWorkEmpty = kWorkFull + 16;
  static constexpr int kBytes = 1024 + kWorkEmpty + 16;  // the base is rounded up to 1024

  static_assert(kD % kPanel == 0 && kD <= 256 && kKeys % 16 == 0 && kKeys <= 256 && kRows <= 256);
  static_assert(kKeyPanel % 1024 == 0, "a period of the swizzle");
  static_assert(kBytes <= 232448, "what a block may have");
};

// What a kernel is given besides the tensors' maps. Dimensions along which a tensor does not move (stride 0) have
// size 1 in its map; the coordinate is multiplied by 0.
struct HopperForwardParams : AttentionParams {
  ForwardOrder order;
  struct Steps {
    int sequence, head;
  } q_steps, k_steps, v_steps;
};

// Warps of the producer's warpgroup: one copies, one finds work, the others look for NaN.
constexpr int kSearchers = 2;

// One tile of queries of one head, as one warp posts it to the others in shared memory.
// Tiles of keys are taken from the last to the first; those in [full_first, full_end) hide nothing from anybody.
struct alignas(16) HopperWork {
  int first_tile, end_tile;         // end_tile -1: no more work
  int full_first, full_end;
  int first_row, end_row;           // queries of the sequence
  int first_key, end_key;           // row first_row + r sees the keys [first_key + r, end_key + r) of 0 .. Tk
  int first_q, first_k;             // tokens before the sequence
  int Tk;
  int sequence, head, kv_head;
  int unused[2];

  __device__ bool empty() const { return first_tile >= end_tile; }
  __device__ bool hides(int tile) const { return tile < full_first || tile >= full_end; }
  __device__ Span keys_of(int row) const {  // row of the tile
    return {clamped(int64_t{first_key} + row, Tk), clamped(int64_t{end_key} + row, Tk)};
  }
};
static_assert(sizeof(HopperWork) == 64);

__device__ __forceinline__ int clamped(int64_t value, int least, int most) {
  return value < least ? least : value > most ? most : static_cast<int>(value);
}

// Boolean, and the same for all queries, such as padding.
__host__ __device__ inline bool is_of_keys(const MaskTensor& m) {
  return m.dtype == DType::boolean && m.query_stride == 0;
}

// False where the tile of a packed sequence does not exist.
template <class Tile, Masking kMasking>
__device__ __forceinline__ bool find_work(const HopperForwardParams& p, int index, HopperWork& work) {
  const ForwardOrder::Piece piece = p.order.at(index);
  const int at = piece.tile, tokens = static_cast<int>(p.Tq), kv_heads = static_cast<int>(p.Hkv);
  work.kv_head = piece.unit % kv_heads;
  work.head = work.kv_head * p.order.group + piece.head;
  if (p.first_q) {  // as token_tile() says, in 32 bits
    int low = 0;
    for (int high = static_cast<int>(p.B); high - low > 1;) {
      const int middle = (low + high) / 2;
      if (clamped(p.first_q[middle], tokens) / Tile::kRows + middle <= at) low = middle;
      else high = middle;
    }
    work.sequence = low;
    work.first_row = (at - low - clamped(p.first_q[low], tokens) / Tile::kRows) * Tile::kRows;
  } else {
    work.sequence = piece.unit / kv_heads;
    work.first_row = at * Tile::kRows;
  }
  const Sequence s = sequence_of(p, work.sequence);
  if (work.first_row >= s.Tq) return false;
  work.first_q = static_cast<int>(s.first_q);
  work.first_k = static_cast<int>(s.first_k);
  work.Tk = s.Tk;
  work.end_row = s.Tq - work.first_row < Tile::kRows ? s.Tq : work.first_row + Tile::kRows;
  const int64_t diagonal = int64_t{work.first_row} + s.Tk - s.Tq;
  work.first_key = clamped(diagonal - p.left, -Tile::kRows, s.Tk);
  work.end_key = clamped(diagonal + p.right + 1, -Tile::kRows, s.Tk);
  const int last = work.end_row - work.first_row - 1;
  const Span top = work.keys_of(0), bottom = work.keys_of(last);
  work.first_tile = top.begin / Tile::kKeys;
  work.end_tile = top.begin < bottom.end ? (bottom.end + Tile::kKeys - 1) / Tile::kKeys : work.first_tile;
  work.full_first = (bottom.begin + Tile::kKeys - 1) / Tile::kKeys;
  work.full_end = top.end / Tile::kKeys;
  const bool hides_all_over = kMasking != Masking::band && p.mask.data && !is_of_keys(p.mask);
  if (work.full_first >= work.full_end || hides_all_over) work.full_first = work.full_end = work.first_tile;
  return true;
}

// ---- a boolean mask -------------------------------------------------------------------------------------------------

// Of 16 keys from `key` on, a bit each; `row`: of the mask, 16-byte aligned. Zeros beyond Tk.
__device__ __forceinline__ uint32_t mask_bits(const char* row, int key, int Tk) {
  uint32_t bits = 0;
  if (key + 16 <= Tk) {
    const Bytes16 bytes = load<Bytes16>(row + key);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t set = (((bytes.word[i] & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes.word[i]) >> 7 & 0x01010101u;
      bits |= (set * 0x01020408u >> 24 & 0xfu) << 4 * i;
    }
  } else {
#pragma unroll 1
    for (int i = 0; key + i < Tk; ++i) bits |= (row[key + i] != 0 ? 1u : 0u) << i;
  }
  return bits;
}

// One of keys is kept as bits in shared memory, written by the warp that finds work.

__device__ __forceinline__ void note_mask(const HopperForwardParams& p, const HopperWork& work, uint32_t bits) {
  const char* const row = mask_element(p, work.sequence, work.head, 0, 0);
  constexpr int kWords = 8;
#pragma unroll 1
  for (int first = 0; first < work.Tk; first += 32 * kWords) {
    uint32_t word[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int key = first + 32 * i + lane();
      word[i] = key < work.Tk ? row[key * p.mask.key_stride] : 0;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = __ballot_sync(kAllLanes, word[i] != 0);
    if (lane() == 0) {
      store_shared(bits + first / 8, Bytes16{{word[0], word[1], word[2], word[3]}});
      store_shared(bits + first / 8 + 16, Bytes16{{word[4], word[5], word[6], word[7]}});
    }
  }
  __syncwarp();
}

// The bits of 16 keys, from one whose number is a multiple of 16.
__device__ __forceinline__ uint32_t mask_piece(uint32_t bits, int key) {
  const Bytes16 words = load_shared(bits + key / 128 * 16);
  const int i = key / 32 % 4;
  const uint32_t low = i & 1 ? words.word[1] : words.word[0], high = i & 1 ? words.word[3] : words.word[2];
  return (i & 2 ? high : low) >> key % 32 & 0xffffu;
}

// Leaves out tiles at both ends that the mask hides; only tiles of which it hides nothing count as full.
template <class Tile>
__device__ __forceinline__ void narrow(HopperWork& work, uint32_t bits) {
  constexpr int kPieces = Tile::kKeys / 16;
  const auto piece = [&](int tile) {  // 16 keys of the tile, a lane each
    const int first = tile * Tile::kKeys + (lane() < kPieces ? lane() : 0) * 16;
    return mask_piece(bits, first);
  };
  const auto hidden = [&](int tile) { return __all_sync(kAllLanes, piece(tile) == 0); };
#pragma unroll 1
  while (!work.empty() && hidden(work.end_tile - 1)) --work.end_tile;
#pragma unroll 1
  while (!work.empty() && hidden(work.first_tile)) ++work.first_tile;
  const int end = work.full_end < work.end_tile ? work.full_end : work.end_tile;
  int run = work.full_first > work.first_tile ? work.full_first : work.first_tile;
  work.full_first = work.full_end = work.first_tile;  // then the longest run
#pragma unroll 1
  for (int tile = run; tile < end; ++tile) {
    if (!__all_sync(kAllLanes, piece(tile) == 0xffff)) {
      run = tile + 1;
    } else if (tile + 1 - run > work.full_end - work.full_first) {
      work.full_first = run;
      work.full_end = tile + 1;
    }
  }
}

__device__ __forceinline__ void post(uint32_t slot, const HopperWork& work) {
  const int word[16] = {work.first_tile, work.end_tile, work.full_first, work.full_end, work.first_row, work.end_row,
                        work.first_key,  work.end_key,  work.first_q,    work.first_k,  work.Tk,        work.sequence,
                        work.head,       work.kv_head,  0,               0};
#pragma unroll
  for (int i = 0; i < 16; i += 4)
    store_shared(slot + 4 * i, Bytes16{{static_cast<uint32_t>(word[i]), static_cast<uint32_t>(word[i + 1]),
                                        static_cast<uint32_t>(word[i + 2]), static_cast<uint32_t>(word[i + 3])}});
}
// Read again wherever it is needed: registers are scarce.
__device__ __forceinline__ HopperWork posted(uint32_t slot) {
  const Bytes16 a = load_shared(slot), b = load_shared(slot + 16);
  const Bytes16 c = load_shared(slot + 32), d = load_shared(slot + 48);
  const auto at = [](const Bytes16& bytes, int i) { return static_cast<int>(bytes.word[i]); };
  return {at(a, 0), at(a, 1), at(a, 2), at(a, 3), at(b, 0), at(b, 1), at(b, 2), at(b, 3),
          at(c, 0), at(c, 1), at(c, 2), at(c, 3), at(d, 0), at(d, 1), {0, 0}};
}

// ---- softmax on accumulators ----------------------------------------------------------------------------------------
// Element i of a thread's scores is in its row i / 2 % 2 (ptx/warpgroup.h); four lanes share a row.

template <int kCount>
__device__ __forceinline__ auto& as_fragments(float (&scores)[kCount]) {
  return reinterpret_cast<float(&)[kCount / 4][4]>(scores);
}

// As OnlineSoftmax of scores.h, with shorter chains of dependent instructions.
struct HopperSoftmax {
  float highest[2] = {kLowest, kLowest};
  float sum[2] = {0.0f, 0.0f};  // this lane's share

  template <int kCount>
  __device__ __forceinline__ void update(float (&scores)[kCount], float factor, float (&keep)[2]) {
    float top[2][2] = {{scores[0], scores[1]}, {scores[2], scores[3]}};
#pragma unroll
    for (int i = 4; i < kCount; ++i) top[i / 2 % 2][i % 2] = fmaxf(top[i / 2 % 2][i % 2], scores[i]);
    float now[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = fmaxf(top[half][0], top[half][1]);
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      now[half] = fmaxf(highest[half], most * factor);
      keep[half] = exp2_approx(highest[half] - now[half]);
      highest[half] = now[half];
    }
    float total[2][2] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scores[i] = exp2_approx(fmaf(scores[i], factor, -now[i / 2 % 2]));
      total[i / 2 % 2][i % 2] += scores[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] = fmaf(sum[half], keep[half], total[half][0] + total[half][1]);
  }
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] = group_sum<4>(sum[half]);
  }
  __device__ float inverse(int half) const { return sum[half] == 0.0f ? 0.0f : 1.0f / sum[half]; }
};

// The weights as the first operand of the next product: 16 keys to a fragment.
template <class T, int kCount>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[kCount / 8][4], const float (&weights)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) packed[i / 4][i % 4] = pack_pair<T>(weights[2 * i], weights[2 * i + 1]);
}

template <int kCount>
__device__ __forceinline__ void scale_rows(float (&acc)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) acc[i] *= factor[i / 2 % 2];
}

// ---- the two products -----------------------------------------------------------------------------------------------

// A matrix descriptor (ptx/warpgroup.h) in two words: moving on inside the operand is one 32-bit addition.
template <int kLeading>
struct Operand {
  uint32_t low;

  __device__ __forceinline__ explicit Operand(uint32_t address)
      : low(static_cast<uint32_t>(matrix_descriptor(address, 1024, kLeading))) {}
  __device__ __forceinline__ uint64_t at(int bytes) const {
    constexpr uint32_t kHigh = matrix_descriptor(0, 1024, kLeading) >> 32;
    return uint64_t{kHigh} << 32 | (low + (bytes >> 4));
  }
};

// scores[64, kKeys] = Q K^T; queries: this warpgroup's first row.
template <class T, class Tile>
__device__ __forceinline__ void issue_scores(float (&scores)[Tile::kKeys / 2], uint32_t queries, uint32_t keys) {
  const Operand<16> q(queries), k(keys);
#pragma unroll
  for (int d = 0; d < Tile::kD; d += 16)
    warpgroup_product<Tile::kKeys, T, Major::k, Major::k>(scores, q.at(d / kPanel * Tile::kQueryPanel + d % kPanel * 2),
                                                          k.at(d / kPanel * Tile::kKeyPanel + d % kPanel * 2), d > 0);
  warpgroup_commit();
}

// out[64, kD] += weights V
template <class T, class Tile>
__device__ __forceinline__ void issue_values(float (&out)[Tile::kD / 2], const uint32_t (&weights)[Tile::kKeys / 16][4],
                                             uint32_t values) {
  const Operand<Tile::kKeyPanel> v(values);
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k)
    warpgroup_product<Tile::kD, T, Major::mn>(out, weights[k], v.at(k * 2048), true);
  warpgroup_commit();
}

}  // namespace llmfast::cuda
