// What nvcc knows without an include, for a plain C++ compiler: qualifiers, built-in variables and functions, short
// vectors, warp and block instructions on the emulated machine. Names and semantics: CUDA C++ Programming Guide.
#pragma once
#include <math.h>

#include <cstdint>
#include <cstdio>

#include "core/types.h"
#include "ptx/emulated/machine.h"
#include "simd/scalar.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // blocks run one after another

// ---- short vectors and numbers --------------------------------------------------------------------------------------

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

// ---- other threads --------------------------------------------------------------------------------------------------

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  llmfast::emulated::meet_block(0, 0, true, file, line);
}
// Whether `predicate` holds for any thread of the block.
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static int votes;  // blocks run one after another
  llmfast::emulated::meet_block(0, 0, true, file, line);  // the last vote has been read
  votes = 0;
  llmfast::emulated::meet_block(0, 0, true, file, line);
  votes |= predicate != 0;
  llmfast::emulated::meet_block(0, 0, true, file, line);
  return votes;
}
inline void __threadfence() {}

template <class T>
inline T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
inline T atomicMax(T* at, T value) {
  const T before = *at;
  *at = max(before, value);
  return before;
}

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  llmfast::emulated::meet_warp(mask, "__syncwarp", mask, [](uint32_t* const*) {});
}

namespace llmfast::emulated {

inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

// Every lane gets the value of lane `source`.
template <class T>
T shuffle(const char* instruction, uint32_t mask, T value, int source) {
  struct Operands {
    T given, taken;
    int source;
    uint32_t mask;
  } mine{value, value, source, mask};
  meet_warp(mask, instruction, mine, [instruction](Operands* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      const uint32_t mask = lanes[i] ? lanes[i]->mask : 0;
      if (!(mask >> i & 1)) continue;
      if (!(mask >> lanes[i]->source & 1)) fail(std::string(instruction) + " from a lane that is not in the mask");
      lanes[i]->taken = lanes[lanes[i]->source]->given;
    }
  });
  return mine.taken;
}

inline uint32_t ballot(const char* instruction, uint32_t mask, bool predicate) {
  struct Operands {
    bool predicate;
    uint32_t votes;
  } mine{predicate, 0};
  meet_warp(mask, instruction, mine, [mask](Operands* const* lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1 && lanes[i]->predicate) votes |= 1u << i;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) lanes[i]->votes = votes;
  });
  return mine.votes;
}

}  // namespace llmfast::emulated

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int lane = llmfast::emulated::lane();
  return llmfast::emulated::shuffle("__shfl_sync", mask, value, lane / width * width + source % width);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int apart, int width = 32) {
  const int lane = llmfast::emulated::lane(), source = lane ^ apart;
  return llmfast::emulated::shuffle("__shfl_xor_sync", mask, value, source / width > lane / width ? lane : source);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, int apart, int width = 32) {
  const int lane = llmfast::emulated::lane(), source = lane + apart;
  return llmfast::emulated::shuffle("__shfl_down_sync", mask, value, source / width > lane / width ? lane : source);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, int apart, int width = 32) {
  const int lane = llmfast::emulated::lane(), source = lane - apart;
  return llmfast::emulated::shuffle("__shfl_up_sync", mask, value, lane % width < apart ? lane : source);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  return llmfast::emulated::ballot("__ballot_sync", mask, predicate);
}
inline bool __any_sync(uint32_t mask, bool predicate) {
  return llmfast::emulated::ballot("__any_sync", mask, predicate) != 0;
}
inline bool __all_sync(uint32_t mask, bool predicate) {
  return llmfast::emulated::ballot("__all_sync", mask, predicate) == mask;
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

namespace llmfast::emulated {

// The rows' bytes 2j, 2j+1 of one 8x8 matrix as lanes hold them; rows that share banks with others cost a pass each.
template <int kCount>
void ldmatrix(uint32_t (&r)[kCount], int count, uint32_t row, bool transposed) {
  struct Operands {
    uint32_t row;
    uint32_t* r;
  } mine{row, r};
  meet_warp(0xffffffffu, transposed ? "ldmatrix.trans" : "ldmatrix", mine, [count, transposed](Operands* const* lanes) {
    for (int matrix = 0; matrix < count; ++matrix) {
      uint16_t element[8][8];
      int rows_on[8] = {};  // of the eight 16-byte bank groups
      for (int i = 0; i < 8; ++i) {
        const uint32_t address = lanes[8 * matrix + i]->row;
        __builtin_memcpy(element[i], shared_pointer(address, 16, "ldmatrix"), 16);
        if (rows_on[address / 16 % 8]++ > 0) ++counters().ldmatrix_conflicts;
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint16_t low = transposed ? element[2 * t][g] : element[g][2 * t];
        const uint16_t high = transposed ? element[2 * t + 1][g] : element[g][2 * t + 1];
        lanes[lane]->r[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

inline void stmatrix(uint32_t row, const uint32_t (&r)[4], bool transposed) {
  struct Operands {
    uint32_t row;
    const uint32_t* r;
  } mine{row, r};
  meet_warp(0xffffffffu, transposed ? "stmatrix.trans" : "stmatrix", mine, [transposed](Operands* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t pair = lanes[lane]->r[matrix];
        (transposed ? element[2 * t][g] : element[g][2 * t]) = static_cast<uint16_t>(pair);
        (transposed ? element[2 * t + 1][g] : element[g][2 * t + 1]) = static_cast<uint16_t>(pair >> 16);
      }
      int rows_on[8] = {};
      for (int i = 0; i < 8; ++i) {
        const uint32_t address = lanes[8 * matrix + i]->row;
        __builtin_memcpy(shared_pointer(address, 16, "stmatrix"), element[i], 16);
        if (rows_on[address / 16 % 8]++ > 0) ++counters().ldmatrix_conflicts;
      }
    }
  });
}

template <class T>
float half_of(uint32_t pair, int index) {
  return LLMFAST_TARGET::to_float(T{static_cast<uint16_t>(pair >> 16 * index)});
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  meet_warp(0xffffffffu, "mma.m16n8k16", mine, [](Operands* const* lanes) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = half_of<T>(lanes[lane]->a[i], half);
        for (int i = 0; i < 2; ++i) B[2 * t + 8 * i + half][g] = half_of<T>(lanes[lane]->b[i], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int m = lane / 4 + 8 * (i / 2), n = 2 * (lane % 4) + i % 2;
        float sum = lanes[lane]->d[i];
        for (int k = 0; k < 16; ++k) sum += A[m][k] * B[k][n];
        lanes[lane]->d[i] = sum;
      }
    }
    ++counters().mma;
  });
}

}  // namespace llmfast::emulated
