// Copies by the bulk copy engine (compute capability 9.0): one thread asks, hardware moves a whole box.
//
// Loads report to an mbarrier (ptx/mbarrier.h) in bytes. Stores and additions read shared memory: a thread's since its
// last commit form a group; after bulk_wait_read<N>() all but its N youngest have been read, so that their shared memory
// may be written again, and after bulk_wait<N>() they are done. Shared memory that threads have written and the engine
// (or a warpgroup product) is to read next needs fence_async_proxy() in each writing thread, then a barrier.
// `to` and `from` are shared addresses, multiples of 128 bytes (of the swizzle's period for swizzled boxes); coordinates
// are in elements, innermost first, and may lie beyond the tensor: absent elements load as zeros and are not stored.
#pragma once
#include "core/tensor_map.h"
#include "ptx/cuda.h"

namespace llmfast::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void bulk_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2,
                                          int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// `bytes` consecutive ones; addresses and count are multiples of 16.
__device__ __forceinline__ void bulk_load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void bulk_store(const TensorMap* map, uint32_t from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(c0), "r"(c1)
               : "memory");
}
__device__ __forceinline__ void bulk_store(const TensorMap* map, uint32_t from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
// Consecutive float32 sums: to[i] += from[i] in L2, each addition atomic; and the plain copy of the same bytes.
__device__ __forceinline__ void bulk_add_floats(float* to, uint32_t from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_store_bytes(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
               "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kYoungest>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kYoungest) : "memory");
}
template <int kYoungest>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kYoungest) : "memory");
}
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory, between the engine's writes and those of threads.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

#else

inline void prefetch_map(const TensorMap*) {}
inline void bulk_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1) {
  emulated::bulk_load(to, *map, barrier, {c0, c1});
}
inline void bulk_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  emulated::bulk_load(to, *map, barrier, {c0, c1, c2});
}
inline void bulk_load(uint32_t to, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  emulated::bulk_load(to, *map, barrier, {c0, c1, c2, c3});
}
inline void bulk_load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  emulated::bulk_load_bytes(to, from, bytes, barrier);
}
inline void bulk_store(const TensorMap* map, uint32_t from, int c0, int c1) {
  emulated::bulk_store(*map, from, {c0, c1});
}
inline void bulk_store(const TensorMap* map, uint32_t from, int c0, int c1, int c2, int c3) {
  emulated::bulk_store(*map, from, {c0, c1, c2, c3});
}
inline void bulk_add_floats(float* to, uint32_t from, int bytes) { emulated::bulk_store_bytes(to, from, bytes, true); }
inline void bulk_store_bytes(void* to, uint32_t from, int bytes) { emulated::bulk_store_bytes(to, from, bytes, false); }
inline void bulk_commit() { emulated::bulk_commit(); }
template <int kYoungest>
void bulk_wait_read() {
  emulated::bulk_wait(kYoungest);
}
template <int kYoungest>
void bulk_wait() {
  emulated::bulk_wait(kYoungest);
}
inline void fence_async_proxy() {}
inline void fence_async_proxy_global() {}

#endif

}  // namespace llmfast::cuda
