// Masked attention, backward, on tensor cores (bf16, fp16); see attention.h for the formula.
//
// Two kernels of one shape, after a small one that computes each row's lse and delta:
//   grad_q:          a block owns kRows queries of a head and walks over the tiles of keys that they see
//   grad_k, grad_v:  a block owns kRows keys of a kv head and walks over all its heads' tiles of queries that see them
// A warp owns 16 of the rows. For each tile of kColumns of the other side:
//   S = own rows . other rows,  dP = grad_out . v           mma, both operands from shared memory
//   P = 2^(S - lse),  dS = P (dP - delta)                   in registers; hidden entries are 0
//   grad_q += dS K        or        grad_v += P grad_out,  grad_k += dS Q      P and dS are fragments as they stand
// Each sum belongs to one warp and runs in the order of the tiles: no atomics, bitwise deterministic. The price is
// seven products instead of the five of a single pass that adds grad_q in memory.
//
// Memory: the block's two tiles, and two buffers of two streamed ones. kD 64: 128 rows, 64 columns, 64 KB; 128: 128,
// 32, 96 KB; 256: 64, 16, 96 KB, and grad_k and grad_v by one launch each, because both do not fit the registers.
// Registers (nvcc 13.0.88, sm_80, -Xptxas -v) for kD 64, 128, 256: grad_q 226, 205, 255 with 16 bytes spilled; grad_k
// and grad_v 246, 255 with 4 bytes, and 255 with 48 bytes (grad_k) and 254 (grad_v). With a mask tensor no more than 24
// bytes.
#include "attention/attention_cuda.h"
#include "attention/cuda/gradients.h"
#include "attention/cuda/products.h"

namespace llmfast::cuda {
namespace {

template <int kD_>
struct BackwardTile {
  static constexpr int kD = kD_, kRows = kD <= 128 ? 128 : 64, kColumns = kD == 64 ? 64 : kD == 128 ? 32 : 16;
  static constexpr int kThreads = kRows / 16 * kWarpSize;
  static constexpr int kOwnBytes = kRows * kD * 2, kOtherBytes = kColumns * kD * 2;
  static constexpr int kStatisticsBytes = kColumns * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kOthersAt = 2 * kOwnBytes, kStatisticsAt = kOthersAt + 4 * kOtherBytes;
  static constexpr int kFlagsAt = kStatisticsAt + 2 * kStatisticsBytes, kBytes = kFlagsAt + kColumns * 4;

  // Shared memory: the block's own rows of q and grad_out (or k and v), and the streamed rows of the other two.
  __device__ static SharedTile<kD> own(uint32_t base, int which) { return {base + which * kOwnBytes}; }
  __device__ static SharedTile<kD> other(uint32_t base, int which, int buffer) {
    return {base + kOthersAt + (2 * buffer + which) * kOtherBytes};
  }
};

// ---- grad_q ---------------------------------------------------------------------------------------------------------

template <class T, class Tile, bool kMasked>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_grad_q_kernel(const AttentionBackwardParams p, const Aligned aligned, const int64_t query_tiles) {
  constexpr int kD = Tile::kD, kRows = Tile::kRows, kKeys = Tile::kColumns, kThreads = Tile::kThreads;
  const int64_t head = blockIdx.x / query_tiles, kv_head = head / (p.Hq / p.Hkv);
  const TokenTile place = token_tile(blockIdx.x % query_tiles, p.B, p.Tq, p.first_q, kRows);
  const Sequence sequence = sequence_of(p, place.sequence);
  if (place.first >= sequence.Tq) return;
  const int end = place.first + kRows < sequence.Tq ? place.first + kRows : sequence.Tq;
  const Band band{sequence.Tq, sequence.Tk, p.left, p.right};
  const Span seen = band.seen_by_any(place.first, end), by_all = band.seen_by_all(place.first, end);
  const int first_tile = seen.begin / kKeys, end_tile = seen.empty() ? first_tile : (seen.end + kKeys - 1) / kKeys;
  const int my_row = place.first + warp() * 16;
  const ScoreScale scale(p);

  char* const shared = dynamic_shared<char>();
  const uint32_t base = shared_address(shared);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const T* const key_rows = row_of<const T>(p.k, place.sequence, kv_head, sequence.first_k);
  const T* const value_rows = row_of<const T>(p.v, place.sequence, kv_head, sequence.first_k);
  const auto load_tile = [&](int tile) {
    const int first = tile * kKeys, tokens = sequence.Tk - first;
    load_rows<T, kKeys, kD, kThreads>(Tile::other(base, 0, tile % 2).address,
                                      key_rows + int64_t{first} * p.k.token_stride, p.k.token_stride, tokens, D,
                                      aligned.k);
    load_rows<T, kKeys, kD, kThreads>(Tile::other(base, 1, tile % 2).address,
                                      value_rows + int64_t{first} * p.v.token_stride, p.v.token_stride, tokens, Dv,
                                      aligned.v);
  };
  const SharedTile<kD> queries = Tile::own(base, 0), grad_out = Tile::own(base, 1);
  load_rows<T, kRows, kD, kThreads>(queries.address,
                                    row_of<const T>(p.q, place.sequence, head, sequence.first_q + place.first),
                                    p.q.token_stride, sequence.Tq - place.first, D, aligned.q);
  load_rows<T, kRows, kD, kThreads>(grad_out.address,
                                    row_of<const T>(p.grad_out, place.sequence, head, sequence.first_q + place.first),
                                    p.grad_out.token_stride, sequence.Tq - place.first, Dv, aligned.grad_out);
  if (first_tile < end_tile) load_tile(first_tile);
  copy_async_commit();

  float lse[2], delta[2];
  Span visible[2];
  bool absent = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = my_row + lane() / 4 + 8 * half;
    const RowStatistics own =
        row < end ? statistics_of(p, head, sequence)[row] : RowStatistics{infinity(), 0.0f};
    lse[half] = own.lse, delta[half] = own.delta;
    visible[half] = own.lse == infinity() ? Span{0, 0} : band.keys_of(row);
    absent |= own.lse == infinity();
  }

