// What the Hopper backward kernels share: shared-memory tiles as the copy engine writes them, the products that read
// them, two numbers a query row in slots of whole tiles, and the way of a finished tile to memory.
//
// Blocks run in the order of their index, all tiles of a head one after another, the longest first: the few heads that
// are under way together share the L2 cache.
//
// Roles of a block: warpgroups 0 and 1 compute, each with 64 rows of the block's own 128. Of warpgroup 2 one thread
// asks for copies, and warps 1 to 3 inspect tiles whose hidden rows might hold NaN or infinity, where there can be any.
#pragma once
#include "attention/attention_cuda.h"
#include "attention/cuda/one_pass.h"
#include "attention/cuda/rows.h"
#include "attention/cuda/scores.h"
#include "core/cuda_launch.h"
#include "gemm/cuda/epilogue.h"
#include "gemm/cuda/schedule.h"
#include "ptx/bulk_copy.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "ptx/warpgroup.h"

namespace llmfast::cuda {

constexpr int kWarpgroup = 128, kConsumers = 2, kHopperThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kOwnRows = 64 * kConsumers;                          // that a block owns
constexpr int kConsumerWarps = kConsumers * 4;                 // that arrive at barriers
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;   // 128 * (40 + 2 * 232) <= 65,536
constexpr int kSharedAlignment = 1024;                             // of swizzled tiles; asked for on top

// A number that is the same in all lanes, so that the compiler knows.
__device__ inline int uniform(int value) { return __shfl_sync(kAllLanes, value, 0); }

// ---- tiles ----------------------------------------------------------------------------------------------------------

// [kRows][kD] 16-bit elements in shared memory: slabs of 64 columns, one after another, rows of 128 bytes, chunks of 16
// bytes exchanged within a row (Swizzle::bytes128).
template <int kRows_, int kD_>
struct SlabTile {
  static constexpr int kRows = kRows_, kD = kD_;
  static constexpr int kSlabs = kD / 64, kSlabBytes = kRows * 128, kBytes = kSlabs * kSlabBytes;
  static_assert(kD % 64 == 0 && kRows % 8 == 0 && kRows <= 256);
  uint32_t address;

  __device__ uint32_t chunk(int row, int c) const {
    return address + c / 8 * kSlabBytes + row * 128 + ((c ^ row) % 8) * 16;
  }
  // Operands: rows first_row.. with columns 16 k.. as depth, and columns with rows 16 k.. as depth.
  __device__ uint64_t by_rows(int first_row, int k) const {
    return advanced(matrix_descriptor(address, 1024), first_row * 128 + k / 4 * kSlabBytes + k % 4 * 32);
  }
  __device__ uint64_t by_columns(int k) const {
    return advanced(matrix_descriptor(address, 1024, kSlabBytes), k * 2048);
  }
  __device__ void load(const TensorMap* map, uint32_t barrier, int token, int head, int sequence) const {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab)
      bulk_load(address + slab * kSlabBytes, map, barrier, slab * 64, token, head, sequence);
  }
};

// acc[64][B::kRows] = rows first_row.. of a . rows of b; `add`: += .
template <class T, class A, class B>
__device__ __forceinline__ void start_dots(float (&acc)[B::kRows / 2], A a, int first_row, B b, bool add = false) {
#pragma unroll
  for (int k = 0; k < A::kD / 16; ++k)
    warpgroup_product<B::kRows, T, Major::k, Major::k>(acc, a.by_rows(first_row, k), b.by_rows(0, k), add || k > 0);
}

// acc[64][B::kD] += weights[64][B::kRows] b, of part kPart of kParts of b's rows; the weights are fragments.
template <class T, int kPart = 0, int kParts = 1, class B>
__device__ __forceinline__ void start_weighted_sum(float (&acc)[B::kD / 2], const uint32_t (&weights)[B::kRows / 16][4],
                                                   B b, bool add) {
  constexpr int kDepths = B::kRows / 16 / kParts;
#pragma unroll
  for (int k = kPart * kDepths; k < (kPart + 1) * kDepths; ++k)
    warpgroup_product<B::kD, T, Major::mn>(acc, weights[k], b.by_columns(k), add || k > 0);
}

// Holds what `values` are made by above the wait for the products that run meanwhile, below which ptxas would move
// nearly all of it: a word that depends on all of them goes to shared memory, 128 bytes that nobody reads.
template <int kCount>
__device__ __forceinline__ void hold(const float (&values)[kCount], uint32_t scratch) {
  uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) all ^= __float_as_uint(values[i]);
  store_shared(scratch + lane() * 4, all);
}
constexpr int kScratchBytes = kWarpSize * 4;

