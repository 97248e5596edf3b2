// How the GEMM core multiplies float32 matrices where there is AMX: in float32 or, on request, as sums of two bfloat16
// (gemm/kernel_amx_split.h), which is faster and less exact. For the whole process; off until asked for.
#pragma once

namespace llmfast {

bool float32_is_split();
void split_float32(bool split);

}  // namespace llmfast