  float grad_q[kD / 8][4];
  clear(grad_q);
  for (int tile = first_tile; tile < end_tile; ++tile) {
    copy_async_wait<0>();
    __syncthreads();  // this tile has arrived, and nobody reads the one before it any more
    if (tile + 1 < end_tile) load_tile(tile + 1);
    copy_async_commit();
    const SharedTile<kD> keys = Tile::other(base, 0, tile % 2), values = Tile::other(base, 1, tile % 2);
    float scores[kKeys / 8][4], gradients[kKeys / 8][4];
    dot_rows<T, kKeys>(scores, queries, warp() * 16, keys);
    dot_rows<T, kKeys>(gradients, grad_out, warp() * 16, values);

    const bool hides = kMasked || !by_all.contains({tile * kKeys, tile * kKeys + kKeys});
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) scale_pair(scores[j][e], gradients[j][e], delta[e / 2], scale);
    if constexpr (kMasked)
      add_mask(scores, mask_rows<false>(p, place.sequence, head, my_row, sequence.Tq - 1, sequence.Tk), tile * kKeys);
    if (hides || absent) hide_outside(scores, visible, tile * kKeys);
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        gradients[j][e] = scores[j][e] == -infinity()
                              ? 0.0f
                              : exp2_approx(fmaf(scores[j][e], scale.factor(), -lse[e / 2])) * gradients[j][e];
    if (hides && __syncthreads_or(finds_bad_number<T, kKeys, kD, kThreads>(keys)))
      add_bad_rows<T, kKeys, kD, kThreads>(keys, reinterpret_cast<int*>(shared + Tile::kFlagsAt), gradients, grad_q);
    add_weighted_rows<T, kKeys>(grad_q, gradients, keys);
  }
  copy_async_wait<0>();
  __syncthreads();  // where there was no tile, copies of other threads may still have been under way
  const float factor[2] = {p.scale, p.scale};
  store_accumulators<T>(queries, warp() * 16, grad_q, factor,
                        row_of<T>(p.grad_q, place.sequence, head, sequence.first_q + my_row), p.grad_q.token_stride,
                        end - my_row < 16 ? end - my_row : 16, D, aligned.grad_q);
}

// ---- grad_k and grad_v ----------------------------------------------------------------------------------------------

// Rows of the streamed tiles that pass no gradient become zeros: whatever they hold must not meet a weight of 0.
template <class Tile>
__device__ void clear_absent_rows(uint32_t base, int buffer, const RowStatistics* statistics) {
  constexpr int kRowChunks = Tile::kD / kChunk;
  for (int i = thread(); i < Tile::kColumns * kRowChunks; i += Tile::kThreads)
    if (statistics[i / kRowChunks].lse == infinity())
#pragma unroll
      for (int which = 0; which < 2; ++which)
        store_shared(Tile::other(base, which, buffer).chunk(i / kRowChunks, i % kRowChunks), Bytes16{{0, 0, 0, 0}});
  __syncthreads();
}

