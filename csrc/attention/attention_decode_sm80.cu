// Masked attention for few queries to a key/value head (decoding), on tensor cores; see attention.h for the formula.
//
// All queries of a kv head, Tq * Hq / Hkv <= 16, are the rows of one mma tile: row r is query r / group of head
// kv_head * group + r % group, so that every byte of K and V is read once. The keys that some query sees are cut into
// parts, a block each; in a block each warp takes every kWarps-th 16 keys through its own ring of cp.async stages and
// its own running softmax, without a barrier:
//   S[16][16] = Q K^T; softcap, mask, band; maximum and sum, S -> P; O[16][kD] = O * 2^(old maximum - new) + P V
// At the end the warps' results are merged in the order of the warps, and several parts' by a second kernel, which
// starts under the end of the first, in an order of their own; the number of parts depends on the shape alone
// (decode_parts.h). Deterministic.
//
// A short kernel's time is its start and its end, and instructions that come from memory for the first time are much of
// both. So copies are issued before anything waits, in one place for the whole loop; what most calls do not need (mask,
// softcap, keys that only some queries see, rows that cp.async cannot copy) is compiled apart; and indices have 32
// bits. Instructions of the plain kernel (nvcc 13.0.88, sm_90), and of those in the loop: kD 64: 936 and 315; 128: 1136
// and 545; when all were one kernel 4464 and 1873, 5848 and 2936.
//
// Memory: Q and the rings. kD 64: 8 warps x 3 stages, 98 KB; 128: 4 x 2, 68 KB; 256: 2 x 2, 72 KB.
// Registers (nvcc 13.0.88, sm_90, -Xptxas -v), plain and other: kD 64: 120, 126; 128: 158, 168; 256: 212, 255. No spill
// but 12 bytes in the other one of kD 128.
#include "attention/attention_cuda.h"
#include "attention/cuda/decode_rows.h"
#include "core/cuda_launch.h"
#include "ptx/grid.h"
#include "ptx/warp.h"

namespace llmfast::cuda {
namespace {

// kPlain: all queries see all of the keys, no softcap, no mask tensor, and rows of whole aligned chunks.
template <class T, class Tile, bool kPlain>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    attention_decode_kernel(const AttentionParams p, const DecodeShape shape) {
  constexpr int kD = Tile::kD, kKeys = Tile::kKeys;
  let_next_kernel_start();
  const unsigned item = blockIdx.x, part = blockIdx.y, sequence = item / shape.Hkv, kv_head = item % shape.Hkv;
  const int first_key = shape.parts.begin + static_cast<int>(part) * shape.parts.length;
  const int end_key = min(first_key + shape.parts.length, shape.parts.end), D = static_cast<int>(p.D);
  const int Dv = static_cast<int>(p.Dv);
  const int steps = end_key > first_key ? (end_key - first_key + Tile::kStep - 1) / Tile::kStep : 0;

  // ---- copies
  char* const shared = dynamic_shared<char>();
  const uint32_t base = shared_address(shared), ring = base + Tile::kQueryBytes + warp() * Tile::kRingBytes;
  const SharedTile<kD> queries{base};
  const auto tile_of_step = [&](int step, int which) {
    return SharedTile<kD>{ring + (step % Tile::kStages * 2 + which) * Tile::kTileBytes};
  };
  const auto key_of_step = [&](int step) { return first_key + step * Tile::kStep + warp() * kKeys; };
  const int own_first = key_of_step(0);
  RowCopies<T, Tile> keys_of_lane(p.k, sequence, kv_head, own_first, D);
  RowCopies<T, Tile> values_of_lane(p.v, sequence, kv_head, own_first, Dv);
  const auto load_step = [&](int step) {
    const int key = key_of_step(step), tokens = end_key - key;
    if constexpr (kPlain) {
      keys_of_lane.copy(tile_of_step(step, 0), tokens);
      values_of_lane.copy(tile_of_step(step, 1), tokens);
    } else {
      const int64_t token = tokens > 0 ? key : 0;
      load_rows<T, kKeys, kD, kWarpSize>(tile_of_step(step, 0).address,
                                         row_of<const T>(p.k, sequence, kv_head, token), p.k.token_stride, tokens, D,
                                         shape.aligned_k);
      load_rows<T, kKeys, kD, kWarpSize>(tile_of_step(step, 1).address,
                                         row_of<const T>(p.v, sequence, kv_head, token), p.v.token_stride, tokens, Dv,
                                         shape.aligned_v);
    }
  };

  // ---- which keys this lane's rows see
  const RowsOfLane<kPlain> mine(p, shape, sequence, kv_head, end_key);

  // ---- over the keys: all stages are under way when a step is waited for
  float out[kD / 8][4];
  uint32_t held[Tile::kHoldsQueries ? kD / 16 : 1][4];
  const auto fragment = [&](uint32_t(&a)[4], int d) {
    if constexpr (Tile::kHoldsQueries)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[d / 16][i];
    else read_a<Major::k>(a, queries, 0, d, lane());
  };
  clear(out);
  OnlineSoftmax softmax;
  for (int ahead = 0; ahead < steps + Tile::kStages - 1; ++ahead) {
    if (ahead < steps) load_step(ahead);
    if (ahead == 0) load_queries<T, Tile>(queries, p, shape, sequence, kv_head, kPlain || shape.aligned_q);
    copy_async_commit();
    const int step = ahead - (Tile::kStages - 1);
    if (step < 0) continue;
    copy_async_wait<Tile::kStages - 1>();
    if (step > 0) {
      __syncwarp();
    } else {
      __syncthreads();  // the queries are there
      if constexpr (Tile::kHoldsQueries)
#pragma unroll
        for (int d = 0; d < kD; d += 16) read_a<Major::k>(held[d / 16], queries, 0, d, lane());
    }
    const int key = key_of_step(step), end = min(key + kKeys, end_key);
    if (key >= end) continue;
    float scores[kKeys / 8][4], keep[2];
    dot_queries<T, kD>(scores, fragment, tile_of_step(step, 0));
    const bool hides = mine.hides({key, end});
    mine.finish(scores, key);
    if (hides || end < key + kKeys) hide_outside(scores, mine.visible, key);
    softmax.update(scores, mine.factor(), keep);
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] *= keep[e / 2];
    const SharedTile<kD> values = tile_of_step(step, 1);
    if constexpr (!kPlain) {
      int* const flags = reinterpret_cast<int*>(shared + Tile::kFlagsAt) + warp() * kKeys;
      if (hides && __any_sync(kAllLanes, finds_bad_number<T, kKeys, kD, kWarpSize>(values)))
        add_bad_rows<T, kKeys, kD, kWarpSize>(values, flags, scores, out);
    }
    add_weighted_rows<T, kKeys>(out, scores, values);
    __syncwarp();  // all lanes have read what the next copies replace
  }
  copy_async_wait<0>();
  softmax.finish();

