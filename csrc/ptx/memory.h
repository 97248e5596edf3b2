// Loads and stores of 2, 4, 8 or 16 bytes, each one instruction: T is trivially copyable, and addresses are multiples
// of its size. Streaming accesses are for what is read or written once: they leave the L1 cache to others; a streaming
// load is only for memory that nobody writes while the kernel runs.
#pragma once
#include "ptx/cuda.h"

namespace llmfast::cuda {

struct alignas(4) Bytes4 {
  uint32_t word[1];
};
struct alignas(8) Bytes8 {
  uint32_t word[2];
};
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

#ifdef __CUDACC__

template <class T>
__device__ __forceinline__ T load(const void* from) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  return *static_cast<const T*>(from);
}
template <>
__device__ __forceinline__ Bytes8 load<Bytes8>(const void* from) {
  const uint2 v = *static_cast<const uint2*>(from);
  return {{v.x, v.y}};
}
template <>
__device__ __forceinline__ Bytes16 load<Bytes16>(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}

template <class T>
__device__ __forceinline__ T load_streaming(const void* from) {
  return load<T>(from);
}
template <>
__device__ __forceinline__ Bytes8 load_streaming<Bytes8>(const void* from) {
  Bytes8 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.word[0]), "=r"(v.word[1])
               : "l"(__cvta_generic_to_global(from)));
  return v;
}
template <>
__device__ __forceinline__ Bytes16 load_streaming<Bytes16>(const void* from) {
  Bytes16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(__cvta_generic_to_global(from)));
  return v;
}

template <class T>
__device__ __forceinline__ void store(void* to, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  *static_cast<T*>(to) = value;
}
template <>
__device__ __forceinline__ void store<Bytes8>(void* to, Bytes8 v) {
  *static_cast<uint2*>(to) = make_uint2(v.word[0], v.word[1]);
}
template <>
__device__ __forceinline__ void store<Bytes16>(void* to, Bytes16 v) {
  *static_cast<uint4*>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

template <class T>
__device__ __forceinline__ void store_streaming(void* to, T value) {
  store<T>(to, value);
}
template <>
__device__ __forceinline__ void store_streaming<Bytes16>(void* to, Bytes16 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// By shared-memory address.
__device__ __forceinline__ Bytes16 load_shared(uint32_t from) {
  Bytes16 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(from)
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared_word(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t to, Bytes16 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}

// A number in global memory by which blocks take turns: waits until it is `value`, and sees what was written before the
// add_release() that made it so.
__device__ __forceinline__ void wait_for_turn(const int* turn, int value) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(__cvta_generic_to_global(turn)) : "memory");
  } while (now != value);
}
__device__ __forceinline__ void add_release(int* turn, int more) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(turn)), "r"(more) : "memory");
}

#else

template <class T>
T load(const void* from) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  return emulated::load<T>(from);
}
template <class T>
T load_streaming(const void* from) {
  return load<T>(from);
}
template <class T>
void store(void* to, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulated::store(to, value);
}
template <class T>
void store_streaming(void* to, T value) {
  store<T>(to, value);
}
inline Bytes16 load_shared(uint32_t from) {
  return emulated::load<Bytes16>(emulated::shared_pointer(from, 16, "ld.shared.v4"));
}
inline uint32_t load_shared_word(uint32_t from) {
  return emulated::load<uint32_t>(emulated::shared_pointer(from, 4, "ld.shared"));
}
template <class T>
inline void store_shared(uint32_t to, T value) {
  emulated::store(emulated::shared_pointer(to, sizeof(T), "st.shared"), value);
}
inline void wait_for_turn(const int* turn, int value) {
  if (*turn != value) emulated::fail("wait_for_turn: of an earlier block, and blocks run one after another");
}
inline void add_release(int* turn, int more) { *turn += more; }

#endif

}  // namespace llmfast::cuda
