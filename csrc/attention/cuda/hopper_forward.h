// Parts of the Hopper attention forward (attention_fwd_sm90a.cu): shared-memory plan, order of work, softmax on
// accumulators, rows that hold NaN.
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

// How a consumer orders products and softmax (hopper_forward_consumer.h).
enum class Loop { simple, overlapped };

// kConsumers warpgroups of 64 queries against kKeys keys a step, heads padded to kD. kOutApart: the output has shared
// memory of its own, so that the next tile's Q can come while this tile's output goes.
template <int kD_, int kConsumers_, int kKeys_, int kKeyStages_, int kValueStages_, bool kOutApart_, Loop kLoop_,
          bool kTurns_, int kProducerRegisters_, int kConsumerRegisters_>
struct HopperForwardTile {
  static constexpr int kD = kD_, kConsumers = kConsumers_, kKeys = kKeys_, kRows = kConsumers * kGroupRows;
  static constexpr int kKeyStages = kKeyStages_, kValueStages = kValueStages_;
  static constexpr bool kOutApart = kOutApart_, kTurns = kTurns_;
  static constexpr Loop kLoop = kLoop_;
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
  static constexpr int kBarriersAt = kScratchAt + 4 * kWarpSize;
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

// False where the tile of a packed sequence does not exist.
template <class Tile>
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
  if (work.full_first >= work.full_end || p.mask.data) work.full_first = work.full_end = work.first_tile;
  return true;
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

// ---- values that hold NaN or infinity -------------------------------------------------------------------------------
// A hidden key has weight 0, but 0 * NaN would spoil the sums of queries that do not see it. In tiles that hide
// something warps beside the producer look for such rows of V, while the consumers work on the scores; they note them
// in a bit mask and zero them. Consumers add a noted row's contribution, read from memory, where its weight is not 0.

// Warp `searcher` of kSearchers looks through its share of a tile.
template <class T, class Tile>
__device__ __forceinline__ void search_values(uint32_t values, uint32_t bad_mask, int searcher) {
  bool zeroed = false;
  for (int word = searcher; word < Tile::kWords; word += kSearchers) {
    uint32_t mask = 0;
#pragma unroll 1
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const uint32_t from = values + panel * Tile::kKeyPanel + word * 32 * 128 + lane() * 16;
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // four rows at a time
        const bool there = word * 32 + i * 4 < Tile::kKeys;
        const uint32_t found =
            __ballot_sync(kAllLanes, there && not_finite<T>(load_shared(there ? from + i * 512 : values)));
#pragma unroll
        for (int row = 0; row < 4; ++row)
          if (found >> 8 * row & 0xff) mask |= 1u << (4 * i + row);
      }
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      const uint32_t row = word * 32 + __ffs(static_cast<int>(rest)) - 1;
      for (int chunk = lane(); chunk < Tile::kPanels * 8; chunk += kWarpSize)
        store_shared(values + chunk / 8 * Tile::kKeyPanel + row * 128 + chunk % 8 * 16, Bytes16{{0, 0, 0, 0}});
      zeroed = true;
    }
    if (lane() == 0) store_shared(bad_mask + word * 4, mask);
  }
  if (zeroed) fence_async_proxy();
  __syncwarp();
}

// Eight neighbours of a row of D elements, zeros beyond its end.
template <class T>
__device__ __forceinline__ Bytes16 load_chunk(const T* row, int chunk, int D) {
  const T* from = row + chunk * kChunk;
  if (chunk * kChunk + kChunk <= D) return load<Bytes16>(from);
  Bytes16 bytes = {};
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    if (chunk * kChunk + j < D) bytes.word[j / 2] |= static_cast<uint32_t>(from[j].bits) << j % 2 * 16;
  return bytes;
}

// out += weights * (the noted rows of V); `values` is the first of the tile's rows in memory. Sparing with registers:
// out and weights hold most of them.
template <class T, class Tile>
__device__ __forceinline__ void add_bad_values(float (&out)[Tile::kD / 2], const float (&weights)[Tile::kKeys / 2],
                                               uint32_t bad_mask, const T* values, int64_t stride, int Dv) {
#pragma unroll 1
  for (int word = 0; word < Tile::kWords; ++word) {
    const Bytes16 words = load_shared(bad_mask + word / 4 * 16);
    const uint32_t low = word & 1 ? words.word[1] : words.word[0], high = word & 1 ? words.word[3] : words.word[2];
#pragma unroll 1
    for (uint32_t rest = word & 2 ? high : low; rest; rest &= rest - 1) {
      const int row = word * 32 + __ffs(static_cast<int>(rest)) - 1;
      // weights[row / 8 * 4 + 2 * half + row % 2], by masks: an index known at run time would need local memory.
      uint32_t bits[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 2; ++i)
        bits[i / 2 % 2] |= __float_as_uint(weights[i]) & (row / 8 == i / 4 && row % 2 == i % 2 ? kAllLanes : 0u);
      float w[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        w[half] = __uint_as_float(__shfl_sync(kAllLanes, bits[half], lane() / 4 * 4 + row % 8 / 2));
      const Bytes16 mine = load_chunk(values + row * stride, lane(), Dv);
#pragma unroll
      for (int j = 0; j < Tile::kD / kChunk; ++j) {  // chunk j is in lane j; this lane needs its word lane() % 4
        uint32_t pair = 0;
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const uint32_t taken = __shfl_sync(kAllLanes, mine.word[part], j);
          if (lane() % 4 == part) pair = taken;
        }
        float x[2];
        unpack_pair<T>(pair, x[0], x[1]);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (w[e / 2] != 0.0f) out[4 * j + e] += w[e / 2] * x[e % 2];
      }
    }
  }
}

}  // namespace llmfast::cuda
