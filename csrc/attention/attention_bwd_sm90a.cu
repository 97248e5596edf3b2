// Masked attention, backward, on Hopper's warpgroup products (bf16, fp16; head dims up to 128, no mask tensor); see
// attention.h for the formula.
//
// As on sm_80 two kernels after a small one that computes each row's lse and delta: the keys' kernel sums grad_k and
// grad_v (cuda/hopper_backward_keys.h), the queries' kernel grad_q (cuda/hopper_backward_queries.h). Each sum belongs
// to one warpgroup and runs in the order of the tiles: no atomics, bitwise deterministic, at the price of seven
// products instead of five. cuda/hopper_backward_joint.h has those five in one kernel, whose sums' order varies; the
// benchmark program runs it, nothing else does.
//
// Registers (nvcc 13.0.88; the highest in the SASS, of 232 that consumers have) and bytes spilled for kD 64 and 128:
// keys 226, 48 and 229, 84; queries 215, 0 and 229, 8. 48 of the keys' are the producer's, once a block of keys; kD 128
// reloads 12 bytes of descriptors a step. With softcap: keys 244 and 104 bytes, queries 0 and 44. No product is
// serialised.
#include "attention/attention_cuda.h"
#include "attention/cuda/hopper_backward_joint.h"
#include "attention/cuda/hopper_backward_keys.h"
#include "attention/cuda/hopper_backward_queries.h"

namespace llmfast::cuda {
namespace {

constexpr int64_t kMostBlocks = int64_t{1} << 30, kBlocksOfSection = 264;

struct Maps {
  TensorMap k, v, q, grad_out;