// What a step overlaps within its warpgroup: nothing but what ptxas leaves so; the weights' exponentials and the
// products that gradients need besides; and, also, the first of the sums' products and what makes gradients.
enum class Overlap { none, weights, sums };

// Four elements of accumulators, of eight columns j, as they go into the fragments of a first operand.
template <class T, int kFragments>
__device__ __forceinline__ void pack_quad(uint32_t (&packed)[kFragments][4], int j, const float (&values)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    packed[j / 2][j % 2 * 2 + half] = pack_pair<T>(values[2 * half], values[2 * half + 1]);
}

template <int kCount>
__device__ __forceinline__ void clear(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) acc[i] = 0.0f;
}

// What the copy engine must know of q, k, v or grad_out: boxes of `rows` tokens and 64 elements of one head. Strides of
// dimensions of one element, and only those, may be anything.
inline MappedTensor mapped(const HeadTensor& t, int64_t sequences, int64_t heads, int64_t tokens, int64_t D, int rows) {
  const auto stride = [&](int64_t size, int64_t given) { return size == 1 ? ceil_div(D, 8) * 8 : given; };
  return {t.data,
          t.dtype,
          4,
          {D, tokens, heads, sequences},
          {1, stride(tokens, t.token_stride), stride(heads, t.head_stride), stride(sequences, t.sequence_stride)},
          {64, rows, 1, 1},
          Swizzle::bytes128};
}
inline int64_t mapped_sequences(const AttentionParams& p) { return p.first_q ? 1 : p.B; }