template <class T, class Tile, bool kMasked, bool kOfKeys, bool kOfValues>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_grad_kv_kernel(const AttentionBackwardParams p, const Aligned aligned, const int64_t key_tiles) {
  constexpr int kD = Tile::kD, kRows = Tile::kRows, kQueries = Tile::kColumns, kThreads = Tile::kThreads;
  const int64_t kv_head = blockIdx.x / key_tiles, group = p.Hq / p.Hkv;
  const TokenTile place = token_tile(blockIdx.x % key_tiles, p.B, p.Tk, p.first_k, kRows);
  const Sequence sequence = sequence_of(p, place.sequence);
  if (place.first >= sequence.Tk) return;
  const int end = place.first + kRows < sequence.Tk ? place.first + kRows : sequence.Tk;
  const Band band = Band{sequence.Tq, sequence.Tk, p.left, p.right}.transposed();  // its keys are our queries
  const Span seen = band.seen_by_any(place.first, end), by_all = band.seen_by_all(place.first, end);
  const int first_tile = seen.begin / kQueries;
  const int tiles = seen.empty() ? 0 : (seen.end + kQueries - 1) / kQueries - first_tile;
  const int steps = tiles * static_cast<int>(group);  // the tiles of one head after another
  const int my_row = place.first + warp() * 16;
  Span visible[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) visible[half] = band.keys_of(my_row + lane() / 4 + 8 * half);
  const ScoreScale scale(p);

  char* const shared = dynamic_shared<char>();
  const uint32_t base = shared_address(shared);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const auto head_of = [&](int step) { return kv_head * group + step / tiles; };
  const auto first_of = [&](int step) { return (first_tile + step % tiles) * kQueries; };
  const auto statistics_in = [&](int step) {
    return reinterpret_cast<const RowStatistics*>(shared + Tile::kStatisticsAt + step % 2 * Tile::kStatisticsBytes);
  };
  const auto load_step = [&](int step) {
    const int64_t head = head_of(step);
    const int first = first_of(step), tokens = sequence.Tq - first;
    load_rows<T, kQueries, kD, kThreads>(Tile::other(base, 0, step % 2).address,
                                         row_of<const T>(p.q, place.sequence, head, sequence.first_q + first),
                                         p.q.token_stride, tokens, D, aligned.q);
    load_rows<T, kQueries, kD, kThreads>(Tile::other(base, 1, step % 2).address,
                                         row_of<const T>(p.grad_out, place.sequence, head, sequence.first_q + first),
                                         p.grad_out.token_stride, tokens, Dv, aligned.grad_out);
    if (thread() < kQueries) {
      const RowStatistics* const from = statistics_of(p, head, sequence);
      const bool exists = thread() < tokens;
      copy_async_8(shared_address(statistics_in(step) + thread()), from + (exists ? first + thread() : 0),
                   exists ? 8 : 0);
    }
  };
  const SharedTile<kD> keys = Tile::own(base, 0), values = Tile::own(base, 1);
  load_rows<T, kRows, kD, kThreads>(keys.address,
                                    row_of<const T>(p.k, place.sequence, kv_head, sequence.first_k + place.first),
                                    p.k.token_stride, sequence.Tk - place.first, D, aligned.k);
  load_rows<T, kRows, kD, kThreads>(values.address,
                                    row_of<const T>(p.v, place.sequence, kv_head, sequence.first_k + place.first),
                                    p.v.token_stride, sequence.Tk - place.first, Dv, aligned.v);
  if (steps > 0) load_step(0);
  copy_async_commit();

  float grad_k[kD / 8][4], grad_v[kD / 8][4];
  if (kOfKeys) clear(grad_k);
  if (kOfValues) clear(grad_v);
  for (int step = 0; step < steps; ++step) {
    const RowStatistics* const statistics = statistics_in(step);
    copy_async_wait<0>();
    // Each thread looks at the number that it copied itself. Behind the barrier this step's tiles have arrived, and
    // nobody reads those of the one before any more.
    const bool some_absent = __syncthreads_or(thread() < kQueries && statistics[thread()].lse == infinity());
    if (step + 1 < steps) load_step(step + 1);
    copy_async_commit();
    if (some_absent) clear_absent_rows<Tile>(base, step % 2, statistics);
    const SharedTile<kD> queries = Tile::other(base, 0, step % 2), grad_out = Tile::other(base, 1, step % 2);
    float scores[kQueries / 8][4], gradients[kQueries / 8][4];
    dot_rows<T, kQueries>(scores, keys, warp() * 16, queries);
    dot_rows<T, kQueries>(gradients, values, warp() * 16, grad_out);

    const int first = first_of(step);
    const auto statistics_of_column = [&](int j, int e) { return statistics[8 * j + lane() % 4 * 2 + e % 2]; };
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        scale_pair(scores[j][e], gradients[j][e], statistics_of_column(j, e).delta, scale);
    if constexpr (kMasked)
      add_mask(scores, mask_rows<true>(p, place.sequence, head_of(step), my_row, sequence.Tk - 1, sequence.Tq), first);
    if (kMasked || !by_all.contains({first, first + kQueries})) hide_outside(scores, visible, first);
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool hidden = scores[j][e] == -infinity();
        const float weight = exp2_approx(fmaf(scores[j][e], scale.factor(), -statistics_of_column(j, e).lse));
        scores[j][e] = hidden ? 0.0f : weight;
        gradients[j][e] = hidden ? 0.0f : weight * gradients[j][e];
      }
    if (kOfValues) add_weighted_rows<T, kQueries>(grad_v, scores, grad_out);
    if (kOfKeys) add_weighted_rows<T, kQueries>(grad_k, gradients, queries);
  }
  copy_async_wait<0>();
  __syncthreads();  // where there was no tile, copies of other threads may still have been under way
  const int rows = end - my_row < 16 ? end - my_row : 16;
  const int64_t token = sequence.first_k + my_row;
  const float one[2] = {1.0f, 1.0f}, factor[2] = {p.scale, p.scale};
  if (kOfKeys)
    store_accumulators<T>(keys, warp() * 16, grad_k, factor, row_of<T>(p.grad_k, place.sequence, kv_head, token),
                          p.grad_k.token_stride, rows, D, aligned.grad_k);
  if (kOfValues)
    store_accumulators<T>(values, warp() * 16, grad_v, one, row_of<T>(p.grad_v, place.sequence, kv_head, token),
                          p.grad_v.token_stride, rows, Dv, aligned.grad_v);
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <class T, int kD, bool kMasked>
void launch_kernels(const AttentionBackwardParams& p, const Stream& stream) {
  using Tile = BackwardTile<kD>;
  const auto fits = [&](const HeadTensor& t, int64_t heads) { return rows_aligned(t, p.B, heads); };
  const Aligned aligned = {fits(p.q, p.Hq),        fits(p.k, p.Hkv),     fits(p.v, p.Hkv),      fits(p.out, p.Hq),
                           fits(p.grad_out, p.Hq), fits(p.grad_q, p.Hq), fits(p.grad_k, p.Hkv), fits(p.grad_v, p.Hkv)};
  const auto run = [&](auto kernel, int64_t tiles, int64_t heads) {
    if (tiles * heads > 0)
      launch(stream, {static_cast<unsigned>(tiles * heads)}, Tile::kThreads, size_t{Tile::kBytes}, kernel, p, aligned,
             tiles);
  };
  const bool packed = p.first_q != nullptr;
  run(attention_grad_q_kernel<T, Tile, kMasked>, tile_count(p.B, p.Tq, packed, Tile::kRows), p.Hq);
  const int64_t tiles = tile_count(p.B, p.Tk, packed, Tile::kRows);
  if constexpr (kD <= 128) {
    run(attention_grad_kv_kernel<T, Tile, kMasked, true, true>, tiles, p.Hkv);
  } else {
    run(attention_grad_kv_kernel<T, Tile, kMasked, true, false>, tiles, p.Hkv);
    run(attention_grad_kv_kernel<T, Tile, kMasked, false, true>, tiles, p.Hkv);
  }
}

