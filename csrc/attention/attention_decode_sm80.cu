// Masked attention for few queries to a key/value head (decoding), on tensor cores; see attention.h for the formula.
//
// All queries of a kv head, Tq * Hq / Hkv <= 16, are the rows of one mma tile: row r is query r / group of head
// kv_head * group + r % group, so that every byte of K and V is read once. The keys that some query sees are cut into
// parts, a block each; in a block each warp takes every kWarps-th 16 keys through its own ring of cp.async stages and
// its own running softmax, without a barrier:
//   S[16][16] = Q K^T; softcap, mask, band; maximum and sum, S -> P; O[16][kD] = O * 2^(old maximum - new) + P V
// At the end the warps' results are merged in the order of the warps, and the parts' by a second kernel in the order of
// the parts; the number of parts depends on the shape alone. Deterministic.
//
// Memory: Q and the rings. kD 64: 4 warps x 4 stages, 66 KB; 128: 4 x 2, 68 KB; 256: 2 x 2, 72 KB.
// Registers (nvcc 13.0.88, sm_80, -Xptxas -v): 125, 168, 255; no spill but with a mask tensor (0, 4 and 16 bytes).
#include "attention/attention_cuda.h"
#include "attention/cuda/products.h"
#include "attention/cuda/rows.h"
#include "attention/cuda/scores.h"
#include "core/cuda_launch.h"
#include "gemm/cuda/schedule.h"

namespace llmfast::cuda {
namespace {

template <int kD_>
struct DecodeTile {
  static constexpr int kD = kD_, kRows = 16, kKeys = 16, kWarps = kD <= 128 ? 4 : 2, kStages = kD == 64 ? 4 : 2;
  static constexpr int kThreads = kWarps * kWarpSize, kStep = kWarps * kKeys;
  static constexpr int kQueryBytes = kRows * kD * 2, kTileBytes = kKeys * kD * 2, kRingBytes = kStages * 2 * kTileBytes;
  static constexpr int kStatesAt = kQueryBytes + kWarps * kRingBytes;  // of every warp: 16 maxima, 16 sums; then flags
  static constexpr int kBytes = kStatesAt + kWarps * (2 * kRows + kKeys) * 4;
  static_assert(kRingBytes >= kRows * kD * 4, "a warp's outputs take the place of its ring");
};

// The part of the keys that a block takes. Keys [begin, end) are seen by some query.
struct KeyParts {
  int begin, end, length, count;
};

// At most so many parts of `keys` keys or fewer.
int64_t most_parts(int64_t items, int64_t keys) {
  const int64_t wanted = 2 * kFullDevice / (items > 0 ? items : 1), most = keys / 128;
  const int64_t parts = wanted < most ? wanted : most;
  return parts < 1 ? 1 : parts;
}

KeyParts key_parts(int64_t items, Span seen) {
  const int64_t keys = seen.empty() ? 0 : seen.end - seen.begin;
  const int64_t length = ceil_div(ceil_div(keys, most_parts(items, keys)), 64) * 64;
  return {seen.begin, seen.end, static_cast<int>(length), static_cast<int>(keys == 0 ? 1 : ceil_div(keys, length))};
}

// A row of the workspace: the maximum, the sum and the Dv outputs relative to it; [item][part][row].
__host__ __device__ constexpr int64_t part_row_floats(int64_t Dv) { return Dv + 2; }

struct RowOfGroup {
  int64_t head;
  int query;
};
__device__ inline RowOfGroup row_of_group(int64_t kv_head, int64_t group, int row) {
  return {kv_head * group + row % group, static_cast<int>(row / group)};
}

template <class T, class Tile, bool kMasked>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_decode_kernel(const AttentionParams p, const Aligned aligned, const KeyParts parts) {
  constexpr int kD = Tile::kD, kKeys = Tile::kKeys;
  const int64_t item = blockIdx.x / parts.count, sequence = item / p.Hkv, kv_head = item % p.Hkv, group = p.Hq / p.Hkv;
  const int part = static_cast<int>(blockIdx.x % parts.count), rows = static_cast<int>(p.Tq * group);
  const int first_key = parts.begin + part * parts.length;
  const int end_key = first_key + parts.length < parts.end ? first_key + parts.length : parts.end;
  const Band band{static_cast<int>(p.Tq), static_cast<int>(p.Tk), p.left, p.right};
  const Span by_all = band.seen_by_all(0, static_cast<int>(p.Tq));
  const ScoreScale scale(p);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);

