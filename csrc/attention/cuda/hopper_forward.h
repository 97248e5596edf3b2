// Parts of the Hopper attention forward (attention_fwd_sm90a.cu): shared-memory plan, order of work, softmax on
// accumulators, rows that hold NaN.
#pragma once
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

// How the consumers order products and softmax (see hopper_forward_loop.h).
enum class Loop { simple, deferred };

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
  static constexpr int kBarriersAt = kBadAt + kValueStages * kWords * 4;
  static constexpr int kQueriesFull = kBarriersAt, kQueriesEmpty = kQueriesFull + 8;
  static constexpr int kKeysFull = kQueriesEmpty + 8, kKeysEmpty = kKeysFull + 8 * kKeyStages;
  static constexpr int kValuesFull = kKeysEmpty + 8 * kKeyStages, kValuesEmpty = kValuesFull + 8 * kValueStages;
  static constexpr int kValuesSearched = kValuesEmpty + 8 * kValueStages;
  static constexpr int kBytes = 1024 + kValuesSearched + 8 * kValueStages;  // the base is rounded up to 1024

  static_assert(kD % kPanel == 0 && kD <= 256 && kKeys % 16 == 0 && kKeys <= 256 && kRows <= 256);
  static_assert(kKeyPanel % 1024 == 0, "a period of the swizzle");
  static_assert(kBytes <= 232448, "what a block may have");
};

// What a kernel is given besides the tensors' maps. Dimensions along which a tensor does not move (stride 0) have
// size 1 in its map; the coordinate is multiplied by 0.
struct HopperForwardParams : AttentionParams {
  int64_t query_tiles;  // of all sequences, for one head
  struct Steps {
    int sequence, head;
  } q_steps, k_steps, v_steps;
};

constexpr int kSearchers = 3;  // warps of the producer's warpgroup that look for NaN

// One tile of queries of one head. Work is numbered so that neighbours share keys: heads of a group first, then tiles,
// the longest first, then kv heads.
struct HopperWork {
  int64_t sequence, head, kv_head;
  Sequence tokens;
  int first_row, end_row;  // queries of the sequence
  Span by_all;
  int first_tile, end_tile;  // of keys

  __device__ HopperWork(const HopperForwardParams& p, int64_t index, int rows, int keys) {
    const int group = static_cast<int>(p.Hq / p.Hkv), tiles = static_cast<int>(p.query_tiles);
    const int rest = static_cast<int>(index) / group;
    kv_head = rest / tiles;
    head = kv_head * group + static_cast<int>(index) % group;
    const TokenTile place = token_tile(rest % tiles, p.B, p.Tq, p.first_q, rows);
    sequence = place.sequence;
    tokens = sequence_of(p, sequence);
    first_row = place.first;
    end_row = first_row + rows < tokens.Tq ? first_row + rows : tokens.Tq;
    if (!exists()) return;
    const Band band{tokens.Tq, tokens.Tk, p.left, p.right};
    const Span seen = band.seen_by_any(first_row, end_row);
    by_all = band.seen_by_all(first_row, end_row);
    first_tile = seen.begin / keys;
    end_tile = seen.empty() ? first_tile : (seen.end + keys - 1) / keys;
  }
  __device__ bool exists() const { return first_row < tokens.Tq; }
  __device__ bool empty() const { return first_tile >= end_tile; }
  // Whether some query of the tile does not see some key of tile `tile`.
  __device__ bool hides(int tile, int keys) const { return !by_all.contains({tile * keys, tile * keys + keys}); }
};

// This block's share of `count` pieces of work, whatever the grid: there and back over the blocks, so that no block gets
// the longer of each round. body(index).
template <class Body>
__device__ __forceinline__ void for_each_work(int64_t count, const Body& body) {
  const int64_t blocks = gridDim.x, block = blockIdx.x;
  bool back = false;
  for (int64_t first = 0; first < count; first += blocks, back = !back) {
    const int64_t index = first + (back ? blocks - 1 - block : block);
    if (index < count) body(index);
  }
}

// ---- softmax on accumulators -----------------------------------------------------------------------------------------
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

// ---- the two products ------------------------------------------------------------------------------------------------

// scores[64, kKeys] = Q K^T; queries: this warpgroup's first row.
template <class T, class Tile>
__device__ __forceinline__ void issue_scores(float (&scores)[Tile::kKeys / 2], uint32_t queries, uint32_t keys) {
#pragma unroll
  for (int d = 0; d < Tile::kD; d += 16)
    warpgroup_product<Tile::kKeys, T, Major::k, Major::k>(
        scores, matrix_descriptor(queries + d / kPanel * Tile::kQueryPanel + d % kPanel * 2, 1024),
        matrix_descriptor(keys + d / kPanel * Tile::kKeyPanel + d % kPanel * 2, 1024), d > 0);
  warpgroup_commit();
}

// out[64, kD] += weights V
template <class T, class Tile>
__device__ __forceinline__ void issue_values(float (&out)[Tile::kD / 2], const uint32_t (&weights)[Tile::kKeys / 16][4],
                                             uint32_t values) {
#pragma unroll
  for (int k = 0; k < Tile::kKeys / 16; ++k)
    warpgroup_product<Tile::kD, T, Major::mn>(out, weights[k],
                                              matrix_descriptor(values + k * 2048, 1024, Tile::kKeyPanel), true);
  warpgroup_commit();
}

// ---- values that hold NaN or infinity --------------------------------------------------------------------------------
// A hidden key has weight 0, but 0 * NaN would spoil the sums of queries that do not see it. In tiles that hide
// something warps beside the producer look for such rows of V, while the consumers work on the scores; they note them in
// a bit mask and zero them. Consumers add a noted row's contribution, read from memory, where its weight is not 0.

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

// out += weights * (the noted rows of V); `values` is the first of the tile's rows in memory.
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
      // weights[row / 8 * 4 + 2 * half + row % 2], by masks: an index known at run time would move them to local memory.
      uint32_t bits[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < Tile::kKeys / 2; ++i)
        bits[i / 2 % 2] |= __float_as_uint(weights[i]) & (row / 8 == i / 4 && row % 2 == i % 2 ? kAllLanes : 0u);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float w = __uint_as_float(__shfl_sync(kAllLanes, bits[half], lane() / 4 * 4 + row % 8 / 2));
        if (w == 0.0f) continue;
#pragma unroll
        for (int i = 0; i < Tile::kD / 2; ++i) {
          if (i / 2 % 2 != half) continue;
          const int col = i / 4 * 8 + lane() % 4 * 2 + i % 2;
          if (col < Dv) out[i] += w * to_float(values[row * stride + col]);
        }
      }
    }
  }
}

}  // namespace llmfast::cuda
