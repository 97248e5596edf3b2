// C[M,N] = A[M,K] B[N,K]^T with an epilogue, float32 sums: the product that linear, ffn and cross-entropy share.
//
// 16-bit operands: one block computes one tile (mainloop.h), 128x256 or, where that would leave multiprocessors idle,
// 128x128 or 64x64; with few tiles and a great depth, blocks share a tile's depth and a second kernel, launched early,
// adds the parts in order. float32: multiply-adds (fma_mainloop.h). The finished tile goes, 16 rows of a warp at a
// time, through shared memory to the epilogue, which sees eight neighbouring columns of a row and so reads and writes
// global memory 16 bytes a lane. Nothing is added by atomics: results depend on the shape alone.
//
// Registers (nvcc 13.0.88, sm_80, -Xptxas -v): 16-bit 128x256 tiles 254 or 255, 128x128 tiles 122 to 128, 64x64 tiles
// 119 to 128, all without a spill and at the limit of their launch bounds: one, two and four blocks a multiprocessor.
// The main loop of 128x128 is 32 HMMA, 12 LDSM and 4 LDGSTS a warp and 32 of depth.
#pragma once
#include <type_traits>

#include "core/cuda_launch.h"
#include "gemm/cuda/epilogue.h"
#include "gemm/cuda/fma_mainloop.h"
#include "gemm/cuda/mainloop.h"
#include "gemm/cuda/schedule.h"
#include "ptx/grid.h"

namespace llmfast::cuda {

template <class Tile, class Epilogue>
__device__ void finish_tile(const Accumulators<Tile>& acc, GemmShape shape, int64_t first_m, int64_t first_n,
                            float* shared, const Epilogue& epilogue) {
  constexpr int kRow = Tile::kWarpN + 8;  // floats: the four rows of a store's phase fall into different banks
  constexpr int kLanes = Tile::kWarpN / 8, kRowsAPass = 32 / kLanes;
  float* slab = shared + warp() * 16 * kRow;
  const int row = lane() / kLanes, col = lane() % kLanes * 8;
  const int64_t m = first_m + warp() / Tile::kWarpsN * Tile::kWarpM + row;
  const int64_t n = first_n + warp() % Tile::kWarpsN * Tile::kWarpN + col;
  const int columns = n >= shape.N ? 0 : shape.N - n < 8 ? static_cast<int>(shape.N - n) : 8;
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store(slab + accumulator_row(lane(), 2 * half) * kRow + j * 8 + accumulator_col(lane(), 0),
              make_float2(acc.at[i][j][2 * half], acc.at[i][j][2 * half + 1]));
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < 16 / kRowsAPass; ++pass) {
      float x[8];
      load_eight(x, slab + (row + pass * kRowsAPass) * kRow + col);
      const int64_t at = m + i * 16 + pass * kRowsAPass;
      epilogue.template columns<kLanes>(x, at, n, at < shape.M ? columns : 0);
    }
  }
}

template <class T, class Tile, Major kMajorA, Major kMajorB, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    gemm_kernel(const Operand a, const Operand b, const GemmShape shape, const Parts parts, Epilogue epilogue) {
  if constexpr (std::is_same_v<Epilogue, PartEpilogue>) let_next_kernel_start();
  const int64_t tiles_m = ceil_div(shape.M, Tile::kM), tiles_n = ceil_div(shape.N, Tile::kN);
  const TileIndex tile = tile_of(blockIdx.x, tiles_m, tiles_n);
  const int64_t first_k = blockIdx.y * parts.depth;
  const int64_t end_k = first_k + parts.depth < shape.K ? first_k + parts.depth : shape.K;
  char* shared = dynamic_shared<char>();
  Accumulators<Tile> acc;
  multiply_tile<T, Tile, kMajorA, kMajorB>(a, b, shape.M, shape.N, tile.m * Tile::kM, tile.n * Tile::kN, first_k, end_k,
                                           shared_address(shared), acc);
  if constexpr (std::is_same_v<Epilogue, PartEpilogue>) epilogue.part = blockIdx.y;
  finish_tile(acc, shape, tile.m * Tile::kM, tile.n * Tile::kN, dynamic_shared<float>(), epilogue);
}

template <class Epilogue>
__global__ void __launch_bounds__(FmaTile::kThreads, 2)
    gemm_fma_kernel(const Operand a, const Operand b, const GemmShape shape, const Parts parts, Epilogue epilogue) {
  const int64_t tiles_m = ceil_div(shape.M, FmaTile::kM), tiles_n = ceil_div(shape.N, FmaTile::kN);
  const TileIndex tile = tile_of(blockIdx.x, tiles_m, tiles_n);
  const int64_t first_m = tile.m * FmaTile::kM, first_n = tile.n * FmaTile::kN, first_k = blockIdx.y * parts.depth;
  const int64_t end_k = first_k + parts.depth < shape.K ? first_k + parts.depth : shape.K;
  float acc[4][8];
  multiply_fma_tile(a, b, shape.M, shape.N, first_m, first_n, first_k, end_k, dynamic_shared<float>(), acc);
  if constexpr (std::is_same_v<Epilogue, PartEpilogue>) epilogue.part = blockIdx.y;
  const int64_t m = first_m + fma_row(), n = first_n + fma_col();
  const int columns = n >= shape.N ? 0 : shape.N - n < 8 ? static_cast<int>(shape.N - n) : 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) epilogue.template columns<8>(acc[i], m + i, n, m + i < shape.M ? columns : 0);
}

