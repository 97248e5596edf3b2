// C[M,N] = A[M,K] B[N,K]^T with an epilogue, bf16 or fp16 with float32 sums, on compute capability 9.0: gemm.h's
// product with bulk copies (TMA) and warpgroup products (wgmma), for operands that the copy engine can address.
//
// Persistent blocks of three warpgroups, one a multiprocessor, take tiles in a fixed order (hopper_schedule.h). One
// thread of the first fills the ring of stages, running ahead into the next tile; the other two multiply
// (hopper_mainloop.h). Finished accumulators go to the epilogue out of registers: to one of boxes or of whole rows
// (hopper_boxes.h) as they are; for others (epilogue.h) the four lanes that hold a row's pairs of columns exchange them
// so that each has eight neighbouring columns. With few tiles and a great depth blocks share a tile's depth and a
// second kernel, launched early, adds the parts in order, as in gemm.h. What an epilogue reads from memory comes ahead
// of it: a tile's bias under its products, boxes of other matrices by two more threads of the first warpgroup.
//
// Tiles are 128 x 256, their rows shared by both warpgroups, for plain epilogues; 128 x 128 in turns (ping-pong) for
// those with much arithmetic, which then runs under the other warpgroup's products; 64 x 32 for up to 64 rows of some
// (MayBeNarrow): the reading of B is all, and one warpgroup keeps up with it. Up to 232,448 bytes shared memory.
// Registers (nvcc 13.0.88, highest in the SASS of 232): store 185, hidden 220, slopes 229; no spills.
//
// Measured on an H100 80GB HBM3, 2026-11-26, benchmarks/native/hopper_gemm.cu, bf16, TFLOP/s (of cuBLAS's speed in the
// same run): 8192x8192x8192 787 (1.01), 4096x4096x4096 757 (1.05), 65536x3072x768 698 (1.01), the same k,mn 696 (1.03).
#pragma once
#include "gemm/cuda/gemm.h"
#include "gemm/cuda/hopper_boxes.h"
#include "gemm/cuda/hopper_mainloop.h"

namespace llmfast::cuda {

using HopperWideTile = HopperTile<128, 256, 4, false>;
using HopperLargeTile = HopperTile<128, 128, 6, true>;
using HopperMiddleTile = HopperTile<128, 192, 5, false>;  // of products cut in parts
using HopperReadTile = HopperTile<128, 128, 4, true>;     // leaves room for what an epilogue reads
using HopperNarrowTile = HopperTile<64, 32, 16, true>;    // of up to 64 rows: many blocks, 192 KB under way in each

// Lane t of four holds pairs pair[j], columns 8 j + 2 t and the next; then it holds columns 8 t .. 8 t + 7: pair[s]
// came from lane s. A 4x4 transposition in two exchanges.
__device__ __forceinline__ void gather_columns(float (&x)[8]) {
  const bool odd = lane() & 1, high = lane() & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float &low = x[2 * j + e], &up = x[2 * j + 2 + e];
      const float got = __shfl_xor_sync(kAllLanes, odd ? low : up, 1);
      if (odd) low = got;
      else up = got;
    }
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float &low = x[2 * j + e], &up = x[2 * j + 4 + e];
      const float got = __shfl_xor_sync(kAllLanes, high ? low : up, 2);
      if (high) low = got;
      else up = got;
    }
}

// A warpgroup's accumulators, whose first row and column are (m, n), to the epilogue.
template <class Tile, class Epilogue>
__device__ __forceinline__ void finish_rows(const HopperAccumulators<Tile>& acc, GemmShape shape, int64_t m, int64_t n,
                                            const Epilogue& epilogue) {
  const int64_t row = m + warp() % 4 * 16 + lane() / 4, col = n + lane() % 4 * 8;
#pragma unroll
  for (int i = 0; i < Tile::kFragments; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kN / 32; ++j) {
      const int64_t at_n = col + j * 32, left = shape.N - at_n;
      const int columns = left <= 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = acc[i][j * 16 + e / 2 * 4 + half * 2 + e % 2];
        gather_columns(x);
        const int64_t at_m = row + i * 64 + half * 8;
        epilogue.template columns<4>(x, at_m, at_n, at_m < shape.M ? columns : 0);
      }
    }
}

template <class Epilogue>
using SlabsFor = Slabs<SlabsOf<Epilogue>::kCount, ReadBoxes<Epilogue>::kCount>;

