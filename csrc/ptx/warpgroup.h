// Products of a warpgroup, four warps together, on tensor cores that read shared memory themselves (wgmma, compute
// capability 9.0a).
//
// warpgroup_product<kN>: d[64, kN] (+)= a[64, 16] b[16, kN], bf16 or fp16, float32 sums. b is in shared memory, a there
// or in registers; d is in registers. Thread t of 128 holds as element i of d
//   row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2),  column 8 (i / 4) + 2 (t % 4) + i % 2
// and of an a in registers what mma m16n8k16 (ptx/matrix.h) takes for its warp's 16 rows: a[r] is the pair of elements
// d[8 k + 2 r], d[8 k + 2 r + 1] of a finished d whose columns 16 k .. 16 k + 15 become a's depth.
//
// Order: warpgroup_fence() before the first product, and after ordinary code touched d or a; products; commit;
// warpgroup_wait<N>() until at most N committed groups are under way. d, a in registers and the shared memory that a
// product reads belong to it from its issue until that wait. The whole warpgroup executes each call together.
//
// A descriptor says how an operand lies in shared memory, as boxes of the bulk copy engine do (core/tensor_map.h):
//   k-major, rows of the swizzle's bytes:     `stride` bytes from 8 rows to the next 8; `leading` unused
//   mn-major, a row holds 64 (swizzle 128) neighbours in m or n: `stride` bytes from 8 depths to the next 8, `leading`
//     from one such slab to the next
// A step of 16 in depth is + 32 bytes (k-major) or + 16 rows (mn-major) on the address. Major::k: no transposition.
#pragma once
#include <type_traits>

#include "core/tensor_map.h"
#include "ptx/matrix.h"

namespace llmfast::cuda {

__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t address, int stride, int leading = 16,
                                                         Swizzle swizzle = Swizzle::bytes128) {
  const uint64_t mode = swizzle == Swizzle::bytes128 ? 1 : swizzle == Swizzle::bytes64 ? 2 : 3;
  return (address & 0x3ffffu) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | mode << 62;
}
// The descriptor of the same matrix `bytes` further on.
__host__ __device__ constexpr uint64_t advanced(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

#ifdef __CUDACC__

__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kYoungest>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kYoungest) : "memory");
}

// Ordinary code that uses d stays after this point: the compiler does not know that a product ends with the wait.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Registers a thread: a warpgroup gives some back to the multiprocessor, others take them. Multiples of 8; every warp of
// a warpgroup calls, and the kernel's launch bounds state one block a multiprocessor.
template <int kRegisters>
__device__ __forceinline__ void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

namespace wgmma {

template <int kN>
struct Instruction;

// One specialisation for each width: the registers of d must be listed one by one.
#define LLMFAST_WGMMA(N, TYPE, D, A, REST)                                                                 \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " REST ", 0;\n"                                                       \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, " A ";\n}"
#define LLMFAST_WGMMA_WIDTH(N, D, OUT, A1, B1, S1, TA1, TB1, A4, B4, S4, TB4)                              \
  template <>                                                                                              \
  struct Instruction<N> {                                                                                  \
    template <class T, int kA, int kB>                                                                     \
    __device__ __forceinline__ static void run(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {       \
      if constexpr (std::is_same_v<T, bf16>)                                                               \
        asm volatile(LLMFAST_WGMMA(N, "bf16", D, A1 ", " B1 ", p, 1, 1, " TA1 ", " TB1, S1)                \
                     : OUT : "l"(a), "l"(b), "r"(add), "n"(kA), "n"(kB));                                  \
      else                                                                                                 \
        asm volatile(LLMFAST_WGMMA(N, "f16", D, A1 ", " B1 ", p, 1, 1, " TA1 ", " TB1, S1)                 \
                     : OUT : "l"(a), "l"(b), "r"(add), "n"(kA), "n"(kB));                                  \
    }                                                                                                      \
    template <class T, int kB>                                                                             \
    __device__ __forceinline__ static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) { \
      if constexpr (std::is_same_v<T, bf16>)                                                               \
        asm volatile(LLMFAST_WGMMA(N, "bf16", D, "{" A4 "}, " B4 ", p, 1, 1, " TB4, S4)                    \
                     : OUT : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kB));       \
      else                                                                                                 \
        asm volatile(LLMFAST_WGMMA(N, "f16", D, "{" A4 "}, " B4 ", p, 1, 1, " TB4, S4)                     \
                     : OUT : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kB));       \
    }                                                                                                      \
  };
#define LLMFAST_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LLMFAST_D8(i) LLMFAST_D4(i), LLMFAST_D4(i + 4)
#define LLMFAST_D16(i) LLMFAST_D8(i), LLMFAST_D8(i + 8)
#define LLMFAST_D32(i) LLMFAST_D16(i), LLMFAST_D16(i + 16)
#define LLMFAST_D64(i) LLMFAST_D32(i), LLMFAST_D32(i + 32)

