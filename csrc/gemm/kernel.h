// The micro-kernel of the target being compiled. Every Kernel has
//
//   Packed                       element type of packed panels
//   kRows, kCols, kDepth         tile of C; depth is padded to a multiple of kDepth
//   LeftPanel                    kRows rows of A: packed, or (takes_rows) as float32 rows of A itself
//   kDepthInL1                   kc: depth of a B sub-panel that stays in L1
//   kBlockBytes                  how much packed A may occupy in L2
//   kFewRows                     most rows of A for which few_rows.h is faster than packing, whatever they are
//   kFewRowsInBlock              whether it is so for all that are one block in L2, too
//   supports(dtype)              operand dtypes it multiplies
//   takes_rows(a)                whether whole panels of rows of A need not be packed
//   ThreadState                  RAII, one per thread and parallel region (AMX: tile configuration)
//   pack_a(dst, a, rows, depth)  one row panel: `rows` <= kRows of A, zero-padded to kRows x padded depth
//   pack_b(dst, b, cols, depth)  one column panel, likewise; both are kRows (kCols) * padded depth elements, depth-major
//                                in steps of kDepth, so a sub-panel starts at depth * kCols
//   multiply(left, rows, b, depth, c_in, c_out, ldc, next_b, next_count, pending)
//                                c_out = (c_in or 0) + left * b; c_in is a row-major tile kRows x kCols, c_out one with rows
//                                ldc apart. Only the first `rows` rows matter. May run `pending`, the previous tile's
//                                epilogue and what is to be read ahead, between its own steps; must finish it before
//                                returning. next_b, next_count: this call's share of the packed B sub-panel that comes
//                                next, to prefetch.
#pragma once

#if defined(LLMFAST_TARGET_AMX)
#include "gemm/kernel_amx.h"
#elif defined(LLMFAST_TARGET_AVX512BF16)
#include "gemm/kernel_bf16.h"
#else
#include "gemm/kernel_vec.h"
#endif
