// What becomes of a finished tile. An epilogue is called with eight neighbouring columns of one row at a time:
//   template <int kLanes> void columns(const float (&acc)[8], int64_t m, int64_t n, int count)
// of which the first `count` exist (0: none, but all lanes of a warp call together, so that it may shuffle); kLanes
// neighbouring lanes hold neighbouring columns of the same row. Each (m, n) comes exactly once.
#pragma once
#include "core/types.h"
#include "ptx/convert.h"
#include "ptx/memory.h"

namespace llmfast::cuda {

// Eight 16-bit elements, or float, as float; by 16-byte accesses where the address allows.
template <class T>
__device__ inline void load_columns(float (&x)[8], const T* from, int count) {
  if (count == 8 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    if constexpr (sizeof(T) == 2) {
      const Bytes16 chunk = load<Bytes16>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) unpack_pair<T>(chunk.word[i], x[2 * i], x[2 * i + 1]);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 four = load<float4>(from + 4 * half);
        x[4 * half] = four.x, x[4 * half + 1] = four.y, x[4 * half + 2] = four.z, x[4 * half + 3] = four.w;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
__device__ inline void store_columns(T* to, const float (&x)[8], int count) {
  if (count == 8 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    if constexpr (sizeof(T) == 2) {
      Bytes16 chunk;
#pragma unroll
      for (int i = 0; i < 4; ++i) chunk.word[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
      store(to, chunk);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store(to + 4 * half, make_float4(x[4 * half], x[4 * half + 1], x[4 * half + 2], x[4 * half + 3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) to[i] = from_float<T>(x[i]);
  }
}

// C = acc + bias + addend, rounded to Out; bias and addend may be null.
template <class T, class Out = T>
struct StoreEpilogue {
  Out* c;
  int64_t ldc;
  const T* bias = nullptr;
  const float* addend = nullptr;  // [M, ld_addend]; may be c itself
  int64_t ld_addend = 0;

  template <int kLanes>
  __device__ void columns(const float (&acc)[8], int64_t m, int64_t n, int count) const {
    if (count == 0) return;
    float x[8], more[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = acc[i];
    if (bias) {
      load_columns(more, bias + n, count);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += more[i];
    }
    if (addend) {
      load_columns(more, addend + m * ld_addend + n, count);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += more[i];
    }
    store_columns(c + m * ldc + n, x, count);
  }
};

template <class T>
StoreEpilogue<T> store_to(const TensorView& out, const TensorView& bias = {}) {
  return {out.as<T>(), out.stride[0], bias.as<const T>()};
}

// A part of the depth: partial sums in rows of N floats, summed by add_parts_kernel.
struct PartEpilogue {
  float* parts;
  int64_t M, N, part;

  template <int kLanes>
  __device__ void columns(const float (&acc)[8], int64_t m, int64_t n, int count) const {
    if (count > 0) store_columns(parts + (part * M + m) * N + n, acc, count);
  }
};

}  // namespace llmfast::cuda
