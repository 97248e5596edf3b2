// mbarrier: a barrier in shared memory that counts arrivals of threads and bytes of bulk copies (compute capability 9.0).
//
// A phase completes when as many threads have arrived as mbarrier_init said and all expected bytes have come; the next
// begins at once. Phases are numbered by their parity, the first is 0: mbarrier_wait(b, parity) returns once the phase of
// that parity has completed, so a consumer's first wait is for 0, and a producer that waits for 1 falls through once.
// `barrier` is a shared_address(), a multiple of 8. One thread initialises, calls mbarrier_init_fence(), and a
// __syncthreads() shows the barriers to the block.
#pragma once
#include "ptx/cuda.h"

namespace llmfast::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase wait for `bytes` more: those of whole boxes, parts beyond a tensor's edge included.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra through_%=;\n"
      "bra again_%=;\n"
      "through_%=:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

#else

inline void mbarrier_init(uint32_t barrier, int arrivals) { emulated::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint32_t barrier) { emulated::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) { emulated::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint32_t barrier, int parity) { emulated::mbarrier_wait(barrier, parity); }

#endif

// A place in a ring of kStages slots, and the parity of its barriers: 0 in the first round, 1 in the second.
template <int kStages>
struct RingPlace {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace llmfast::cuda