  Maps(const AttentionBackwardParams& p, int key_rows, int query_rows)
      : k(make_tensor_map(mapped(p.k, mapped_sequences(p), p.Hkv, p.Tk, p.D, key_rows))),
        v(make_tensor_map(mapped(p.v, mapped_sequences(p), p.Hkv, p.Tk, p.Dv, key_rows))),
        q(make_tensor_map(mapped(p.q, mapped_sequences(p), p.Hq, p.Tq, p.D, query_rows))),
        grad_out(make_tensor_map(mapped(p.grad_out, mapped_sequences(p), p.Hq, p.Tq, p.Dv, query_rows))) {}
};

// Blocks: tiles of a sequence (packed: of all), heads, sequences.
inline Grid grid_of(const AttentionBackwardParams& p, int64_t tokens, int64_t heads) {
  const int64_t tiles = tile_count(p.first_q ? p.B : 1, tokens, p.first_q != nullptr, kOwnRows);
  return {static_cast<unsigned>(tiles), static_cast<unsigned>(heads), static_cast<unsigned>(mapped_sequences(p))};
}

// A block on each multiprocessor that takes one tile after another, so that the next tile's first copies and the last
// one's stores overlap products; or a block a tile. The statistics' kernel before it resets the counters.
template <bool kCounted, class Kernel>
void launch_tiles(const AttentionBackwardParams& p, const Stream& stream, Grid tiles, size_t bytes, Kernel kernel,
                  const Maps& maps) {
  const int64_t all = int64_t{tiles.x} * tiles.y * tiles.z, places = device_info(stream.device).multiprocessors;
  launch(stream, {static_cast<unsigned>(kCounted && places < all ? places : all)}, kHopperThreads, bytes, kernel, p,
         maps.k, maps.v, maps.q, maps.grad_out, static_cast<int>(tiles.x), kCounted);
}

template <class T, class Layout, bool kCapped, bool kCounted = true>
void launch_keys(const AttentionBackwardParams& p, const Stream& stream) {
  launch_tiles<kCounted>(p, stream, grid_of(p, p.Tk, p.Hkv), Layout::kBytes,
                         attention_grad_kv_kernel<T, Layout, kCapped>, Maps(p, kOwnRows, Layout::kQueries));
}

template <class T, class Layout, bool kCapped, bool kCounted = true>
void launch_queries(const AttentionBackwardParams& p, const Stream& stream) {
  launch_tiles<kCounted>(p, stream, grid_of(p, p.Tq, p.Hq), Layout::kBytes,
                         attention_grad_q_kernel<T, Layout, kCapped>, Maps(p, Layout::kKeys, kOwnRows));
}

// The statistics' kernel before it zeroes the sums, unless kOrdered, and the turns.
template <class T, class Layout, bool kCapped>
void launch_jointly(const AttentionBackwardParams& p, const Stream& stream) {
  const Maps maps(p, kOwnRows, Layout::kQueries);
  const Grid grid = grid_of(p, p.Tk, p.Hkv);
  const int64_t heads = int64_t{grid.y} * grid.z, wanted = Layout::kOrdered ? kBlocksOfSection / grid.x : 1;
  const int section = static_cast<int>(wanted < 1 ? 1 : wanted < heads ? wanted : heads);
  launch(stream, {static_cast<unsigned>(grid.x * heads)}, kHopperThreads, size_t{Layout::kBytes},
         attention_grad_joint_kernel<T, Layout, kCapped>, p, maps.k, maps.v, maps.q, maps.grad_out,
         static_cast<int>(grid.x), section);
}
template <class T, int kD>
void launch_rounding(const AttentionBackwardParams& p, const Stream& stream) {
  const int64_t parts = 2 * slots_of_head(p.B, p.Tq, p.first_q != nullptr) * (kSlotRows * kD / 8192);
  launch(stream, {static_cast<unsigned>(parts), static_cast<unsigned>(p.Hq)}, kWarpgroup,
         SlabTile<64, 64>::kBytes + kSharedAlignment, round_query_sums_kernel<T, kD>, p);
}

template <class T, int kD, bool kCapped>
void launch_kernels(const AttentionBackwardParams& p, const Stream& stream) {
  launch_query_statistics<T, kD / 8>(p, stream);
  launch_keys<T, KeysLayout<kD, kD == 64 ? 128 : 64, 2>, kCapped>(p, stream);
  launch_queries<T, QueriesLayout<kD, 128, kD == 64 ? 3 : 2, kD != 64>, kCapped>(p, stream);
}

template <class T, int kD>
void launch_one_pass(const AttentionBackwardParams& p, const Stream& stream) {
  float* const sums = p.workspace + attention_backward_workspace(p.B, p.Hq, p.Tq, p.first_q);
  launch_query_statistics<T, kD / 8>(p, stream, sums, false);
  launch_jointly<T, JointLayout<kD, 8192 / kD, 2, true>, false>(p, stream);
  launch_rounding<T, kD>(p, stream);
}

template <class T, int kD>
void launch_backward(const AttentionBackwardParams& p, const Stream& stream) {
  if (in_one_pass(p)) launch_one_pass<T, kD>(p, stream);
  else if (p.softcap > 0.0f) launch_kernels<T, kD, true>(p, stream);
  else launch_kernels<T, kD, false>(p, stream);
}

template <class T>
void backward(const AttentionBackwardParams& p, const Stream& stream) {
  if (p.D <= 64 && p.Dv <= 64) launch_backward<T, 64>(p, stream);
  else launch_backward<T, 128>(p, stream);
}

}  // namespace

bool supports_attention_backward_sm90a(const AttentionBackwardParams& p) {
  if (p.mask.data || p.D > 128 || p.Dv > 128 || p.D % kChunk != 0 || p.Dv % kChunk != 0) return false;
  if (p.Tq == 0 || p.Tk == 0) return false;
  if (p.B * p.Hq * ((p.Tq > p.Tk ? p.Tq : p.Tk) / kOwnRows + 1) > kMostBlocks) return false;
  const int64_t sequences = mapped_sequences(p);
  const auto maps = [&](const HeadTensor& t, int64_t heads, int64_t tokens, int64_t D) {
    return can_map(mapped(t, sequences, heads, tokens, D, 64));
  };
  return maps(p.q, p.Hq, p.Tq, p.D) && maps(p.k, p.Hkv, p.Tk, p.D) && maps(p.v, p.Hkv, p.Tk, p.Dv) &&
         maps(p.grad_out, p.Hq, p.Tq, p.Dv) && rows_aligned(p.grad_q, sequences, p.Hq) &&
         rows_aligned(p.grad_k, sequences, p.Hkv) && rows_aligned(p.grad_v, sequences, p.Hkv);
}

void attention_backward_sm90a(const AttentionBackwardParams& p, const Stream& stream) {
  if (p.q.dtype == DType::bf16) backward<bf16>(p, stream);
  else backward<fp16>(p, stream);
}

}  // namespace llmfast::cuda