// The same to an epilogue of boxes.
template <class Tile, class Epilogue>
__device__ __forceinline__ void finish_boxes(HopperAccumulators<Tile>& acc, int m, int n, const Epilogue& epilogue,
                                             SlabsFor<Epilogue>& slabs) {
#pragma unroll
  for (int i = 0; i < Tile::kFragments; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kN / 64; ++j) {
      float x[32];
#pragma unroll
      for (int e = 0; e < 32; ++e) x[e] = acc[i][j * 32 + e];
      epilogue.box(x, m + i * 64, n + j * 64, slabs);
    }
}
template <class Tile, class Epilogue>
__device__ __forceinline__ void finish_paired_boxes(HopperAccumulators<Tile>& acc, int m, int n,
                                                    const Epilogue& epilogue,
                                                    SlabsFor<Epilogue>& slabs) {
#pragma unroll
  for (int i = 0; i < Tile::kFragments; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kN / 128; ++j) {
      float x[32], y[32];
#pragma unroll
      for (int e = 0; e < 32; ++e) x[e] = acc[i][j * 32 + e], y[e] = acc[i][Tile::kN / 4 + j * 32 + e];
      epilogue.box(x, y, m + i * 64, n + j * 64, slabs);
    }
}

// One thread: the boxes that an epilogue of warpgroup `which` will read, in its order, as their places become free.
template <class Tile, class Epilogue, class Memory>
__device__ void fill_read(const Memory& memory, const Epilogue& epilogue, const Schedule& schedule, int which) {
  constexpr int kRead = ReadBoxes<Epilogue>::kCount;
  static_assert(Tile::kPingPong, "a warpgroup reads whole tiles");
  RingPlace<Memory::kPlaces> place;
  const int grid = static_cast<int>(gridDim.x);
  for (int item = blockIdx.x + which * grid; item < schedule.items(); item += 2 * grid) {
    const Work work = schedule.at(item);
#pragma unroll 1
    for (int box = 0; box < Tile::kM / 64 * (Tile::kN / 64); ++box, place.advance()) {
      const int m = work.tile_m * Tile::kM + box / (Tile::kN / 64) * 64;
      const int n = work.tile_n * Tile::kN + box % (Tile::kN / 64) * 64;
      mbarrier_wait(memory.empty(place.stage), place.parity ^ 1);
      mbarrier_arrive_expect(memory.full(place.stage), kRead * kSlabBytes);
#pragma unroll
      for (int i = 0; i < kRead; ++i)
        bulk_load(memory.read(place.stage, i), epilogue.read(i), memory.full(place.stage), n, m);
    }
  }
}

template <class Tile, class Epilogue>
struct HopperMemory {
  using OfEpilogue = EpilogueMemory<SlabsOf<Epilogue>::kCount, ReadBoxes<Epilogue>::kCount>;
  static constexpr size_t kBytes =
      1024 + Ring<Tile>::kBytes + 2 * OfEpilogue::kSlabsBytes + Ring<Tile>::kBarrierBytes + 2 * OfEpilogue::kOtherBytes;
  static_assert(kBytes <= 232448);
};

