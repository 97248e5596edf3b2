// Products with few rows of A (decode, small batches), where B = W^T for a weight W[N,K] with contiguous rows: dot
// products straight from W, nothing packed. The target being compiled decides how:
//
//   gemm_few_rows(a, b, size, epilogue)      C = epilogue(A * B), for up to Kernel::kFewRows rows of A
#pragma once

#if defined(LLMFAST_TARGET_AVX512BF16) || defined(LLMFAST_TARGET_AMX)
#include "gemm/few_rows_bf16.h"
#else
#include "gemm/few_rows_vec.h"
#endif
