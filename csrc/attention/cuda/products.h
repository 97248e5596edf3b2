// The two products of attention on a warp's 16 rows, by mma.m16n8k16, operands in shared-memory tiles.
#pragma once
#include "gemm/cuda/shared_tile.h"
#include "ptx/convert.h"

namespace llmfast::cuda {

template <int kFragments>
__device__ void clear(float (&acc)[kFragments][4]) {
#pragma unroll
  for (int j = 0; j < kFragments; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[j][e] = 0.0f;
}

// scores[16][kTokens] = rows[first_row..][kD] others[kTokens][kD]^T
template <class T, int kTokens, int kD>
__device__ void dot_rows(float (&scores)[kTokens / 8][4], SharedTile<kD> rows, int first_row, SharedTile<kD> others) {
  clear(scores);
#pragma unroll
  for (int d = 0; d < kD; d += 16) {
    uint32_t a[4];
    read_a<Major::k>(a, rows, first_row, d, lane());
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      uint32_t b[4];
      read_b<Major::k>(b, others, j * 8, d, lane());
      mma_m16n8k16<T>(scores[j], a, {b[0], b[1]});
      mma_m16n8k16<T>(scores[j + 1], a, {b[2], b[3]});
    }
  }
}

// acc[16][kD] += weights[16][kTokens] others[kTokens][kD]. The accumulators of one product are, pair by pair, the
// fragments of the next one's first operand.
template <class T, int kTokens, int kD>
__device__ void add_weighted_rows(float (&acc)[kD / 8][4], const float (&weights)[kTokens / 8][4],
                                  SharedTile<kD> others) {
#pragma unroll
  for (int token = 0; token < kTokens; token += 16) {
    const float(&left)[4] = weights[token / 8], (&right)[4] = weights[token / 8 + 1];
    const uint32_t a[4] = {pack_pair<T>(left[0], left[1]), pack_pair<T>(left[2], left[3]),
                           pack_pair<T>(right[0], right[1]), pack_pair<T>(right[2], right[3])};
#pragma unroll
    for (int j = 0; j < kD / 8; j += 2) {
      uint32_t b[4];
      read_b<Major::mn>(b, others, j * 8, token, lane());
      mma_m16n8k16<T>(acc[j], a, {b[0], b[1]});
      mma_m16n8k16<T>(acc[j + 1], a, {b[2], b[3]});
    }
  }
}

}  // namespace llmfast::cuda
