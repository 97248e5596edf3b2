// What a decoding block, a warp and a lane of it own: the tile's sizes, the rows' heads and queries and what these see,
// the way of Q, K and V into shared memory, the first product, and where parts leave their results.
#pragma once
#include "attention/cuda/decode_parts.h"
#include "attention/cuda/products.h"
#include "attention/cuda/rows.h"
#include "attention/cuda/scores.h"

namespace llmfast::cuda {

template <int kD_>
struct DecodeTile {
  static constexpr int kD = kD_, kRows = 16, kKeys = 16;
  static constexpr int kWarps = kD == 64 ? 8 : kD == 128 ? 4 : 2, kStages = kD == 64 ? 3 : 2;
  static constexpr int kBlocks = kD == 64 ? 2 : 3;  // a multiprocessor of 228 KB
  static constexpr bool kHoldsQueries = kD <= 128;  // in registers
  static constexpr int kThreads = kWarps * kWarpSize, kStep = kWarps * kKeys;
  static constexpr int kQueryBytes = kRows * kD * 2, kTileBytes = kKeys * kD * 2, kRingBytes = kStages * 2 * kTileBytes;
  static constexpr int kFlagsAt = kQueryBytes + kWarps * kRingBytes, kBytes = kFlagsAt + kWarps * kKeys * 4;
  // A warp's results take the place of its ring: rows of outputs, eight floats further apart so that a store's rows
  // fall into different banks, then maximum and sum of each row.
  static constexpr int kOutputRow = kD + 8, kStatesAt = kRows * kOutputRow * 4;
  static_assert(kRingBytes >= kStatesAt + kRows * 8 && kBytes <= 99 << 10);
};

struct DecodeShape {
  KeyParts parts;
  unsigned Hkv, group, rows;
  bool aligned_q, aligned_k, aligned_v;
};

struct RowOfGroup {
  int64_t head;
  int query;
};
__device__ inline RowOfGroup row_of_group(unsigned kv_head, unsigned group, unsigned row) {
  return {kv_head * group + row % group, static_cast<int>(row / group)};
}

// The workspace: outputs relative to the row's maximum, [item][part][row][Dv, up to a multiple of 4]; then maximum and
// sum, [item][row][part].
struct PartResults {
  float* outputs;
  float2* states;
  unsigned parts, rows, width;

  __host__ __device__ PartResults(float* workspace, int64_t items, unsigned parts_, unsigned rows_, int64_t Dv)
      : parts(parts_), rows(rows_), width(static_cast<unsigned>(Dv + 3) / 4 * 4) {
    outputs = workspace;
    states = reinterpret_cast<float2*>(workspace + items * parts * rows * width);
  }
  __device__ float* output(unsigned item, unsigned part, unsigned row) const {
    return outputs + ((int64_t{item} * parts + part) * rows + row) * width;
  }
  __device__ float2* state(unsigned item, unsigned row) const { return states + (int64_t{item} * rows + row) * parts; }
};

// What makes the products of a lane's two rows scores, and which keys these see, of those before `end`.
template <bool kPlain>
struct RowsOfLane {
  ScoreScale scale;
  Span by_all, visible[2];
  MaskRows mask;
  bool masked;

  __device__ RowsOfLane(const AttentionParams& p, const DecodeShape& shape, unsigned sequence, unsigned kv_head,
                        int end)
      : scale(p), mask{}, masked(p.mask.data) {
    const Band band{static_cast<int>(p.Tq), static_cast<int>(p.Tk), p.left, p.right};
    by_all = band.seen_by_all(0, static_cast<int>(p.Tq));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned row = lane() / 4 + 8 * half;
      const RowOfGroup at = row_of_group(kv_head, shape.group, row < shape.rows ? row : 0);
      const Span seen = band.keys_of(at.query);
      visible[half] = row < shape.rows ? Span{seen.begin, min(seen.end, end)} : Span{0, 0};
      if (masked) mask.row[half] = mask_element(p, sequence, at.head, at.query, 0);
    }
    mask.column_stride = p.mask.key_stride * size_of(p.mask.dtype);
    mask.dtype = p.mask.dtype;
    mask.columns = static_cast<int>(p.Tk);
  }
  // Whether one of the keys is hidden from one of the queries.
  __device__ bool hides(Span keys) const { return masked || !by_all.contains(keys); }
  __device__ float factor() const { return scale.factor(); }
  __device__ void finish(float (&scores)[2][4], int first_key) const {
    if (scale.finished) scale_scores(scores, scale);
    if (masked) add_mask(scores, mask, first_key);
  }
};
template <>
struct RowsOfLane<true> {
  float factor_;
  Span visible[2];