  // ---- the warps' results, side by side in shared memory, merged in their order
  const auto results_of = [&](int w) {
    return reinterpret_cast<float*>(shared + Tile::kQueryBytes + w * Tile::kRingBytes);
  };
  const auto states_of = [&](int w) { return reinterpret_cast<float2*>(results_of(w) + Tile::kStatesAt / 4); };
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned row = lane() / 4 + 8 * half;
    if (row >= shape.rows) continue;
    float* const to = results_of(warp()) + row * Tile::kOutputRow + lane() % 4 * 2;
    if (lane() % 4 == 0) store(states_of(warp()) + row, make_float2(softmax.highest[half], softmax.sum[half]));
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) store(to + j * 8, make_float2(out[j][2 * half], out[j][2 * half + 1]));
  }
  __syncthreads();
  const PartResults results(p.workspace, gridDim.x, shape.parts.count, shape.rows, Dv);
#pragma unroll 1
  for (unsigned i = thread(); i < shape.rows * (kD / 4); i += Tile::kThreads) {
    const unsigned row = i / (kD / 4);
    const int d = i % (kD / 4) * 4;
    if (d >= Dv) continue;
    float top = kLowest, sum = 0.0f, total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) top = fmaxf(top, states_of(w)[row].x);
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) {
      const float2 state = states_of(w)[row];
      const float weight = exp2_approx(state.x - top);
      const float4 four = load<float4>(results_of(w) + row * Tile::kOutputRow + d);
      sum = fmaf(weight, state.y, sum);
      total[0] = fmaf(weight, four.x, total[0]), total[1] = fmaf(weight, four.y, total[1]);
      total[2] = fmaf(weight, four.z, total[2]), total[3] = fmaf(weight, four.w, total[3]);
    }
    if (shape.parts.count > 1) {
      store(results.output(item, part, row) + d, make_float4(total[0], total[1], total[2], total[3]));
      if (d == 0) store(results.state(item, row) + part, make_float2(top, sum));
      continue;
    }
    const RowOfGroup at = row_of_group(kv_head, shape.group, row);
    T* const to = row_of<T>(p.out, sequence, at.head, at.query) + d;
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (d + e < Dv) to[e] = from_float<T>(total[e] * inverse);
    if (d == 0) *row_of<float>(p.lse, sequence, at.head, at.query) = natural_lse(top, sum);
  }
}

