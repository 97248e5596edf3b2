// The 16-bit product of one tile of C: a ring of shared-memory stages filled by cp.async, ldmatrix, mma.m16n8k16.
//
// A warp owns a kWarpM x kWarpN piece of the tile in registers. Per kDepth = 32 of k: wait for the oldest stage, one
// barrier, start the copy into the stage that everybody has just finished reading, two rounds of ldmatrix and mma.
#pragma once
#include "gemm/cuda/operand.h"

namespace llmfast::cuda {

template <int kM_, int kN_, int kWarpM_, int kWarpN_, int kStages_>
struct GemmTile {
  static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_, kStages = kStages_;
  static constexpr int kBlocks = kM == 64 ? 4 : kN == 128 ? 2 : 1;  // that share a multiprocessor
  static constexpr int kWarpsN = kN / kWarpN, kThreads = kM / kWarpM * kWarpsN * 32;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static_assert(kM % kWarpM == 0 && kN % kWarpN == 0 && kWarpM % 16 == 0 && kWarpN % 16 == 0);
};

// Shared memory can deliver 128 bytes a clock. Per 32 of depth (nvidia A100: two clocks a HMMA and multiprocessor) the
// wide tile keeps it busy for 704 of 1024 clocks, the large one for 512 of 512: it is for shapes that have no 256 wide
// tiles.
using WideTile = GemmTile<128, 256, 64, 64, 3>;   // 8 warps, 72 KB: one block a multiprocessor
using LargeTile = GemmTile<128, 128, 64, 32, 4>;  // 8 warps, 64 KB: two
using SmallTile = GemmTile<64, 64, 32, 32, 4>;    // 4 warps, 32 KB: four

template <class Tile>
struct Accumulators {
  float at[Tile::kFragmentsM][Tile::kFragmentsN][4];
};

// acc = A[first_m.., first_k..end_k] B[first_n.., ..]^T of the block's tile, zeros beyond the edges.
template <class T, class Tile, Major kMajorA, Major kMajorB>
__device__ void multiply_tile(const Operand& a, const Operand& b, int64_t M, int64_t N, int64_t first_m,
                              int64_t first_n, int64_t first_k, int64_t end_k, uint32_t shared,
                              Accumulators<Tile>& acc) {
  using LoaderA = OperandLoader<T, kMajorA, Tile::kM, Tile::kThreads>;
  using LoaderB = OperandLoader<T, kMajorB, Tile::kN, Tile::kThreads>;
  constexpr int kStageBytes = LoaderA::kBytes + LoaderB::kBytes;
  LoaderA load_a(a, first_m, M, first_k, end_k);
  LoaderB load_b(b, first_n, N, first_k, end_k);
  const int tiles = static_cast<int>((end_k - first_k + kDepth - 1) / kDepth);
  const int m = warp() / Tile::kWarpsN * Tile::kWarpM, n = warp() % Tile::kWarpsN * Tile::kWarpN;

#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.at[i][j][e] = 0.0f;

  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (stage < tiles) {
      load_a.load_next(shared + stage * kStageBytes);
      load_b.load_next(shared + stage * kStageBytes + LoaderA::kBytes);
    }
    copy_async_commit();
  }
  uint32_t reading = shared, writing = shared + (Tile::kStages - 1) * kStageBytes;
  const uint32_t end = shared + Tile::kStages * kStageBytes;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<Tile::kStages - 2>();
    __syncthreads();
    if (tile + Tile::kStages - 1 < tiles) {
      load_a.load_next(writing);
      load_b.load_next(writing + LoaderA::kBytes);
    }
    copy_async_commit();
    const SharedTile<LoaderA::kCols> tile_a{reading};
    const SharedTile<LoaderB::kCols> tile_b{reading + LoaderA::kBytes};
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t fragment_a[Tile::kFragmentsM][4], fragment_b[Tile::kFragmentsN][2];
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) read_a<kMajorA>(fragment_a[i], tile_a, m + i * 16, k, lane());
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; j += 2) {
        uint32_t pair[4];
        read_b<kMajorB>(pair, tile_b, n + j * 8, k, lane());
        fragment_b[j][0] = pair[0], fragment_b[j][1] = pair[1];
        fragment_b[j + 1][0] = pair[2], fragment_b[j + 1][1] = pair[3];
      }
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kFragmentsN; ++j) mma_m16n8k16<T>(acc.at[i][j], fragment_a[i], fragment_b[j]);
    }
    reading = reading + kStageBytes == end ? shared : reading + kStageBytes;
    writing = writing + kStageBytes == end ? shared : writing + kStageBytes;
  }
  copy_async_wait<0>();
  __syncthreads();  // the ring is free for the epilogue
}

}  // namespace llmfast::cuda