#define LLMFAST_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LLMFAST_R8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define LLMFAST_R16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define LLMFAST_R24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define LLMFAST_R32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define LLMFAST_R40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define LLMFAST_R48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define LLMFAST_R56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define LLMFAST_R64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define LLMFAST_R72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define LLMFAST_R80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define LLMFAST_R88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define LLMFAST_R96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define LLMFAST_R104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define LLMFAST_R112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define LLMFAST_R120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define LLMFAST_LIST_16 LLMFAST_R0
#define LLMFAST_OUT_16 LLMFAST_D8(0)
LLMFAST_WGMMA_WIDTH(16, LLMFAST_LIST_16, LLMFAST_OUT_16, "%8", "%9", "%10", "%11", "%12", "%8, %9, %10, %11",
                    "%12", "%13", "%14")
#define LLMFAST_LIST_32 LLMFAST_R0 ", " LLMFAST_R8
#define LLMFAST_OUT_32 LLMFAST_D16(0)
LLMFAST_WGMMA_WIDTH(32, LLMFAST_LIST_32, LLMFAST_OUT_32, "%16", "%17", "%18", "%19", "%20", "%16, %17, %18, %19",
                    "%20", "%21", "%22")
#define LLMFAST_LIST_48 LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16
#define LLMFAST_OUT_48 LLMFAST_D16(0), LLMFAST_D8(16)
LLMFAST_WGMMA_WIDTH(48, LLMFAST_LIST_48, LLMFAST_OUT_48, "%24", "%25", "%26", "%27", "%28", "%24, %25, %26, %27",
                    "%28", "%29", "%30")
#define LLMFAST_LIST_64 LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24
#define LLMFAST_OUT_64 LLMFAST_D32(0)
LLMFAST_WGMMA_WIDTH(64, LLMFAST_LIST_64, LLMFAST_OUT_64, "%32", "%33", "%34", "%35", "%36", "%32, %33, %34, %35",
                    "%36", "%37", "%38")
#define LLMFAST_LIST_80 LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32
#define LLMFAST_OUT_80 LLMFAST_D32(0), LLMFAST_D8(32)
LLMFAST_WGMMA_WIDTH(80, LLMFAST_LIST_80, LLMFAST_OUT_80, "%40", "%41", "%42", "%43", "%44", "%40, %41, %42, %43",
                    "%44", "%45", "%46")
#define LLMFAST_LIST_96 LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32 ", " LLMFAST_R40
#define LLMFAST_OUT_96 LLMFAST_D32(0), LLMFAST_D16(32)
LLMFAST_WGMMA_WIDTH(96, LLMFAST_LIST_96, LLMFAST_OUT_96, "%48", "%49", "%50", "%51", "%52", "%48, %49, %50, %51",
                    "%52", "%53", "%54")
#define LLMFAST_LIST_112 \
  LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32 ", " LLMFAST_R40 ", " LLMFAST_R48
#define LLMFAST_OUT_112 LLMFAST_D32(0), LLMFAST_D16(32), LLMFAST_D8(48)
LLMFAST_WGMMA_WIDTH(112, LLMFAST_LIST_112, LLMFAST_OUT_112, "%56", "%57", "%58", "%59", "%60", "%56, %57, %58, %59",
                    "%60", "%61", "%62")
#define LLMFAST_LIST_128 \
  LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32 ", " LLMFAST_R40 ", " LLMFAST_R48 ", " LLMFAST_R56
#define LLMFAST_OUT_128 LLMFAST_D64(0)
LLMFAST_WGMMA_WIDTH(128, LLMFAST_LIST_128, LLMFAST_OUT_128, "%64", "%65", "%66", "%67", "%68", "%64, %65, %66, %67",
                    "%68", "%69", "%70")
#define LLMFAST_LIST_144 \
  LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32 ", " LLMFAST_R40 ", " LLMFAST_R48 ", " LLMFAST_R56 ", " LLMFAST_R64
#define LLMFAST_OUT_144 LLMFAST_D64(0), LLMFAST_D8(64)
LLMFAST_WGMMA_WIDTH(144, LLMFAST_LIST_144, LLMFAST_OUT_144, "%72", "%73", "%74", "%75", "%76", "%72, %73, %74, %75",
                    "%76", "%77", "%78")
#define LLMFAST_LIST_160 \
  LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32 ", " LLMFAST_R40 ", " LLMFAST_R48 ", " LLMFAST_R56 ", " LLMFAST_R64 ", " LLMFAST_R72
