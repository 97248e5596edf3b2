// Vec for any machine: four lanes through the compiler's vector extension (SSE2 on x86-64, NEON on ARM).
// Vocabulary: see vec.h.
#pragma once
#include <cmath>

#include "simd/scalar.h"

namespace llmfast::LLMFAST_TARGET {

struct Mask {
  typedef int32_t Reg __attribute__((vector_size(16)));
  Reg m;
};

struct Vec {
  typedef float Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  Reg v;

  static Vec zero() { return {Reg{0, 0, 0, 0}}; }
  static Vec set(float x) { return {Reg{x, x, x, x}}; }
  static Vec iota() { return {Reg{0, 1, 2, 3}}; }
  template <class T>
  static Vec load(const T* p) {
    return {Reg{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <class T>
  static Vec load_n(const T* p, int64_t n) {
    Vec r = zero();
    for (int64_t i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(v[i]);
  }
  template <class T>
  void store_n(T* p, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
  }
  template <class T>
  void stream(T* p) const {
    store(p);
  }
};

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec abs(Vec a) { return {a.v < 0 ? -a.v : a.v}; }
inline Vec sqrt(Vec a) {
  for (int i = 0; i < Vec::kLanes; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
// Adding 1.5 * 2^23 leaves no fraction bits; good for |a| < 2^22, which is all that exponents need.
inline Vec round_even(Vec a) {
  const Vec magic = Vec::set(12582912.0f);
  Vec shifted = a + magic;
  __asm__ volatile("" : "+m"(shifted));  // or the compiler may fold the pair away
  return shifted - magic;
}
inline Vec scale_exp2(Vec a, Vec n) {
  typedef int32_t Int __attribute__((vector_size(16)));
  const Int bits = (__builtin_convertvector(n.v, Int) + 127) << 23;
  return {a.v * (Vec::Reg)bits};  // between vector types, this cast keeps the bits
}
inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}
inline Vec sum_each(const Vec (&r)[Vec::kLanes]) {
  Vec sums;
  for (int i = 0; i < Vec::kLanes; ++i) sums.v[i] = reduce_add(r[i]);
  return sums;
}
inline void transpose(Vec (&r)[Vec::kLanes]) {
  for (int i = 0; i < Vec::kLanes; ++i)
    for (int j = i + 1; j < Vec::kLanes; ++j) {
      const float held = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = held;
    }
}
inline Mask gt(Vec a, Vec b) { return {a.v > b.v}; }
inline Mask ge(Vec a, Vec b) { return {a.v >= b.v}; }
inline Mask lt(Vec a, Vec b) { return {a.v < b.v}; }
inline Mask le(Vec a, Vec b) { return {a.v <= b.v}; }
inline Mask eq(Vec a, Vec b) { return {a.v == b.v}; }
inline Mask both(Mask a, Mask b) { return {a.m & b.m}; }
inline bool any(Mask a) { return (a.m[0] | a.m[1] | a.m[2] | a.m[3]) != 0; }
inline bool all(Mask a) { return (a.m[0] & a.m[1] & a.m[2] & a.m[3]) != 0; }
inline Vec select(Mask m, Vec a, Vec b) { return {m.m ? a.v : b.v}; }

}  // namespace llmfast::LLMFAST_TARGET