// One thread adds the parts of eight columns of a row, in ascending order, and hands them to the epilogue. `Product`
// keeps apart the kernels of files that are compiled for different targets: the linker would take one for the other.
constexpr int kAddThreads = 256;
template <class Product, class Epilogue>
__global__ void __launch_bounds__(kAddThreads)
    add_parts_kernel(const float* sums, int64_t M, int64_t N, int64_t parts, Epilogue epilogue) {
  const int64_t groups = ceil_div(N, 8), index = blockIdx.x * int64_t{kAddThreads} + thread();
  if (index >= M * groups) return;
  const int64_t m = index / groups, n = index % groups * 8;
  const int count = N - n < 8 ? static_cast<int>(N - n) : 8;
  float total[8], part[8];
  wait_for_previous_kernel();
  load_columns(total, sums + m * N + n, count);
  if (N % 8 == 0 && reinterpret_cast<uintptr_t>(sums) % 16 == 0) {  // without branches: loads of several parts at once
#pragma unroll 4
    for (int64_t p = 1; p < parts; ++p) {
      const float* const from = sums + (p * M + m) * N + n;
      const float4 low = load<float4>(from), high = load<float4>(from + 4);
      total[0] += low.x, total[1] += low.y, total[2] += low.z, total[3] += low.w;
      total[4] += high.x, total[5] += high.y, total[6] += high.z, total[7] += high.w;
    }
  } else {
    for (int64_t p = 1; p < parts; ++p) {
      load_columns(part, sums + (p * M + m) * N + n, count);
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] += part[i];
    }
  }
  epilogue.template columns<1>(total, m, n, count);
}

template <class Product, class Epilogue>
void add_parts(const float* sums, GemmShape shape, int64_t parts, const Epilogue& epilogue, const Stream& stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(shape.M * ceil_div(shape.N, 8), kAddThreads));
  launch_early(stream, {blocks}, kAddThreads, 0, add_parts_kernel<Product, Epilogue>, sums, shape.M, shape.N, parts,
               epilogue);
}

template <class T, class Tile, Major kMajorA, Major kMajorB, class Epilogue>
void launch_gemm(const Operand& a, const Operand& b, GemmShape shape, Parts parts, const Epilogue& epilogue,
                 const Stream& stream) {
  constexpr size_t kRing = size_t{Tile::kStages} * (Tile::kM + Tile::kN) * kDepth * 2;
  static_assert(kRing >= size_t{Tile::kThreads / 32} * 16 * (Tile::kWarpN + 8) * 4);
  const auto tiles = static_cast<unsigned>(ceil_div(shape.M, Tile::kM) * ceil_div(shape.N, Tile::kN));
  launch(stream, {tiles, static_cast<unsigned>(parts.count)}, Tile::kThreads, kRing,
         gemm_kernel<T, Tile, kMajorA, kMajorB, Epilogue>, a, b, shape, parts, epilogue);
}

template <class T, Major kMajorA, Major kMajorB, class Epilogue>
void launch_gemm(Operand a, Operand b, GemmShape shape, TileSize tile, Parts parts, const Epilogue& epilogue,
                 const Stream& stream) {
  if constexpr (std::is_same_v<T, float>) {
    const auto tiles = static_cast<unsigned>(ceil_div(shape.M, FmaTile::kM) * ceil_div(shape.N, FmaTile::kN));
    launch(stream, {tiles, static_cast<unsigned>(parts.count)}, FmaTile::kThreads, size_t{FmaTile::kBytes},
           gemm_fma_kernel<Epilogue>, a, b, shape, parts, epilogue);
  } else {
    a.vector = a.fits_chunks(kMajorA);
    b.vector = b.fits_chunks(kMajorB);
    if constexpr (!std::is_same_v<Epilogue, PartEpilogue>)  // wide tiles are never cut
      if (tile == TileSize::wide)
        return launch_gemm<T, WideTile, kMajorA, kMajorB>(a, b, shape, parts, epilogue, stream);
    if (tile == TileSize::large) launch_gemm<T, LargeTile, kMajorA, kMajorB>(a, b, shape, parts, epilogue, stream);
    else launch_gemm<T, SmallTile, kMajorA, kMajorB>(a, b, shape, parts, epilogue, stream);
  }
}

// A product that drivers of ops are written for: this one, or hopper_gemm.h's.
struct PortableProduct {
  // How many neighbouring columns of a row an epilogue sees in neighbouring lanes, without a workspace.
  static constexpr int64_t kLeastColumnsTogether = LargeTile::kWarpN;
  template <class T>
  static int64_t columns_together(GemmShape shape) {
    if constexpr (std::is_same_v<T, float>) return 64;
    static_assert(LargeTile::kWarpN == SmallTile::kWarpN);
    return gemm_plan(shape, false).tile == TileSize::wide ? WideTile::kWarpN : LargeTile::kWarpN;
  }

  // The majors say which side of an operand is expected to be contiguous; others work, element by element. `workspace`:
  // parts_workspace(shape) floats, or null: the depth stays whole. Nothing is done where M or N is 0.
  template <class T, Major kMajorA, Major kMajorB, class Epilogue>
  static void run(const Operand& a, const Operand& b, GemmShape shape, const Epilogue& epilogue, float* workspace,
                  const Stream& stream) {
    if (shape.M == 0 || shape.N == 0) return;
    const GemmPlan plan = gemm_plan(shape, workspace != nullptr);
    if (plan.parts == 1)
      return launch_gemm<T, kMajorA, kMajorB>(a, b, shape, plan.tile, {1, shape.K}, epilogue, stream);
    const Parts parts{plan.parts, part_depth(shape.K, plan.parts)};
    launch_gemm<T, kMajorA, kMajorB>(a, b, shape, plan.tile, parts, PartEpilogue{workspace, shape.M, shape.N, 0},
                                     stream);
    add_parts<PortableProduct>(workspace, shape, plan.parts, epilogue, stream);
  }
};

}  // namespace llmfast::cuda
