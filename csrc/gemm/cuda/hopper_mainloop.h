// The 16-bit product of tiles of C on compute capability 9.0: one warp fills a ring of shared-memory stages by bulk
// copies, two warpgroups multiply out of it.
//
// A stage holds 64 of depth of both operands as the copies leave them, swizzled by 128 bytes: k-major as rows of 128
// bytes, one box an operand; mn-major as slabs of 64 neighbours in m or n, 64 rows (depths) of 128 bytes each, one box
// a slab. Beyond the operands' edges there are zeros.
#pragma once
#include "core/tensor_map.h"
#include "gemm/cuda/hopper_schedule.h"
#include "gemm/cuda/operand.h"
#include "ptx/barrier.h"
#include "ptx/bulk_copy.h"
#include "ptx/mbarrier.h"
#include "ptx/warpgroup.h"

namespace llmfast::cuda {

// Both consumer warpgroups share a tile, half of its rows each, or (ping-pong) each takes every other tile of the
// block: one's epilogue then runs under the other's products.
template <int kM_, int kN_, int kStages_, bool kPingPong_>
struct HopperTile {
  static constexpr int kM = kM_, kN = kN_, kStages = kStages_;
  static constexpr bool kPingPong = kPingPong_;
  static constexpr int kRows = kPingPong ? kM : kM / 2;  // of a warpgroup
  static constexpr int kFragments = kRows / 64;          // products of 64 rows
  static constexpr int kBytesA = kM * kHopperDepth * 2, kStageBytes = kBytesA + kN * kHopperDepth * 2;
  static constexpr int kThreads = 3 * 128;
  static_assert(kRows % 64 == 0 && (kN == 32 || kN % 64 == 0) && kN <= 256);
  static_assert(kFragments * kN <= 256, "accumulators fit registers");
};

template <class Tile>
using HopperAccumulators = float[Tile::kFragments][Tile::kN / 2];

constexpr int kSlabBytes = 64 * 128;  // 64 rows of 128 bytes

// The map of an operand [mn, k] whose tiles have `tile_mn` rows. A single row may have any stride.
inline MappedTensor mapped_operand(const Operand& operand, DType dtype, Major major, int64_t mn, int64_t k,
                                   int tile_mn) {
  const bool by_k = major == Major::k;
  const int64_t along = by_k ? k : mn, across = by_k ? mn : k;
  const int64_t unit = by_k ? operand.stride_k : operand.stride_mn;
  const int64_t stride = by_k ? operand.stride_mn : operand.stride_k;
  return {operand.data,
          dtype,
          2,
          {along, across},
          {along == 1 ? 1 : unit, across == 1 ? ceil_div(along, kChunk) * kChunk : stride},
          {64, by_k ? tile_mn : kHopperDepth},
          Swizzle::bytes128};
}

// The ring: stages from `base` on, a multiple of 1024; each has a barrier for its bytes and one for its readers' leave.
template <class Tile>
struct Ring {
  static constexpr int kBytes = Tile::kStages * Tile::kStageBytes, kBarrierBytes = Tile::kStages * 16;
  uint32_t base, barriers;

  __device__ uint32_t stage(int index) const { return base + index * Tile::kStageBytes; }
  __device__ uint32_t full(int index) const { return barriers + index * 8; }
  __device__ uint32_t empty(int index) const { return barriers + (Tile::kStages + index) * 8; }

  // By one thread. The four warps of each reading warpgroup leave one by one.
  __device__ void init() const {
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(full(i), 1);
      mbarrier_init(empty(i), Tile::kPingPong ? 4 : 8);
    }
  }
};

template <Major kMajor, int kMn>
__device__ __forceinline__ void load_operand(uint32_t to, const TensorMap* map, uint32_t barrier, int mn, int k) {
  if constexpr (kMajor == Major::k) {
    bulk_load(to, map, barrier, k, mn);
  } else {
    static_assert(kMn % 64 == 0, "whole slabs");
#pragma unroll
    for (int slab = 0; slab < kMn / 64; ++slab) bulk_load(to + slab * kSlabBytes, map, barrier, mn + slab * 64, k);
  }
}