  char* const shared = dynamic_shared<char>();
  const uint32_t base = shared_address(shared), ring = base + Tile::kQueryBytes + warp() * Tile::kRingBytes;
  const SharedTile<kD> queries{base};
  for (int row = 0; row < Tile::kRows; ++row) {  // rows of different heads lie anywhere
    if (row % Tile::kWarps != warp()) continue;
    const RowOfGroup at = row_of_group(kv_head, group, row < rows ? row : 0);
    const T* from = row_of<const T>(p.q, sequence, at.head, at.query);
    const int left = row < rows ? D - lane() * kChunk : 0;
    if (lane() < kD / kChunk) {
      Bytes16 bytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = 2 * i < left ? from[lane() * kChunk + 2 * i].bits : 0;
        const uint32_t high = 2 * i + 1 < left ? from[lane() * kChunk + 2 * i + 1].bits : 0;
        bytes.word[i] = low | high << 16;
      }
      store_shared(queries.chunk(row, lane()), bytes);
    }
  }

  // ---- this warp's keys
  const T* const key_rows = row_of<const T>(p.k, sequence, kv_head, 0);
  const T* const value_rows = row_of<const T>(p.v, sequence, kv_head, 0);
  const auto tile_of_step = [&](int step, int which) {
    return SharedTile<kD>{ring + (step % Tile::kStages * 2 + which) * Tile::kTileBytes};
  };
  const auto key_of_step = [&](int step) { return first_key + step * Tile::kStep + warp() * kKeys; };
  const int steps = end_key > first_key ? (end_key - first_key + Tile::kStep - 1) / Tile::kStep : 0;
  const auto load_step = [&](int step) {
    const int key = key_of_step(step), tokens = end_key - key;
    const int64_t token = tokens > 0 ? key : 0;
    load_rows<T, kKeys, kD, kWarpSize>(tile_of_step(step, 0).address, key_rows + token * p.k.token_stride,
                                       p.k.token_stride, tokens, D, aligned.k);
    load_rows<T, kKeys, kD, kWarpSize>(tile_of_step(step, 1).address, value_rows + token * p.v.token_stride,
                                       p.v.token_stride, tokens, Dv, aligned.v);
  };
  Span visible[2];
  MaskRows mask{};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane() / 4 + 8 * half;
    const RowOfGroup at = row_of_group(kv_head, group, row < rows ? row : 0);
    const Span seen = band.keys_of(at.query);
    visible[half] = row < rows ? Span{seen.begin, seen.end < end_key ? seen.end : end_key} : Span{0, 0};
    if (kMasked) mask.row[half] = mask_element(p, sequence, at.head, at.query, 0);
  }
  if (kMasked) {
    mask.column_stride = p.mask.key_stride * size_of(p.mask.dtype);
    mask.dtype = p.mask.dtype;
    mask.columns = static_cast<int>(p.Tk);
  }
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) load_step(step);
    copy_async_commit();
  }
  __syncthreads();  // the queries are there

  float out[kD / 8][4];
  clear(out);
  OnlineSoftmax softmax;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Tile::kStages - 2>();
    __syncwarp();
    if (step + Tile::kStages - 1 < steps) load_step(step + Tile::kStages - 1);
    copy_async_commit();
    const int key = key_of_step(step);
    float scores[kKeys / 8][4], keep[2];
    dot_rows<T, kKeys>(scores, queries, 0, tile_of_step(step, 0));
    const bool hides = kMasked || !by_all.contains({key, key + kKeys}) || key + kKeys > end_key;
    if (scale.finished) scale_scores(scores, scale);
    if constexpr (kMasked) add_mask(scores, mask, key);
    if (hides || rows < Tile::kRows) hide_outside(scores, visible, key);
    softmax.update(scores, scale.factor(), keep);
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] *= keep[e / 2];
    const SharedTile<kD> values = tile_of_step(step, 1);
    int* const flags =
        reinterpret_cast<int*>(shared + Tile::kStatesAt) + Tile::kWarps * 2 * Tile::kRows + warp() * kKeys;
    if (hides && __any_sync(kAllLanes, finds_bad_number<T, kKeys, kD, kWarpSize>(values)))
      add_bad_rows<T, kKeys, kD, kWarpSize>(values, flags, scores, out);
    add_weighted_rows<T, kKeys>(out, scores, values);
  }
  copy_async_wait<0>();
  softmax.finish();

  // ---- the warps' results, side by side in shared memory
  float* const states = reinterpret_cast<float*>(shared + Tile::kStatesAt);  // [warp][maxima, sums][16]
  float* const outputs = reinterpret_cast<float*>(shared + Tile::kQueryBytes);
  constexpr int kOutputs = Tile::kRingBytes / 4;  // floats from warp to warp
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane() / 4 + 8 * half;
    if (lane() % 4 == 0) {
      states[warp() * 2 * Tile::kRows + row] = softmax.highest[half];
      states[warp() * 2 * Tile::kRows + Tile::kRows + row] = softmax.sum[half];
    }
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
      store(outputs + warp() * kOutputs + row * kD + j * 8 + lane() % 4 * 2,
            make_float2(out[j][2 * half], out[j][2 * half + 1]));
  }
  __syncthreads();
  for (int row = warp(); row < rows; row += Tile::kWarps) {
    float top = kLowest, sum = 0.0f, weight[Tile::kWarps];
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) top = fmaxf(top, states[w * 2 * Tile::kRows + row]);
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
      weight[w] = exp2_approx(states[w * 2 * Tile::kRows + row] - top);
      sum = fmaf(weight[w], states[w * 2 * Tile::kRows + Tile::kRows + row], sum);
    }
    const RowOfGroup at = row_of_group(kv_head, group, row);
    T* const final_out = row_of<T>(p.out, sequence, at.head, at.query);
    float* const partial = p.workspace + (blockIdx.x * int64_t{rows} + row) * part_row_floats(p.Dv);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int d = lane(); d < Dv; d += kWarpSize) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < Tile::kWarps; ++w) total = fmaf(weight[w], outputs[w * kOutputs + row * kD + d], total);
      if (parts.count == 1) final_out[d] = from_float<T>(total * inverse);
      else partial[2 + d] = total;
    }
    if (lane() != 0) continue;
    if (parts.count == 1) *row_of<float>(p.lse, sequence, at.head, at.query) = natural_lse(top, sum);
    else partial[0] = top, partial[1] = sum;
  }
}

