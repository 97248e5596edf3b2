// Masked attention, forward, on tensor cores (bf16, fp16); see attention.h for the formula.
//
// A block owns kRows queries of one head, a warp 16 of them, with their outputs in registers:
//   Q to shared memory; for each tile of kKeys keys that some query sees (others are never touched):
//     S[16][kKeys] = Q K^T                                    mma, K by ldmatrix
//     softcap, mask tensor; the band where the tile crosses its edge
//     running maximum and sum, S -> P                         in registers; rows are shared by four lanes
//     O[16][kD] = O * 2^(old maximum - new) + P V             S's registers are P's fragments; V by ldmatrix.trans
//   out = O / sum, by way of Q's rows; lse
// K and V stream through two buffers: cp.async of the next tile runs under all the work on this one, with one barrier a
// tile. Heads of any size up to 256 are padded with zeros in shared memory alone.
//
// Memory: Q, 2 K, 2 V. kD 64: 128 queries, 64 keys, 48 KB; 128: 128, 64, 96 KB; 256: 64 queries, 32 keys, 96 KB.
// Every device from 8.0 on has 99 KB.
// Registers (nvcc 13.0.88, sm_80, -Xptxas -v): kD 64: 128, 16 bytes spilled, two blocks a multiprocessor; 128: 220;
// 256: 255, 28 bytes spilled. With a mask tensor 184, 226, and 255 with 16 bytes.
#include "attention/attention_cuda.h"
#include "attention/cuda/products.h"
#include "attention/cuda/rows.h"
#include "attention/cuda/scores.h"
#include "core/cuda_launch.h"

namespace llmfast::cuda {
namespace {

template <int kD_>
struct ForwardTile {
  static constexpr int kD = kD_, kRows = kD <= 128 ? 128 : 64, kKeys = kD <= 128 ? 64 : 32;
  static constexpr int kThreads = kRows / 16 * kWarpSize;
  static constexpr int kQueryBytes = kRows * kD * 2, kKeyBytes = kKeys * kD * 2;
  static constexpr int kKeysAt = kQueryBytes, kValuesAt = kKeysAt + 2 * kKeyBytes, kFlagsAt = kValuesAt + 2 * kKeyBytes;
  static constexpr int kBytes = kFlagsAt + kKeys * 4;
};

template <class T, class Tile, bool kMasked>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_forward_kernel(const AttentionParams p, const Aligned aligned, const int64_t query_tiles) {
  constexpr int kD = Tile::kD, kRows = Tile::kRows, kKeys = Tile::kKeys, kThreads = Tile::kThreads;

  // ---- which queries, which keys
  const int64_t head = blockIdx.x / query_tiles, kv_head = head / (p.Hq / p.Hkv);
  const TokenTile place = token_tile(blockIdx.x % query_tiles, p.B, p.Tq, p.first_q, kRows);
  const Sequence sequence = sequence_of(p, place.sequence);
  if (place.first >= sequence.Tq) return;
  const int end = place.first + kRows < sequence.Tq ? place.first + kRows : sequence.Tq;
  const Band band{sequence.Tq, sequence.Tk, p.left, p.right};
  const Span seen = band.seen_by_any(place.first, end), by_all = band.seen_by_all(place.first, end);
  const int first_tile = seen.begin / kKeys, end_tile = seen.empty() ? first_tile : (seen.end + kKeys - 1) / kKeys;
  const int my_row = place.first + warp() * 16;
  Span visible[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) visible[half] = band.keys_of(my_row + lane() / 4 + 8 * half);
  const ScoreScale scale(p);

  // ---- shared memory
  char* const shared = dynamic_shared<char>();
  const uint32_t base = shared_address(shared);
  const SharedTile<kD> queries{base};
  const auto keys_in = [&](int tile) { return SharedTile<kD>{base + Tile::kKeysAt + tile % 2 * Tile::kKeyBytes}; };
  const auto values_in = [&](int tile) { return SharedTile<kD>{base + Tile::kValuesAt + tile % 2 * Tile::kKeyBytes}; };
  const T* const key_rows = row_of<const T>(p.k, place.sequence, kv_head, sequence.first_k);
  const T* const value_rows = row_of<const T>(p.v, place.sequence, kv_head, sequence.first_k);
  const auto load_tile = [&](int tile) {
    const int first = tile * kKeys, tokens = sequence.Tk - first;
    load_rows<T, kKeys, kD, kThreads>(keys_in(tile).address, key_rows + int64_t{first} * p.k.token_stride,
                                      p.k.token_stride, tokens, static_cast<int>(p.D), aligned.k);
    load_rows<T, kKeys, kD, kThreads>(values_in(tile).address, value_rows + int64_t{first} * p.v.token_stride,
                                      p.v.token_stride, tokens, static_cast<int>(p.Dv), aligned.v);
  };

  // ---- over the keys
  const T* const query_rows = row_of<const T>(p.q, place.sequence, head, sequence.first_q + place.first);
  load_rows<T, kRows, kD, kThreads>(queries.address, query_rows, p.q.token_stride, sequence.Tq - place.first,
                                    static_cast<int>(p.D), aligned.q);
  if (first_tile < end_tile) load_tile(first_tile);
  copy_async_commit();
  float out[kD / 8][4];
  clear(out);
  OnlineSoftmax softmax;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    copy_async_wait<0>();
    __syncthreads();  // this tile has arrived, and nobody reads the one before it any more
    if (tile + 1 < end_tile) load_tile(tile + 1);
    copy_async_commit();
    float scores[kKeys / 8][4];
    dot_rows<T, kKeys>(scores, queries, warp() * 16, keys_in(tile));

    const bool hides = kMasked || !by_all.contains({tile * kKeys, tile * kKeys + kKeys});
    if (scale.finished) {
      scale_scores(scores, scale);
      if constexpr (kMasked)
        add_mask(scores,
                 mask_rows<false>(p, place.sequence, head, my_row, sequence.Tq - 1, sequence.Tk), tile * kKeys);
    }
    if (hides) hide_outside(scores, visible, tile * kKeys);
    float keep[2];
    softmax.update(scores, scale.factor(), keep);
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] *= keep[e / 2];