#define LLMFAST_OUT_160 LLMFAST_D64(0), LLMFAST_D16(64)
LLMFAST_WGMMA_WIDTH(160, LLMFAST_LIST_160, LLMFAST_OUT_160, "%80", "%81", "%82", "%83", "%84", "%80, %81, %82, %83",
                    "%84", "%85", "%86")
#define LLMFAST_LIST_176 \
  LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32 ", " LLMFAST_R40 ", " LLMFAST_R48 ", " LLMFAST_R56 ", " LLMFAST_R64 ", " LLMFAST_R72 ", " LLMFAST_R80
#define LLMFAST_OUT_176 LLMFAST_D64(0), LLMFAST_D16(64), LLMFAST_D8(80)
LLMFAST_WGMMA_WIDTH(176, LLMFAST_LIST_176, LLMFAST_OUT_176, "%88", "%89", "%90", "%91", "%92", "%88, %89, %90, %91",
                    "%92", "%93", "%94")
#define LLMFAST_LIST_192 \
  LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32 ", " LLMFAST_R40 ", " LLMFAST_R48 ", " LLMFAST_R56 ", " LLMFAST_R64 ", " LLMFAST_R72 ", " LLMFAST_R80 ", " LLMFAST_R88
#define LLMFAST_OUT_192 LLMFAST_D64(0), LLMFAST_D32(64)
LLMFAST_WGMMA_WIDTH(192, LLMFAST_LIST_192, LLMFAST_OUT_192, "%96", "%97", "%98", "%99", "%100", "%96, %97, %98, %99",
                    "%100", "%101", "%102")
#define LLMFAST_LIST_224 \
  LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32 ", " LLMFAST_R40 ", " LLMFAST_R48 ", " LLMFAST_R56 ", " LLMFAST_R64 ", " LLMFAST_R72 ", " LLMFAST_R80 ", " LLMFAST_R88 ", " LLMFAST_R96 ", " LLMFAST_R104
#define LLMFAST_OUT_224 LLMFAST_D64(0), LLMFAST_D32(64), LLMFAST_D16(96)
LLMFAST_WGMMA_WIDTH(224, LLMFAST_LIST_224, LLMFAST_OUT_224, "%112", "%113", "%114", "%115", "%116", "%112, %113, %114, %115",
                    "%116", "%117", "%118")
#define LLMFAST_LIST_256 \
  LLMFAST_R0 ", " LLMFAST_R8 ", " LLMFAST_R16 ", " LLMFAST_R24 ", " LLMFAST_R32 ", " LLMFAST_R40 ", " LLMFAST_R48 ", " LLMFAST_R56 ", " LLMFAST_R64 ", " LLMFAST_R72 ", " LLMFAST_R80 ", " LLMFAST_R88 ", " LLMFAST_R96 ", " LLMFAST_R104 ", " LLMFAST_R112 ", " LLMFAST_R120
#define LLMFAST_OUT_256 LLMFAST_D64(0), LLMFAST_D64(64)
LLMFAST_WGMMA_WIDTH(256, LLMFAST_LIST_256, LLMFAST_OUT_256, "%128", "%129", "%130", "%131", "%132", "%128, %129, %130, %131",
                    "%132", "%133", "%134")

}  // namespace wgmma

// `add` false: d is overwritten. kA, kB: how the operands lie; a is then [64, 16], b [kN, 16] k-major.
template <int kN, class T, Major kA, Major kB>
__device__ __forceinline__ void warpgroup_product(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  wgmma::Instruction<kN>::template run<T, static_cast<int>(kA), static_cast<int>(kB)>(d, a, b, add);
}
template <int kN, class T, Major kB>
__device__ __forceinline__ void warpgroup_product(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  wgmma::Instruction<kN>::template run<T, static_cast<int>(kB)>(d, a, b, add);
}

#else

inline void warpgroup_fence() {}
inline void warpgroup_commit() { emulated::warpgroup_commit(); }
template <int kYoungest>
void warpgroup_wait() {
  emulated::warpgroup_wait(kYoungest);
}
template <int kCount>
void pin_registers(float (&)[kCount]) {}
template <int kRegisters>
void registers_shrink() {}
template <int kRegisters>
void registers_grow() {}

template <int kN, class T, Major kA, Major kB>
void warpgroup_product(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  emulated::warpgroup_product({d, kN, {}, a, b, false, kA == Major::mn, kB == Major::mn, add,
                               std::is_same_v<T, bf16>, 0});
}
template <int kN, class T, Major kB>
void warpgroup_product(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulated::warpgroup_product({d, kN, {a[0], a[1], a[2], a[3]}, 0, b, true, false, kB == Major::mn, add,
                               std::is_same_v<T, bf16>, 0});
}

#endif

}  // namespace llmfast::cuda
