// The special-function unit: approximations in one instruction. Largest errors of the hardware, from the PTX ISA:
// exp2 2 ulp (subnormal results are flushed), log2 absolute 2^-22 in (0.5, 2) and 3 ulp elsewhere, tanh relative 2^-11,
// reciprocal 1 ulp. The emulation is exact to float.
#pragma once
#include "ptx/cuda.h"

namespace llmfast::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float tanh_approx(float x) { return tanhf(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

#endif

}  // namespace llmfast::cuda