// A warp's 16 rows of accumulators [64][kD], times `factor`, rounded to T, by way of its rows of a tile that nobody
// else reads any more. Rows up to `rows` exist (it may be none), with D elements.
template <class T, class Tile>
__device__ void store_tile_rows(Tile tile, int first_row, const float (&acc)[Tile::kD / 2], const float (&factor)[2],
                                T* to, int64_t stride, int rows, int D) {
  __syncwarp();
#pragma unroll
  for (int k = 0; k < Tile::kD / 16; ++k) {
    uint32_t packed[4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      packed[r] = pack_pair<T>(acc[8 * k + 2 * r] * factor[r % 2], acc[8 * k + 2 * r + 1] * factor[r % 2]);
    stmatrix_x4(tile.chunk(first_row + lane() % 16, 2 * k + lane() / 16), packed);
  }
  __syncwarp();
  constexpr int kRowChunks = Tile::kD / kChunk, kRowsAStep = kWarpSize / kRowChunks;
  const int chunk = lane() % kRowChunks;
  if (chunk * kChunk >= D) return;
#pragma unroll
  for (int i = 0; i < 16 / kRowsAStep; ++i) {
    const int row = i * kRowsAStep + lane() / kRowChunks;
    if (row < rows) store(to + row * stride + chunk * kChunk, load_shared(tile.chunk(first_row + row, chunk)));
  }
}

// ---- two numbers a query row ----------------------------------------------------------------------------------------

// Of a query row; +inf as lse where it passes no gradient: its weights are then 2^-inf = 0. Each sequence's rows begin
// a slot of kSlotRows, so that a tile of them is one aligned copy; rows of a slot that do not exist pass no gradient.
struct QueryStatistics {
  float lse;  // in the log2 domain
  float delta;
};
constexpr int kSlotRows = 128, kSlotTurns = 4;  // turns: hopper_backward_joint.h
constexpr int kCounters = 4;                    // of work, behind all slots

// Slots of a head: packed sequences have those that token_tile() numbers.
__host__ __device__ inline int64_t slots_of_head(int64_t sequences, int64_t tokens, bool packed) {
  return tile_count(sequences, tokens, packed, kSlotRows);
}

__device__ inline const QueryStatistics* slots_of_workspace(const AttentionParams& p) {
  return reinterpret_cast<const QueryStatistics*>(p.workspace);
}
__device__ inline const QueryStatistics* slots_of(const AttentionParams& p, int64_t head, const Sequence& sequence) {
  const int64_t slots = slots_of_head(p.B, p.Tq, p.first_q != nullptr);
  const int64_t first = p.first_q ? sequence.first_q / kSlotRows + sequence.index
                                  : sequence.index * ((p.Tq + kSlotRows - 1) / kSlotRows);
  return slots_of_workspace(p) + (head * slots + first) * kSlotRows;
}

// The sequence of one of a head's slots, and its first token there.
__device__ inline TokenTile slot_place(const AttentionParams& p, int64_t slot) {
  if (p.first_q) return token_tile(slot, p.B, p.Tq, p.first_q, kSlotRows);
  const uint32_t slots = static_cast<uint32_t>((p.Tq + kSlotRows - 1) / kSlotRows), at = static_cast<uint32_t>(slot);
  return {at / slots, static_cast<int>(at % slots) * kSlotRows};
}

// Counters that the statistics' kernel sets to 0.
__device__ inline int* counters_of(const AttentionParams& p) {
  const int64_t rows = p.Hq * slots_of_head(p.B, p.Tq, p.first_q != nullptr) * kSlotRows;
  return reinterpret_cast<int*>(p.workspace + 2 * rows);
}

// What the mask does to each tile (mask_classes.h), where a mask is: behind the counters.
__host__ __device__ inline uint8_t* mask_classes_of(const AttentionParams& p) {
  const int64_t rows = p.Hq * slots_of_head(p.B, p.Tq, p.first_q != nullptr) * kSlotRows;
  return reinterpret_cast<uint8_t*>(p.workspace + 2 * rows + kCounters);
}

constexpr int kSlotThreads = 256;

// kLanes lanes a row, eight elements each: Dv <= 8 kLanes. `sums`: 8 kLanes floats a row, and behind them the turns, to
// be zeroed, or null; without `zeroes` the turns alone.
template <class T, int kLanes>
__global__ void __launch_bounds__(kSlotThreads) query_statistics_kernel(const AttentionBackwardParams p, float* sums,
                                                                        const bool zeroes) {
  // Blocks have a part of one slot each; numbers of blocks and slots fit 32 bits, whose division is no function call.
  constexpr uint32_t kBlocksOfSlot = kSlotRows * kLanes / kSlotThreads;
  const uint32_t slots = static_cast<uint32_t>(slots_of_head(p.B, p.Tq, p.first_q != nullptr));
  const uint32_t all_slots = blockIdx.x / kBlocksOfSlot, head = all_slots / slots, slot = all_slots - head * slots;
  const int row_of_slot = static_cast<int>((blockIdx.x % kBlocksOfSlot * kSlotThreads + threadIdx.x) / kLanes);
  const int64_t rows = int64_t{slots} * kSlotRows, index = int64_t{all_slots} * kSlotRows + row_of_slot;
  if (index < kCounters) counters_of(p)[index] = 0;
  const TokenTile place = slot_place(p, slot);
  const Sequence sequence = sequence_of(p, place.sequence);
  const int token = place.first + row_of_slot;
  if (sums) {
    int* const turns = reinterpret_cast<int*>(sums + p.Hq * rows * (8 * kLanes));
    if (index % (kSlotRows / kSlotTurns) == 0) turns[index / (kSlotRows / kSlotTurns)] = 0;
    if (index == 0) turns[p.Hq * slots * kSlotTurns] = 0;
#pragma unroll
    for (int half = 0; half < 2 && zeroes; ++half)
      store_streaming(sums + index * (8 * kLanes) + (half * kLanes + threadIdx.x % kLanes) * 4, Bytes16{{0, 0, 0, 0}});
  }
  const bool exists = token < sequence.Tq;
  float delta = 0.0f;
  if (exists) {
    const int first = static_cast<int>(threadIdx.x) % kLanes * 8, left = static_cast<int>(p.Dv) - first;
    const int count = left < 0 ? 0 : left < 8 ? left : 8;
    const int64_t row = sequence.first_q + token;
    float a[8], b[8];
    load_columns(a, row_of<const T>(p.grad_out, sequence.index, head, row) + first, count);
    load_columns(b, row_of<const T>(p.out, sequence.index, head, row) + first, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) delta = fmaf(a[i], b[i], delta);
  }
  delta = group_sum<kLanes>(delta);
  if (threadIdx.x % kLanes != 0) return;
  const float lse = exists ? *row_of<const float>(p.lse, sequence.index, head, sequence.first_q + token) : -infinity();
  const bool absent = lse < kNoGradient;
  reinterpret_cast<QueryStatistics*>(p.workspace)[index] = {absent ? infinity() : lse * kLog2E, absent ? 0.0f : delta};
}

template <class T, int kLanes>
void launch_query_statistics(const AttentionBackwardParams& p, const Stream& stream, float* sums = nullptr,
                             bool zeroes = true) {
  const int64_t rows = slots_of_head(p.B, p.Tq, p.first_q != nullptr) * kSlotRows * p.Hq;
  launch(stream, {static_cast<unsigned>(rows * kLanes / kSlotThreads)}, kSlotThreads, 0,
         query_statistics_kernel<T, kLanes>, p, sums, zeroes);
}

}  // namespace llmfast::cuda