  __device__ RowsOfLane(const AttentionParams& p, const DecodeShape&, unsigned, unsigned, int end)
      : factor_(p.scale * kLog2E), visible{{0, end}, {0, end}} {}
  __device__ static bool hides(Span) { return false; }
  __device__ float factor() const { return factor_; }
  __device__ static void finish(float (&)[2][4], int) {}
};

// scores[16][16] = queries keys^T, in two chains for each eight keys: a single one of kD / 16 products is waited for.
template <class T, int kD, class Fragment>
__device__ __forceinline__ void dot_queries(float (&scores)[2][4], const Fragment& queries, SharedTile<kD> keys) {
  float odd[2][4];
  clear(scores);
  clear(odd);
#pragma unroll
  for (int d = 0; d < kD; d += 16) {
    uint32_t a[4], b[4];
    queries(a, d);
    read_b<Major::k>(b, keys, 0, d, lane());
    float(&sums)[2][4] = d % 32 == 0 ? scores : odd;
    mma_m16n8k16<T>(sums[0], a, {b[0], b[1]});
    mma_m16n8k16<T>(sums[1], a, {b[2], b[3]});
  }
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[j][e] += odd[j][e];
}

// A chunk element by element, of which the first `count` exist. load_rows() has the same in place: with this function
// in it the forward kernel of kD 64 spills 56 bytes instead of 40.
template <class T>
__device__ __forceinline__ void copy_elements(uint32_t to, const T* from, int count) {
  Bytes16 bytes;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t low = 2 * w < count ? from[2 * w].bits : 0;
    const uint32_t high = 2 * w + 1 < count ? from[2 * w + 1].bits : 0;
    bytes.word[w] = low | high << 16;
  }
  store_shared(to, bytes);
}

// All rows of the tile; those that do not exist are zero.
template <class T, class Tile>
__device__ __forceinline__ void load_queries(SharedTile<Tile::kD> to, const AttentionParams& p,
                                             const DecodeShape& shape, unsigned sequence, unsigned kv_head,
                                             bool aligned) {
  constexpr int kRowChunks = Tile::kD / kChunk;
#pragma unroll 1
  for (int i = thread(); i < Tile::kRows * kRowChunks; i += Tile::kThreads) {
    const unsigned row = i / kRowChunks;
    const int chunk = i % kRowChunks;
    const RowOfGroup at = row_of_group(kv_head, shape.group, row < shape.rows ? row : 0);
    const T* const from = row_of<const T>(p.q, sequence, at.head, at.query);
    const int left = row < shape.rows ? static_cast<int>(p.D) - chunk * kChunk : 0;
    const int count = left < 0 ? 0 : min(left, kChunk);
    if (aligned) copy_async_16(to.chunk(row, chunk), count > 0 ? from + chunk * kChunk : from, count * 2);
    else copy_elements(to.chunk(row, chunk), from + chunk * kChunk, count);
  }
}

// A lane's share of the copies of a warp's 16 rows of K or V, step by step: addresses that change by additions alone.
template <class T, class Tile>
class RowCopies {
 public:
  // From row `token` on. Rows are made of whole chunks.
  __device__ RowCopies(const HeadTensor& t, unsigned sequence, unsigned head, int token, int D)
      : source_(row_of<const T>(t, sequence, head, token + first_row()) + own_chunk() * kChunk),
        apart_(t.token_stride * kRowsAtOnce),
        a_step_(t.token_stride * Tile::kStep),
        exists_(own_chunk() * kChunk < D) {}

  // The next step's, of which `rows` exist. The tile starts at a multiple of 128 bytes, so that the swizzle of the rows
  // further on is an exclusive or.
  __device__ __forceinline__ void copy(SharedTile<Tile::kD> tile, int rows) {
    const uint32_t to = tile.chunk(first_row(), own_chunk());
    const int left = exists_ ? rows - first_row() : 0;
    const T* from = source_;
#pragma unroll
    for (int row = 0; row < Tile::kKeys; row += kRowsAtOnce, from += apart_)
      copy_async_16((to ^ (row & 7) << 4) + row * Tile::kD * 2, from, row < left ? 16 : 0);
    source_ += a_step_;
  }

 private:
  static constexpr int kRowChunks = Tile::kD / kChunk, kRowsAtOnce = kWarpSize / kRowChunks;
  __device__ static int first_row() { return lane() / kRowChunks; }
  __device__ static int own_chunk() { return lane() % kRowChunks; }

  const T* source_;
  int64_t apart_, a_step_;  // elements
  bool exists_;
};

}  // namespace llmfast::cuda