template <class T, class Tile, Major kA, Major kB, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    hopper_gemm_kernel(const __grid_constant__ OperandMaps maps, const GemmShape shape, const Schedule schedule,
                       const __grid_constant__ Epilogue epilogue) {
  constexpr int kSlabs = SlabsOf<Epilogue>::kCount, kRead = ReadBoxes<Epilogue>::kCount;
  constexpr bool kPaired = IsPaired<Epilogue>::kHolds;
  constexpr int kColumns = kPaired ? Tile::kN / 2 : Tile::kN;
  using Memory = typename HopperMemory<Tile, Epilogue>::OfEpilogue;
  if constexpr (std::is_same_v<Epilogue, PartEpilogue>) let_next_kernel_start();
  const uint32_t base = (shared_address(dynamic_shared<char>()) + 1023) / 1024 * 1024;
  const uint32_t after_ring = base + Ring<Tile>::kBytes, barriers = after_ring + 2 * Memory::kSlabsBytes;
  const Ring<Tile> ring{base, barriers};
  const auto memory_of = [&](int which) {
    return Memory{after_ring + which * Memory::kSlabsBytes,
                  barriers + Ring<Tile>::kBarrierBytes + which * Memory::kOtherBytes};
  };
  if (thread() == 0) {
    prefetch_map(&maps.a);
    prefetch_map(&maps.b);
    ring.init();
    memory_of(0).init();
    memory_of(1).init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(kAllLanes, warp() / 4, 0);  // the same for the compiler, too
  if (warpgroup == 0) {
    registers_shrink<40>();
    if (thread() == 0) fill_ring<Tile, kA, kB, kPaired>(ring, maps, schedule);
    if constexpr (kRead > 0)
      if (thread() == 32 || thread() == 64) {
        const int reader = static_cast<int>(thread()) / 32 - 1;
        fill_read<Tile>(memory_of(reader), epilogue, schedule, reader);
      }
    return;
  }
  registers_grow<232>();
  const int which = warpgroup - 1;
  SlabsFor<Epilogue> slabs(memory_of(which), 3 + which);
  using Bias = typename SlabsFor<Epilogue>::Bias;
  const auto own_bias = [&](const Work& work) -> Bias {
    if constexpr (HasBias<Epilogue>::kHolds)
      if (epilogue.bias) return slabs.own_bias(epilogue.bias, work.tile_n * kColumns, kColumns, epilogue.N);
    return {0, 0};
  };
  const auto hold_bias = [&](Bias pair, const Work& work) {
    if constexpr (HasBias<Epilogue>::kHolds)
      if (epilogue.bias) slabs.hold_bias(pair, work.tile_n * kColumns);
  };
  const auto finish = [&](HopperAccumulators<Tile>& acc, const Work& work, int first_row) {
    const int m = work.tile_m * Tile::kM + first_row, n = work.tile_n * kColumns;
    if constexpr (IsOfRows<Epilogue>::kHolds) {
#pragma unroll
      for (int i = 0; i < Tile::kFragments; ++i) epilogue.template rows<Tile::kN>(acc[i], m + i * 64, n);
    } else if constexpr (kPaired) {
      finish_paired_boxes<Tile>(acc, m, n, epilogue, slabs);
    } else if constexpr (kSlabs > 0) {
      finish_boxes<Tile>(acc, m, n, epilogue, slabs);
    } else if constexpr (std::is_same_v<Epilogue, PartEpilogue>) {
      const int64_t N = shape.N;
      const FloatRows rows{epilogue.parts + work.part * shape.M * N, N, nullptr, 0, shape.M, N};
#pragma unroll
      for (int i = 0; i < Tile::kFragments; ++i) rows.rows<Tile::kN>(acc[i], m + i * 64, n);
    } else {
      finish_rows<Tile>(acc, shape, m, n, epilogue);
    }
  };
  HopperAccumulators<Tile> acc;
  RingPlace<Tile::kStages> place;
  const int items = schedule.items(), grid = static_cast<int>(gridDim.x);
  if constexpr (!Tile::kPingPong) {
    Work work = schedule.at(blockIdx.x);
    for (int item = blockIdx.x; item < items; item += grid) {
      const Bias bias = own_bias(work);
      start_products<T, Tile, kA, kB>(ring, place, work.steps, which * Tile::kRows, acc);
      const Work next = schedule.at(item + grid < items ? item + grid : item);  // its divisions run under the products
      hold_bias(bias, work);
      finish_products<Tile>(ring, place, acc);
      finish(acc, work, which * Tile::kRows);
      work = next;
    }
  } else {
    // Barrier 1 + w: warpgroup w may start its products. Whoever has issued its last ones lets the other start, if that
    // has a tile left.
    const int mine = 1 + which, others = 2 - which;
    if (which == 1) barrier_arrive(others, 256);
    for (int item = blockIdx.x + which * grid; item < items; item += 2 * grid) {
      const Work work = schedule.at(item);
      if (which == 1) skip(place, schedule.at(item - grid).steps);
      const Bias bias = own_bias(work);
      barrier_sync(mine, 256);
      start_products<T, Tile, kA, kB>(ring, place, work.steps, 0, acc);
      if (item + grid < items) barrier_arrive(others, 256);
      hold_bias(bias, work);
      finish_products<Tile>(ring, place, acc);
      if (which == 0 && item + grid < items) skip(place, schedule.at(item + grid).steps);
      finish(acc, work, 0);
    }
  }
  if constexpr (kSlabs > 0) slabs.finish();
}

// More operands of the same shapes: b alone is the other half of a paired epilogue's B; a and b together add their
// product to the first, as if the depth went on with them.
struct MoreOperands {
  const Operand *a = nullptr, *b = nullptr;

  int64_t depth(int64_t K) const { return a ? 2 * ceil_div(K, kHopperDepth) * kHopperDepth : K; }
};

// `parts` are of the whole depth.
template <class T, class Tile, Major kA, Major kB, class Epilogue>
void launch_hopper_gemm(const Operand& a, const Operand& b, GemmShape shape, Parts parts, const Epilogue& epilogue,
                        const Stream& stream, int raster = Tile::kN == 256 ? 16 : 12, const MoreOperands& more = {}) {
  constexpr int kColumns = IsPaired<Epilogue>::kHolds ? Tile::kN / 2 : Tile::kN;
  const int64_t K = more.depth(shape.K);
  const Schedule schedule({shape.M, shape.N, K}, parts, Tile::kM, kColumns, raster);
  const int multiprocessors = device_info(stream.device).multiprocessors;
  const auto blocks = static_cast<unsigned>(schedule.items() < multiprocessors ? schedule.items() : multiprocessors);
  const auto map_a = [&](const Operand& operand) {
    return make_tensor_map(mapped_operand(operand, half_dtype<T>(), kA, shape.M, shape.K, Tile::kM));
  };
  const auto map_b = [&](const Operand& operand) {
    return make_tensor_map(mapped_operand(operand, half_dtype<T>(), kB, shape.N, shape.K, kColumns));
  };
  OperandMaps maps{map_a(a), map_b(b), {}, {}, schedule.steps};
  if (more.b) maps.second_b = map_b(*more.b);
  if (more.a) maps.second_a = map_a(*more.a), maps.first_steps = static_cast<int>(ceil_div(shape.K, kHopperDepth));
  launch(stream, {blocks}, Tile::kThreads, HopperMemory<Tile, Epilogue>::kBytes,
         hopper_gemm_kernel<T, Tile, kA, kB, Epilogue>, maps, shape, schedule, epilogue);
}

template <class T, Major kA, Major kB, class Epilogue>
void launch_hopper_gemm(const Operand& a, const Operand& b, GemmShape shape, HopperTileSize tile, Parts parts,
                        const Epilogue& epilogue, const Stream& stream, const MoreOperands& more = {}) {
  if constexpr (ReadBoxes<Epilogue>::kCount > 0) {
    launch_hopper_gemm<T, HopperReadTile, kA, kB>(a, b, shape, parts, epilogue, stream, 12, more);
  } else {
    if constexpr (std::is_same_v<Epilogue, PartEpilogue>)
      if (tile == HopperTileSize::middle)
        return launch_hopper_gemm<T, HopperMiddleTile, kA, kB>(a, b, shape, parts, epilogue, stream, 16, more);
    if constexpr (!WantsPingPong<Epilogue>::kHolds)
      if (tile == HopperTileSize::wide)
        return launch_hopper_gemm<T, HopperWideTile, kA, kB>(a, b, shape, parts, epilogue, stream, 16, more);
    launch_hopper_gemm<T, HopperLargeTile, kA, kB>(a, b, shape, parts, epilogue, stream, 12, more);
  }
}

// As PortableProduct; every operand satisfies fits() and K is positive. `workspace`: hopper_parts_workspace(shape)
// floats, of the whole depth with `more`, or null: the depth stays whole.
struct HopperProduct {
  static bool fits(const Operand& operand, Major major, int64_t mn, int64_t k) {
    return can_map(mapped_operand(operand, DType::bf16, major, mn, k, 64));
  }
  // Of epilogues of rows.
  static constexpr int64_t kLeastColumnsTogether = HopperLargeTile::kN;
  template <class T>
  static int64_t columns_together(GemmShape shape) {
    return hopper_plan(shape, false).tile == HopperTileSize::wide ? HopperWideTile::kN : HopperLargeTile::kN;
  }

  template <class T, Major kA, Major kB, class Epilogue>
  static void run(const Operand& a, const Operand& b, GemmShape shape, const Epilogue& epilogue, float* workspace,
                  const Stream& stream, const MoreOperands& more = {}) {
    if (shape.M == 0 || shape.N == 0) return;
    constexpr bool kMayBeNarrow = kA == Major::k && kB == Major::k && MayBeNarrow<Epilogue>::kHolds;
    const int64_t K = more.depth(shape.K);
    const HopperPlan plan = hopper_plan({shape.M, shape.N, K}, workspace != nullptr, kMayBeNarrow);
    if constexpr (kMayBeNarrow)  // boxes are wider
      if (plan.tile == HopperTileSize::narrow)
        return launch_hopper_gemm<T, HopperNarrowTile, kA, kB>(a, b, shape, {1, K}, epilogue, stream, 12, more);
    if (plan.parts == 1)
      return OnHopper<Epilogue>::visit(epilogue, shape, [&](const auto& own) {
        launch_hopper_gemm<T, kA, kB>(a, b, shape, plan.tile, {1, K}, own, stream, more);
      });
    launch_hopper_gemm<T, kA, kB>(a, b, shape, plan.tile, {plan.parts, part_depth(K, plan.parts)},
                                  PartEpilogue{workspace, shape.M, shape.N, 0}, stream, more);
    add_parts<HopperProduct>(workspace, shape, plan.parts, epilogue, stream);
  }

  // Both products of a paired epilogue, {M, N, K} each.
  template <class T, Major kA, Major kB, class Epilogue>
  static void run_paired(const Operand& a, const Operand& b, const Operand& second_b, GemmShape shape,
                         const Epilogue& epilogue, const Stream& stream) {
    if (shape.M == 0 || shape.N == 0) return;
    const HopperPlan plan = hopper_plan({shape.M, 2 * shape.N, shape.K}, false);
    launch_hopper_gemm<T, kA, kB>(a, b, shape, plan.tile, {1, shape.K}, epilogue, stream, {nullptr, &second_b});
  }
};

}  // namespace llmfast::cuda