    if (hides && __syncthreads_or(finds_bad_number<T, kKeys, kD, kThreads>(values_in(tile))))
      add_bad_rows<T, kKeys, kD, kThreads>(values_in(tile), reinterpret_cast<int*>(shared + Tile::kFlagsAt), scores,
                                           out);
    add_weighted_rows<T, kKeys>(out, scores, values_in(tile));
  }
  copy_async_wait<0>();
  __syncthreads();  // where there was no tile, copies of other threads may still have been under way

  // ---- out and lse
  softmax.finish();
  const int rows = end - my_row < 16 ? end - my_row : 16;
  const float factor[2] = {softmax.inverse(0), softmax.inverse(1)};
  store_accumulators<T>(queries, warp() * 16, out, factor,
                        row_of<T>(p.out, place.sequence, head, sequence.first_q + my_row), p.out.token_stride, rows,
                        static_cast<int>(p.Dv), aligned.out);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane() / 4 + 8 * half;
    if (lane() % 4 == 0 && row < rows)
      *row_of<float>(p.lse, place.sequence, head, sequence.first_q + my_row + row) =
          natural_lse(softmax.highest[half], softmax.sum[half]);
  }
}

template <class T, int kD>
void launch_forward(const AttentionParams& p, const Stream& stream) {
  using Tile = ForwardTile<kD>;
  const auto fits = [&](const HeadTensor& t, int64_t heads) { return rows_aligned(t, p.B, heads); };
  const Aligned aligned = {fits(p.q, p.Hq), fits(p.k, p.Hkv), fits(p.v, p.Hkv), fits(p.out, p.Hq),
                           false,           false,            false,            false};
  const int64_t tiles = tile_count(p.B, p.Tq, p.first_q != nullptr, Tile::kRows);
  launch(stream, {static_cast<unsigned>(tiles * p.Hq)}, Tile::kThreads, size_t{Tile::kBytes},
         p.mask.data ? attention_forward_kernel<T, Tile, true> : attention_forward_kernel<T, Tile, false>, p, aligned,
         tiles);
}

template <class T>
void forward(const AttentionParams& p, const Stream& stream) {
  const int64_t D = p.D > p.Dv ? p.D : p.Dv;
  if (D <= 64) launch_forward<T, 64>(p, stream);
  else if (D <= 128) launch_forward<T, 128>(p, stream);
  else launch_forward<T, 256>(p, stream);
}

}  // namespace

void attention_forward_sm80(const AttentionParams& p, const Stream& stream) {
  if (p.q.dtype == DType::bf16) forward<bf16>(p, stream);
  else forward<fp16>(p, stream);
}

}  // namespace llmfast::cuda
