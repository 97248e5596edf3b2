// Products with few rows of A (decode, small batches), where B = W^T for a weight W[N,K] with contiguous rows: straight from
// W, which is read once and not packed. The target being compiled decides how:
//
//   gemm_few_rows(a, b, size, epilogue)      C = epilogue(A * B), for up to Kernel::kFewRows rows of A
//                                            (Kernel::kFewRowsInBlock: for as many as gemm() makes one block of)
#pragma once

#if defined(LLMFAST_TARGET_AMX)
#include "gemm/few_rows_amx.h"
#elif defined(LLMFAST_TARGET_AVX512BF16)
#include "gemm/few_rows_bf16.h"

namespace llmfast::LLMFAST_TARGET {
inline void gemm_few_rows(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  gemm_by_dots<Kernel::kFewRows>(a, b, size, epilogue);
}
}  // namespace llmfast::LLMFAST_TARGET
#else
#include "gemm/few_rows_vec.h"
#endif