constexpr int kMergeThreads = 128;

// A block merges the parts of one row, in order.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_parts_kernel(const AttentionParams p, const int parts) {
  const int64_t group = p.Hq / p.Hkv, rows = p.Tq * group, item = blockIdx.x / rows, sequence = item / p.Hkv;
  const int row = static_cast<int>(blockIdx.x % rows);
  const RowOfGroup at = row_of_group(item % p.Hkv, group, row);
  const int64_t stride = rows * part_row_floats(p.Dv);
  const float* const first = p.workspace + item * parts * stride + row * part_row_floats(p.Dv);
  float top = kLowest, sum = 0.0f;
  for (int i = 0; i < parts; ++i) top = fmaxf(top, first[i * stride]);
  for (int i = 0; i < parts; ++i) sum = fmaf(exp2_approx(first[i * stride] - top), first[i * stride + 1], sum);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  T* const out = row_of<T>(p.out, sequence, at.head, at.query);
  for (int64_t d = thread(); d < p.Dv; d += kMergeThreads) {
    float total = 0.0f;
    for (int i = 0; i < parts; ++i)
      total = fmaf(exp2_approx(first[i * stride] - top), first[i * stride + 2 + d], total);
    out[d] = from_float<T>(total * inverse);
  }
  if (thread() == 0) *row_of<float>(p.lse, sequence, at.head, at.query) = natural_lse(top, sum);
}

template <class T, int kD>
void launch_decode(const AttentionParams& p, const Stream& stream) {
  using Tile = DecodeTile<kD>;
  const Band band{static_cast<int>(p.Tq), static_cast<int>(p.Tk), p.left, p.right};
  const int64_t items = p.B * p.Hkv;
  const KeyParts parts = key_parts(items, band.seen_by_any(0, static_cast<int>(p.Tq)));
  const Aligned aligned = {false, rows_aligned(p.k, p.B, p.Hkv), rows_aligned(p.v, p.B, p.Hkv), false,
                           false, false, false, false};
  launch(stream, {static_cast<unsigned>(items * parts.count)}, Tile::kThreads, size_t{Tile::kBytes},
         p.mask.data ? attention_decode_kernel<T, Tile, true> : attention_decode_kernel<T, Tile, false>, p, aligned,
         parts);
  if (parts.count > 1)
    launch(stream, {static_cast<unsigned>(items * p.Tq * (p.Hq / p.Hkv))}, kMergeThreads, 0, merge_parts_kernel<T>, p,
           parts.count);
}

template <class T>
void decode(const AttentionParams& p, const Stream& stream) {
  const int64_t D = p.D > p.Dv ? p.D : p.Dv;
  if (D <= 64) launch_decode<T, 64>(p, stream);
  else if (D <= 128) launch_decode<T, 128>(p, stream);
  else launch_decode<T, 256>(p, stream);
}

}  // namespace

int64_t attention_workspace(int64_t B, int64_t Hq, int64_t Hkv, int64_t Tq, int64_t Tk, int64_t Dv) {
  if (Hkv == 0 || Tq * (Hq / Hkv) > kTileDecodeRows) return 0;
  const int64_t parts = most_parts(B * Hkv, Tk);
  return parts > 1 ? B * Hq * Tq * parts * part_row_floats(Dv) : 0;
}

void attention_decode_sm80(const AttentionParams& p, const Stream& stream) {
  if (p.q.dtype == DType::bf16) decode<bf16>(p, stream);
  else decode<fp16>(p, stream);
}

}  // namespace llmfast::cuda
