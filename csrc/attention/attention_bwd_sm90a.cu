// Masked attention, backward, on Hopper's warpgroup products (bf16, fp16; head dims up to 128); see attention.h for the
// formula.
//
// After a small kernel that computes each row's lse and delta it goes one of two ways:
// - as on sm_80 two kernels: the keys' sums grad_k and grad_v (cuda/hopper_backward_keys.h), the queries' grad_q
//   (cuda/hopper_backward_queries.h). Each sum belongs to one warpgroup and runs in the order of the tiles: nothing is
//   shared, at the price of seven products instead of five;
// - where many queries see a key (cuda/one_pass.h: backward_way), without softcap, mask tensor and packed sequences,
//   those five in one kernel (cuda/hopper_backward_joint.h), which adds grad_q up in memory, and a kernel that rounds it.
// The same bits every time come from the former, and from the latter where blocks take turns to add; with any_order they
// need not.
// A mask tensor of any strides, boolean or floating, goes with the two kernels (not beside a softcap): another small
// kernel finds the tiles that it hides, which are left out, and those that it does not touch, which cost nothing more
// (cuda/mask_classes.h). The others read it element by element, before their products: a bit for what is hidden, and
// what is added is where the products start.
//
// Within a warpgroup the exponentials run under grad_out's products, and what makes weights gradients under grad_v's
// product, or for grad_q its second half under the first half's product (Overlap in cuda/hopper_backward.h). In the
// one pass grad_q's product of the step before and grad_k's follow, and the former's sums go on their way under the
// latter. Registers of consumers: 229 of 232 at most. Bytes spilled, stores and loads (nvcc 13.0.88), kD 64 and 128:
// keys 200, a dozen words a step of 128 queries, and 136, none in the loop; queries 0 and 168, of which one word a
// step, more on the diagonal; one pass 168, in any order 192, and 0. With softcap: keys 68 and 204, queries 0 and 148.
// With a boolean mask: keys 396 and 520, queries 156 and 272; with a floating one 396 and 916, 324 and 176: the
// producer's, and in tiles that read it. No product is serialised.
//
// Measured: cuda/one_pass.h, for the ways that there are; benchmarks/LOG.md.
#include "attention/attention_cuda.h"
#include "attention/cuda/hopper_backward_joint.h"
#include "attention/cuda/hopper_backward_keys.h"
#include "attention/cuda/hopper_backward_queries.h"

namespace llmfast::cuda {
namespace {

constexpr int64_t kMostBlocks = int64_t{1} << 30;

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

template <class T, class Layout, Scoring kScoring, bool kCounted = true>
void launch_keys(const AttentionBackwardParams& p, const Stream& stream) {
  launch_tiles<kCounted>(p, stream, grid_of(p, p.Tk, p.Hkv), Layout::kBytes,
                         attention_grad_kv_kernel<T, Layout, kScoring>, Maps(p, kOwnRows, Layout::kQueries));
}

template <class T, class Layout, Scoring kScoring, bool kCounted = true>
void launch_queries(const AttentionBackwardParams& p, const Stream& stream) {
  launch_tiles<kCounted>(p, stream, grid_of(p, p.Tq, p.Hq), Layout::kBytes,
                         attention_grad_q_kernel<T, Layout, kScoring>, Maps(p, Layout::kKeys, kOwnRows));
}

// The statistics' kernel before it zeroes the sums, unless kOrdered, and the turns.
template <class T, class Layout, bool kCapped>
void launch_jointly(const AttentionBackwardParams& p, const Stream& stream) {
  const Maps maps(p, kOwnRows, Layout::kQueries);
  const Grid grid = grid_of(p, p.Tk, p.Hkv);
  const int64_t heads = int64_t{grid.y} * grid.z, wanted = Layout::kOrdered ? section_blocks(p) / grid.x : 1;
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

template <class T, int kD, Scoring kScoring>
void launch_kernels(const AttentionBackwardParams& p, const Stream& stream) {
  launch_query_statistics<T, kD / 8>(p, stream);
  if (is_masked(kScoring)) launch_mask_classes(p, stream, mask_classes_of(p));
  constexpr bool kWide = kD == 64 && kScoring == Scoring::plain;
  constexpr bool kDrains = kD != 64 || is_masked(kScoring);
  constexpr bool kShort = kD != 64 && kScoring == Scoring::added;  // of registers
  // Measured (H200): 64 dims causal 4k 0.956 ms without, 0.977 with; 128 dims full 4k 2.97 without, 2.72 with.
  constexpr Overlap kOverlap = kWide ? Overlap::none : Overlap::sums;
  using Keys = KeysLayout<kD, kWide ? 128 : 64, kD == 64 && !kWide ? 4 : 2, true,
                          kShort ? Overlap::weights : kOverlap>;
  using Queries = QueriesLayout<kD, kShort ? 64 : 128, kD == 64 || kShort ? 3 : 2, kDrains, kOverlap>;
  launch_keys<T, Keys, kScoring>(p, stream);
  launch_queries<T, Queries, kScoring>(p, stream);
}

template <class T, int kD, bool kOrdered>
void launch_one_pass(const AttentionBackwardParams& p, const Stream& stream) {
  float* const sums = p.workspace + attention_backward_workspace(p.B, p.Hq, p.Tq, p.first_q);
  launch_query_statistics<T, kD / 8>(p, stream, sums, !kOrdered);
  launch_jointly<T, JointLayout<kD, 8192 / kD, 2, kOrdered>, false>(p, stream);
  launch_rounding<T, kD>(p, stream);
}

template <class T, int kD>
void launch_backward(const AttentionBackwardParams& p, const Stream& stream) {
  const BackwardWay way = backward_way(p);
  if (way == BackwardWay::in_turns) launch_one_pass<T, kD, true>(p, stream);
  else if (way == BackwardWay::any_order) launch_one_pass<T, kD, false>(p, stream);
  else if (p.mask.data && p.mask.dtype == DType::boolean) launch_kernels<T, kD, Scoring::hidden>(p, stream);
  else if (p.mask.data) launch_kernels<T, kD, Scoring::added>(p, stream);
  else if (p.softcap > 0.0f) launch_kernels<T, kD, Scoring::capped>(p, stream);
  else launch_kernels<T, kD, Scoring::plain>(p, stream);
}

template <class T>
void backward(const AttentionBackwardParams& p, const Stream& stream) {
  if (p.D <= 64 && p.Dv <= 64) launch_backward<T, 64>(p, stream);
  else launch_backward<T, 128>(p, stream);
}

}  // namespace

bool supports_attention_backward_sm90a(const AttentionBackwardParams& p) {
  if (p.mask.data && (p.softcap > 0.0f || p.scale == 0.0f || MaskClasses(p).tiles() > kMostBlocks)) return false;
  if (p.D > 128 || p.Dv > 128 || p.D % kChunk != 0 || p.Dv % kChunk != 0) return false;
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