template <class T, int kD>
void launch_backward(const AttentionBackwardParams& p, const Stream& stream) {
  launch_row_statistics<T>(p, stream);
  if (p.mask.data) launch_kernels<T, kD, true>(p, stream);
  else launch_kernels<T, kD, false>(p, stream);
}

template <class T>
void backward(const AttentionBackwardParams& p, const Stream& stream) {
  const int64_t D = p.D > p.Dv ? p.D : p.Dv;
  if (D <= 64) launch_backward<T, 64>(p, stream);
  else if (D <= 128) launch_backward<T, 128>(p, stream);
  else launch_backward<T, 256>(p, stream);
}

}  // namespace

int64_t attention_backward_workspace(int64_t B, int64_t Hq, int64_t Tq, bool packed) {
  constexpr int kSlotRows = 128, kCounters = 4;  // Hopper's kernels want whole tiles of rows, and counters of work
  return Hq * tile_count(B, Tq, packed, kSlotRows) * kSlotRows *
             static_cast<int64_t>(sizeof(RowStatistics) / sizeof(float)) +
         kCounters;
}

void attention_backward_sm80(const AttentionBackwardParams& p, const Stream& stream) {
  if (p.q.dtype == DType::bf16) backward<bf16>(p, stream);
  else backward<fp16>(p, stream);
}

}  // namespace llmfast::cuda
