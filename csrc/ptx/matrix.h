// Tensor-core products and the loads that feed them; the whole warp executes each together.
//
// mma m16n8k16, d[16,8] += a[16,16] b[16,8]. With g = lane / 4 and t = lane % 4 a lane holds, two neighbours in k (or n
// for d) to a register:
//   a[0]: (g, 2t..)   a[1]: (g+8, 2t..)   a[2]: (g, 2t+8..)   a[3]: (g+8, 2t+8..)     (m, k)
//   b[0]: (2t.., g)   b[1]: (2t+8.., g)                                               (k, n)
//   d[0..1]: (g, 2t..)   d[2..3]: (g+8, 2t..)                                         (m, n)
// ldmatrix loads 8x8 matrices of 16-bit elements: lanes 8i..8i+7 give the addresses of matrix i's rows (16 bytes each),
// and every lane gets in r[i] elements (g, 2t..2t+1), or (2t..2t+1, g) with _trans. stmatrix (compute capability 9.0)
// stores the same way.
#pragma once
#include "ptx/cuda.h"

namespace llmfast::cuda {

enum class Major { k, mn };  // which side of an operand is contiguous in memory

#ifdef __CUDACC__

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { emulated::ldmatrix(r, 4, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { emulated::ldmatrix(r, 4, row, true); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) { emulated::ldmatrix(r, 2, row, false); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) { emulated::ldmatrix(r, 2, row, true); }
inline void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) { emulated::stmatrix(row, r, false); }
inline void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) { emulated::stmatrix(row, r, true); }

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::mma_m16n8k16<T>(d, a, b);
}

#endif

}  // namespace llmfast::cuda
