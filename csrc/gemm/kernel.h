// The micro-kernel of the target being compiled. Every Kernel has
//
//   Packed                       element type of packed panels
//   kRows, kCols, kDepth         tile of C; depth is padded to a multiple of kDepth
//   LeftPanel                    kRows rows of A: packed, or (takes_rows, takes_columns) float32 values of A itself
//   kDepthInL1                   kc: depth of a B sub-panel that stays in L1
//   kBlockBytes                  how much packed A may occupy in L2
//   kFewRowsOfBlock              rows of A below which B's panels are packed when needed, by parts of the depth
//   rows_worth_a_thread(K)       rows of A worth a thread of their own; with fewer, threads share the columns
//   kFewRows                     most rows of A for which few_rows.h is faster than packing, whatever they are
//   kFewRowsInBlock              whether it is so for all that are one block in L2, too
//   supports(dtype)              operand dtypes it multiplies
//   takes_rows(a)                whether whole panels of an A whose rows are contiguous need not be packed
//   takes_columns(a)             the same for an A whose columns are
//   ThreadState                  RAII, one per thread and parallel region (AMX: tile configuration)
//   pack_a(dst, a, rows, depth)  one row panel: `rows` <= kRows of A, zero-padded to kRows x padded depth
//   pack_b(dst, b, cols, depth)  one column panel, likewise; both are kRows (kCols) * padded depth elements, depth-major
//                                in steps of kDepth, so a sub-panel starts at depth * kCols
//   multiply(left, rows, b, depth, sums, next_b, next_count, pending)
//                                sums.to = (sums.from or 0) + left * b. Only the first `rows` rows matter. May run
//                                `pending`, the previous tile's epilogue and what is to be read ahead, between its own
//                                steps; must finish it before returning. next_b, next_count: this call's share of the packed
//                                B sub-panel that comes next, to prefetch.
#pragma once
#include <cstdint>

namespace llmfast::LLMFAST_TARGET {

// Where the sums of a tile of kRows x kCols start, and where they go: rows of either and how far they are apart.
struct TileSums {
  const float* from;  // or nullptr: zeros
  int64_t from_stride;
  float* to;
  int64_t to_stride;
};

}  // namespace llmfast::LLMFAST_TARGET

#if defined(LLMFAST_TARGET_AMX)
#include "gemm/kernel_amx.h"
#elif defined(LLMFAST_TARGET_AMX_SPLIT)
#include "gemm/kernel_amx_split.h"
#elif defined(LLMFAST_TARGET_AVX512BF16)
#include "gemm/kernel_bf16.h"
#else
#include "gemm/kernel_vec.h"
#endif
