// Tiles of 16-bit elements in shared memory: where a 16-byte chunk lies, and which chunk each lane hands to ldmatrix.
//
// A tile has rows of kCols elements, kCols / 8 chunks. Chunk c of row r is stored at chunk position c ^ f(r), so that
// the eight rows of an 8x8 matrix fall into eight different bank groups, for ldmatrix as for 16-byte copies:
//   rows of 64 bytes  (4 chunks): two rows share the 128 bytes of all banks, f(r) = (r / 2) % 4
//   rows of 128 bytes and more:   f(r) = r % 8
//
// mma.m16n8k16 takes A as 16x16 = four 8x8 matrices (a0: rows 0-7, k 0-7; a1: rows 8-15, k 0-7; a2: rows 0-7, k 8-15;
// a3: rows 8-15, k 8-15) and B as k 16 x n 8 = two (b0: k 0-7, b1: k 8-15). ldmatrix.x4 reads matrix i at the rows that
// lanes 8i..8i+7 name. An operand whose depth k is contiguous ("k-major") is read as it lies; one whose m or n is
// contiguous ("mn-major", stored [k][mn]) through ldmatrix.trans. Two B fragments, n 0-7 and n 8-15, come in one read.
// All functions here but the two reads run on the host, too: tests/test_cuda_tiles.py checks them by brute force.
#pragma once
#include <cstdint>

#include "ptx/cuda.h"
#include "ptx/matrix.h"

namespace llmfast::cuda {

constexpr int kChunk = 8;  // elements in 16 bytes

template <int kCols>
__host__ __device__ constexpr int swizzled_chunk(int row, int chunk) {
  static_assert(kCols == 32 || kCols % 64 == 0, "rows of 64 bytes, or of whole 128 bytes");
  return kCols == 32 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7);
}

// Bytes from the tile's start to a chunk.
template <int kCols>
__host__ __device__ constexpr int chunk_offset(int row, int chunk) {
  return (row * (kCols / kChunk) + swizzled_chunk<kCols>(row, chunk)) * 16;
}

// What a lane names to ldmatrix.x4, relative to the fragment's first row and chunk.
struct LaneRow {
  int row, chunk;
};

__host__ __device__ constexpr LaneRow lane_row_a(Major major, int lane) {
  return major == Major::k ? LaneRow{lane % 16, lane / 16} : LaneRow{lane % 8 + lane / 16 * 8, lane / 8 % 2};
}
__host__ __device__ constexpr LaneRow lane_row_b(Major major, int lane) {
  return major == Major::k ? LaneRow{lane % 8 + lane / 16 * 8, lane / 8 % 2} : LaneRow{lane % 16, lane / 16};
}

// Element i of the 16x8 accumulator that lane holds: c0, c1 in row lane / 4, c2, c3 eight rows below.
__host__ __device__ constexpr int accumulator_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
__host__ __device__ constexpr int accumulator_col(int lane, int i) { return lane % 4 * 2 + i % 2; }

template <int kCols_>
struct SharedTile {
  static constexpr int kCols = kCols_;
  uint32_t address;

  __device__ uint32_t chunk(int row, int chunk) const { return address + chunk_offset<kCols>(row, chunk); }
};

// A fragment: rows m..m + 15 of A, depth k..k + 15.
template <Major kMajor, int kCols>
__device__ inline void read_a(uint32_t (&a)[4], SharedTile<kCols> tile, int m, int k, int lane) {
  const LaneRow at = lane_row_a(kMajor, lane);
  if constexpr (kMajor == Major::k) ldmatrix_x4(a, tile.chunk(m + at.row, k / kChunk + at.chunk));
  else ldmatrix_x4_trans(a, tile.chunk(k + at.row, m / kChunk + at.chunk));
}

// Two B fragments: b[0], b[1] of columns n..n + 7 and b[2], b[3] of n + 8..n + 15, depth k..k + 15.
template <Major kMajor, int kCols>
__device__ inline void read_b(uint32_t (&b)[4], SharedTile<kCols> tile, int n, int k, int lane) {
  const LaneRow at = lane_row_b(kMajor, lane);
  if constexpr (kMajor == Major::k) ldmatrix_x4(b, tile.chunk(n + at.row, k / kChunk + at.chunk));
  else ldmatrix_x4_trans(b, tile.chunk(k + at.row, n / kChunk + at.chunk));
}

}  // namespace llmfast::cuda