// The operands of a product. Paired: a tile's columns are kN / 2 of b and the same of second_b. Otherwise, from step
// `first_steps` of the depth on, second_a and second_b go on where a and b end.
struct OperandMaps {
  TensorMap a, b, second_a, second_b;
  int first_steps;
};

// One thread: the stages of all of the block's work, in order, as they become free.
template <class Tile, Major kA, Major kB, bool kPaired>
__device__ void fill_ring(const Ring<Tile>& ring, const OperandMaps& maps, const Schedule& schedule) {
  constexpr int kColumns = kPaired ? Tile::kN / 2 : Tile::kN;
  RingPlace<Tile::kStages> place;
  for (int item = blockIdx.x; item < schedule.items(); item += gridDim.x) {
    const Work work = schedule.at(item);
    for (int step = 0; step < work.steps; ++step, place.advance()) {
      const uint32_t to = ring.stage(place.stage), full = ring.full(place.stage);
      const int of_all = work.first_k / kHopperDepth + step;
      const bool second = !kPaired && of_all >= maps.first_steps;
      const int k = (second ? of_all - maps.first_steps : of_all) * kHopperDepth;
      mbarrier_wait(ring.empty(place.stage), place.parity ^ 1);
      mbarrier_arrive_expect(full, Tile::kStageBytes);
      load_operand<kA, Tile::kM>(to, second ? &maps.second_a : &maps.a, full, work.tile_m * Tile::kM, k);
      load_operand<kB, kColumns>(to + Tile::kBytesA, second ? &maps.second_b : &maps.b, full, work.tile_n * kColumns,
                                 k);
      if constexpr (kPaired)
        load_operand<kB, kColumns>(to + Tile::kBytesA + kColumns * kHopperDepth * 2, &maps.second_b, full,
                                   work.tile_n * kColumns, k);
    }
  }
}

// A warpgroup: acc = the products of `steps` stages from `place` on, its rows starting at `first_row` of the tile. The
// last step is still under way when this returns: finish_products() waits for it.
template <class T, class Tile, Major kA, Major kB>
__device__ __forceinline__ void start_products(const Ring<Tile>& ring, RingPlace<Tile::kStages>& place, int steps,
                                               int first_row, HopperAccumulators<Tile>& acc) {
  constexpr int kStepA = kA == Major::k ? 32 : 2048, kStepB = kB == Major::k ? 32 : 2048;  // bytes for 16 of depth
  const uint64_t a = matrix_descriptor(ring.base + first_row * 128, 1024, kSlabBytes);
  const uint64_t b = matrix_descriptor(ring.base + Tile::kBytesA, 1024, kSlabBytes);
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(ring.full(place.stage), place.parity);
    const int stage = place.stage * Tile::kStageBytes;
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < kHopperDepth / 16; ++k)
#pragma unroll
      for (int i = 0; i < Tile::kFragments; ++i)
        warpgroup_product<Tile::kN, T, kA, kB>(acc[i], advanced(a, stage + i * kSlabBytes + k * kStepA),
                                               advanced(b, stage + k * kStepB), step > 0 || k > 0);
    warpgroup_commit();
    warpgroup_wait<1>();  // the step before has been read
    if (step > 0 && lane() == 0) mbarrier_arrive(ring.empty(before));
    before = place.stage;
    place.advance();
  }
}

template <class Tile>
__device__ __forceinline__ void finish_products(const Ring<Tile>& ring, const RingPlace<Tile::kStages>& place,
                                                HopperAccumulators<Tile>& acc) {
  warpgroup_wait<0>();
#pragma unroll
  for (int i = 0; i < Tile::kFragments; ++i) pin_registers(acc[i]);
  if (lane() == 0) mbarrier_arrive(ring.empty(place.stage == 0 ? Tile::kStages - 1 : place.stage - 1));
}

// Past `steps` stages that the other warpgroup reads.
template <int kStages>
__device__ __forceinline__ void skip(RingPlace<kStages>& place, int steps) {
  const int stage = place.stage + steps;
  place.parity ^= stage / kStages & 1;
  place.stage = stage % kStages;
}

}  // namespace llmfast::cuda