// A block merges the parts of one row. Its warps share the parts, each summing every kMergeWarps-th in order; then
// their sums are added in order.
constexpr int kMergeWarps = 8, kMergeThreads = kMergeWarps * kWarpSize, kMergeColumns = 4 * kWarpSize;
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_parts_kernel(const AttentionParams p, const DecodeShape shape) {
  __shared__ float totals[kMergeWarps][kMergeColumns];
  __shared__ float weights[kMostKeyParts];
  const unsigned item = blockIdx.x / shape.rows, row = blockIdx.x % shape.rows, sequence = item / shape.Hkv;
  const RowOfGroup at = row_of_group(item % shape.Hkv, shape.group, row);
  const int Dv = static_cast<int>(p.Dv), parts = shape.parts.count;
  const PartResults results(p.workspace, p.B * p.Hkv, parts, shape.rows, Dv);
  wait_for_previous_kernel();

  // ---- every warp: the maximum and the sum of all parts
  const float2* const states = results.state(item, row);
  float top = kLowest, sum = 0.0f;
#pragma unroll 1
  for (int i = lane(); i < parts; i += kWarpSize) top = fmaxf(top, load<float2>(states + i).x);
  top = warp_max(top);
#pragma unroll 1
  for (int i = lane(); i < parts; i += kWarpSize) {
    const float2 state = load<float2>(states + i);
    const float weight = exp2_approx(state.x - top);
    sum = fmaf(weight, state.y, sum);
    if (warp() == 0) weights[i] = weight;
  }
  sum = warp_sum(sum);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (thread() == 0) *row_of<float>(p.lse, sequence, at.head, at.query) = natural_lse(top, sum);

  // ---- outputs: four columns a lane
  for (int first = 0; first < Dv; first += kMergeColumns) {
    const int d = first + lane() * 4;
    const float* const from = results.output(item, 0, row) + d;
    const int64_t apart = int64_t{shape.rows} * results.width;  // from part to part
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    __syncthreads();  // weights are there, totals have been read
    if (d < Dv)
#pragma unroll 4
      for (int i = warp(); i < parts; i += kMergeWarps) {
        const float4 four = load<float4>(from + i * apart);
        const float weight = weights[i];
        total.x = fmaf(weight, four.x, total.x), total.y = fmaf(weight, four.y, total.y);
        total.z = fmaf(weight, four.z, total.z), total.w = fmaf(weight, four.w, total.w);
      }
    store(&totals[warp()][lane() * 4], total);
    __syncthreads();
    const int column = thread();
    if (column >= kMergeColumns || first + column >= Dv) continue;
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kMergeWarps; ++w) value += totals[w][column];
    row_of<T>(p.out, sequence, at.head, at.query)[first + column] = from_float<T>(value * inverse);
  }
}

template <class T, int kD>
void launch_decode(const AttentionParams& p, const Stream& stream) {
  using Tile = DecodeTile<kD>;
  const int Tq = static_cast<int>(p.Tq);
  const Band band{Tq, static_cast<int>(p.Tk), p.left, p.right};
  const int64_t items = p.B * p.Hkv, group = p.Hq / p.Hkv;
  const Span seen = band.seen_by_any(0, Tq);
  const DecodeShape shape{key_parts(items, seen, decode_width(p.Dv)),
                          static_cast<unsigned>(p.Hkv),
                          static_cast<unsigned>(group),
                          static_cast<unsigned>(p.Tq * group),
                          rows_aligned(p.q, p.B, p.Hq),
                          rows_aligned(p.k, p.B, p.Hkv),
                          rows_aligned(p.v, p.B, p.Hkv)};
  const bool whole = p.D % kChunk == 0 && p.Dv % kChunk == 0 && shape.aligned_q && shape.aligned_k && shape.aligned_v;
  const bool plain = whole && !p.mask.data && p.softcap == 0.0f && p.scale > 0.0f &&
                     band.seen_by_all(0, Tq).contains(seen);
  const auto parts = static_cast<unsigned>(shape.parts.count);
  launch(stream, {static_cast<unsigned>(items), parts}, Tile::kThreads, size_t{Tile::kBytes},
         plain ? attention_decode_kernel<T, Tile, true> : attention_decode_kernel<T, Tile, false>, p, shape);
  if (parts > 1)
    launch_early(stream, {static_cast<unsigned>(items) * shape.rows}, kMergeThreads, 0, merge_parts_kernel<T>, p,
                 shape);
}

template <class T>
void decode(const AttentionParams& p, const Stream& stream) {
  switch (decode_width(p.D > p.Dv ? p.D : p.Dv)) {
    case 64: return launch_decode<T, 64>(p, stream);
    case 128: return launch_decode<T, 128>(p, stream);
    default: return launch_decode<T, 256>(p, stream);
  }
}

}  // namespace

int64_t attention_workspace(int64_t B, int64_t Hq, int64_t Hkv, int64_t Tq, int64_t Tk, int64_t Dv) {
  if (Hkv == 0 || Tq * (Hq / Hkv) > kTileDecodeRows) return 0;
  const int64_t parts = most_parts(B * Hkv, Tk, decode_width(Dv));
  return parts > 1 ? B * Hq * Tq * parts * (ceil_div(Dv, 4) * 4 + 2) : 0;
}

void attention_decode_sm80(const AttentionParams& p, const Stream& stream) {
  if (p.q.dtype == DType::bf16) decode<bf16>(p, stream);
  else decode<fp16>(p, stream);
}

}  // namespace llmfast::cuda
