// AVX-512 (F, BW, VL, DQ, BF16) instructions as plain functions; immintrin.h beside this file gives them their usual
// names. Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. An access that would fault
// on the real machine for its alignment aborts with a message. Lanes above a narrower cast, undefined there, hold NaN
// here.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// A register type as a template argument loses its may_alias; nothing here looks at registers through other pointers.
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace llmfast::LLMFAST_TARGET::emulated {

inline void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "llmfast, emulated instruction: %s\n", what);
  abort();
}

// A register as an array: lanes<float>(v).at[i].
template <class T, class V>
struct Lanes {
  static constexpr int kCount = sizeof(V) / sizeof(T);
  alignas(sizeof(V)) T at[kCount];

  V vector() const {
    V v;
    __builtin_memcpy(&v, at, sizeof(V));
    return v;
  }
};
template <class T, class V>
inline Lanes<T, V> lanes(V v) {
  Lanes<T, V> r;
  __builtin_memcpy(r.at, &v, sizeof(V));
  return r;
}

// Halves, for what AVX2 does exactly as AVX-512.
template <class V>
struct HalfOf;
template <>
struct HalfOf<__m512> {
  using type = __m256;
};
template <>
struct HalfOf<__m512i> {
  using type = __m256i;
};
template <class V>
inline typename HalfOf<V>::type extract_half(V v, int index) {
  typename HalfOf<V>::type half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + 32 * index, 32);
  return half;
}
template <class V>
inline V insert_half(V v, typename HalfOf<V>::type half, int index) {
  __builtin_memcpy(reinterpret_cast<char*>(&v) + 32 * index, &half, 32);
  return v;
}
template <class V>
inline typename HalfOf<V>::type low_half(V v) {
  return extract_half(v, 0);
}
inline __m512 join(__m256 low, __m256 high) { return insert_half(insert_half(__m512{}, low, 0), high, 1); }
inline __m512i join(__m256i low, __m256i high) { return insert_half(insert_half(__m512i{}, low, 0), high, 1); }
inline __m512 zero_above(__m256 low) { return join(low, __m256{}); }
inline __m512i zero_above(__m256i low) { return join(low, __m256i{}); }
inline __m512 garbage_above(__m256 low) { return join(low, _mm256_castsi256_ps(_mm256_set1_epi32(-1))); }
inline __m512i garbage_above(__m256i low) { return join(low, _mm256_set1_epi32(-1)); }

// ---- constants and casts -------------------------------------------------------------------------------------------

inline __m512 setzero_ps() { return __m512{}; }
inline __m512i setzero_si512() { return __m512i{}; }
inline __m512 set1_ps(float x) { return __m512{} + x; }
inline __m512i set1_epi16(short x) { return (__m512i)(__v32hi{} + x); }
inline __m512i set1_epi32(int x) { return (__m512i)(__v16si{} + x); }
inline __m512i set1_epi64(long long x) { return __m512i{} + x; }

template <class T, class V, class... X>
inline V first_to_last(X... x) {
  static_assert(sizeof...(X) == sizeof(V) / sizeof(T));
  return Lanes<T, V>{{static_cast<T>(x)...}}.vector();
}
template <class T, class V, class... X>
inline V last_to_first(X... x) {
  const auto given = lanes<T>(first_to_last<T, V>(x...));
  Lanes<T, V> r;
  for (int i = 0; i < r.kCount; ++i) r.at[i] = given.at[r.kCount - 1 - i];
  return r.vector();
}
template <class... X>
inline __m512 setr_ps(X... x) {
  return first_to_last<float, __m512>(x...);
}
template <class... X>
inline __m512 set_ps(X... x) {
  return last_to_first<float, __m512>(x...);
}
template <class... X>
inline __m512i setr_epi32(X... x) {
  return first_to_last<int, __m512i>(x...);
}
template <class... X>
inline __m512i set_epi32(X... x) {
  return last_to_first<int, __m512i>(x...);
}
template <class... X>
inline __m512i set_epi16(X... x) {
  return last_to_first<short, __m512i>(x...);
}

inline __m512i castps_si512(__m512 a) { return (__m512i)a; }
inline __m512 castsi512_ps(__m512i a) { return (__m512)a; }

// ---- memory --------------------------------------------------------------------------------------------------------

template <class V>
inline V load_unaligned(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store_unaligned(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
inline void require_aligned(const void* p) {
  const bool aligned = reinterpret_cast<uintptr_t>(p) % 64 == 0;
  require(aligned, "aligned or streaming access to an address that is no multiple of 64");
}
template <class V>
inline V load_aligned(const void* p) {
  require_aligned(p);
  return load_unaligned<V>(p);
}
template <class V>
inline void store_aligned(void* p, V v) {
  require_aligned(p);
  store_unaligned(p, v);
}
// Lanes whose mask bit is clear are neither read nor written. Calls, for inlined they would be most of what is compiled.
template <class V, class T>
__attribute__((noinline)) V load_masked(uint32_t mask, const void* p) {
  Lanes<T, V> r;
  for (int i = 0; i < r.kCount; ++i) {
    r.at[i] = 0;
    if (mask >> i & 1) __builtin_memcpy(&r.at[i], static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  }
  return r.vector();
}
template <class T, class V>
__attribute__((noinline)) void store_masked(void* p, uint32_t mask, V v) {
  const auto from = lanes<T>(v);
  for (int i = 0; i < from.kCount; ++i)
    if (mask >> i & 1) __builtin_memcpy(static_cast<char*>(p) + i * sizeof(T), &from.at[i], sizeof(T));
}

// ---- float arithmetic ----------------------------------------------------------------------------------------------

template <class Op>
inline __m512 by_halves(const Op& op, __m512 a, __m512 b, __m512 c) {
  return join(op(extract_half(a, 0), extract_half(b, 0), extract_half(c, 0)),
              op(extract_half(a, 1), extract_half(b, 1), extract_half(c, 1)));
}
template <class Op>
inline __m512 by_lanes(const Op& op, __m512 a, __m512 b) {
  auto x = lanes<float>(a);
  const auto y = lanes<float>(b);
  for (int i = 0; i < 16; ++i) x.at[i] = op(x.at[i], y.at[i]);
  return x.vector();
}

inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
inline __m512 fmsub_ps(__m512 a, __m512 b, __m512 c) { return fmadd_ps(a, b, -c); }
inline __m512 fnmadd_ps(__m512 a, __m512 b, __m512 c) { return fmadd_ps(-a, b, c); }
inline __m512 fnmsub_ps(__m512 a, __m512 b, __m512 c) { return fmadd_ps(-a, b, -c); }
// Of two zeros, and if either is NaN, the second operand.
inline __m512 max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
inline __m512 min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
inline __m512 abs_ps(__m512 a) { return (__m512)((__v16si)a & 0x7fffffff); }
inline __m512 sqrt_ps(__m512 a) {
  return by_halves([](__m256 x, __m256, __m256) { return _mm256_sqrt_ps(x); }, a, a, a);
}
// Relative error up to 2^-14, as the instruction allows: the exact value, cut to 14 bits.
inline __m512 cut_to_14_bits(__m512 a) { return (__m512)((__v16si)a & static_cast<int>(0xfffffe00)); }
inline __m512 rcp14_ps(__m512 a) { return cut_to_14_bits(set1_ps(1) / a); }
inline __m512 rsqrt14_ps(__m512 a) { return cut_to_14_bits(set1_ps(1) / sqrt_ps(a)); }
// a * 2^floor(b), rounded once: in double the product is exact.
inline __m512 scalef_ps(__m512 a, __m512 b) {
  const auto scale = [](float x, float n) {
    if (x != x || n != n) return x + n;
    const int64_t exponent = static_cast<int64_t>(__builtin_floorf(n < -400 ? -400 : n > 400 ? 400 : n));
    const int64_t bits = (exponent + 1023) << 52;
    double power;
    __builtin_memcpy(&power, &bits, 8);
    return static_cast<float>(x * power);
  };
  return by_lanes(scale, a, b);
}
template <int kImm>
inline __m512 roundscale_ps(__m512 a) {
  static_assert(kImm >> 4 == 0, "only rounding to integers is emulated");
  return by_halves([](__m256 x, __m256, __m256) { return _mm256_round_ps(x, kImm); }, a, a, a);
}
// The halves, then the quarters, then pairs: the order that compilers emit.
template <class Op>
inline float reduce(__m512 a, const Op& op) {
  auto x = lanes<float>(a);
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) x.at[i] = op(x.at[i + width], x.at[i]);
  return x.at[0];
}
inline float reduce_add_ps(__m512 a) {
  return reduce(a, [](float x, float y) { return x + y; });
}
inline float reduce_max_ps(__m512 a) {
  return reduce(a, [](float x, float y) { return x > y ? x : y; });
}
inline float reduce_min_ps(__m512 a) {
  return reduce(a, [](float x, float y) { return x < y ? x : y; });
}

// ---- integer arithmetic --------------------------------------------------------------------------------------------

inline __m512i add_epi32(__m512i a, __m512i b) { return (__m512i)((__v16su)a + (__v16su)b); }
inline __m512i sub_epi32(__m512i a, __m512i b) { return (__m512i)((__v16su)a - (__v16su)b); }
inline __m512i mullo_epi32(__m512i a, __m512i b) { return (__m512i)((__v16su)a * (__v16su)b); }
inline __m512i max_epi32(__m512i a, __m512i b) {
  return (__m512i)((__v16si)a > (__v16si)b ? (__v16si)a : (__v16si)b);
}
inline __m512i min_epi32(__m512i a, __m512i b) {
  return (__m512i)((__v16si)a < (__v16si)b ? (__v16si)a : (__v16si)b);
}
inline __m512i slli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : (__m512i)((__v16su)a << n); }
inline __m512i srli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : (__m512i)((__v16su)a >> n); }
inline __m512i srai_epi32(__m512i a, unsigned n) { return (__m512i)((__v16si)a >> (n > 31 ? 31 : n)); }
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i xor_si512(__m512i a, __m512i b) { return a ^ b; }
inline __m512i andnot_si512(__m512i a, __m512i b) { return ~a & b; }

// ---- comparisons and masks -----------------------------------------------------------------------------------------

template <int kPredicate>
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  const auto half = [&](int i) {
    return _mm256_movemask_ps(_mm256_cmp_ps(extract_half(a, i), extract_half(b, i), kPredicate));
  };
  return static_cast<__mmask16>(half(0) | half(1) << 8);
}
inline __mmask16 cmp_epi32_mask(__m512i a, __m512i b, int predicate) {
  const auto x = lanes<int>(a), y = lanes<int>(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool equal = x.at[i] == y.at[i], less = x.at[i] < y.at[i];
    // 0 EQ, 1 LT, 2 LE, 3 FALSE; bit 2 negates.
    const bool plain[4] = {equal, less, less || equal, false};
    mask |= static_cast<unsigned>(plain[predicate & 3] != (predicate >> 2 & 1)) << i;
  }
  return static_cast<__mmask16>(mask);
}
// Lane i of b where mask bit i is set, else of a.
template <class V, class T>
inline V blend(uint32_t mask, V a, V b) {
  auto r = lanes<T>(a);
  const auto y = lanes<T>(b);
  for (int i = 0; i < r.kCount; ++i)
    if (mask >> i & 1) r.at[i] = y.at[i];
  return r.vector();
}

// ---- lanes moved about ---------------------------------------------------------------------------------------------

// Within each 128 bits: the low (kHigh = 0) or high halves of a and b, alternating.
template <class V, class T, int kHigh>
inline V unpack(V a, V b) {
  constexpr int kQuarter = 16 / sizeof(T);
  const auto x = lanes<T>(a), y = lanes<T>(b);
  Lanes<T, V> r;
  for (int q = 0; q < r.kCount; q += kQuarter)
    for (int i = 0; i < kQuarter / 2; ++i) {
      r.at[q + 2 * i] = x.at[q + kHigh * kQuarter / 2 + i];
      r.at[q + 2 * i + 1] = y.at[q + kHigh * kQuarter / 2 + i];
    }
  return r.vector();
}
// Within each 128 bits: two lanes of a, then two of b, two index bits each.
inline __m512 shuffle_ps(__m512 a, __m512 b, int imm) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  Lanes<float, __m512> r;
  for (int q = 0; q < 16; q += 4)
    for (int i = 0; i < 4; ++i) r.at[q + i] = (i < 2 ? x : y).at[q + (imm >> (2 * i) & 3)];
  return r.vector();
}
// Two quarters of a, then two of b, two index bits each.
template <class V>
inline V shuffle_quarters(V a, V b, int imm) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  Lanes<float, V> r;
  for (int i = 0; i < 4; ++i)
    __builtin_memcpy(r.at + 4 * i, (i < 2 ? x : y).at + 4 * (imm >> (2 * i) & 3), 16);
  return r.vector();
}
// The four dwords of a in each quarter; lanes that the mask leaves out keep those of `old`.
inline __m512i mask_broadcast_quarter(__m512i old, __mmask16 mask, __m128i a) {
  auto r = lanes<int>(old);
  int quarter[4];
  __builtin_memcpy(quarter, &a, 16);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) r.at[i] = quarter[i % 4];
  return r.vector();
}
inline __m512i broadcast_quarter(__m128i a) { return mask_broadcast_quarter(__m512i{}, 0xffff, a); }
// Index bits beyond a lane number are ignored.
template <class V, class T>
inline V permute(__m512i index, V a) {
  const auto from = lanes<T>(a);
  const auto position = lanes<T>(index);
  Lanes<T, V> r;
  for (int i = 0; i < r.kCount; ++i) r.at[i] = from.at[static_cast<int>(position.at[i]) & (r.kCount - 1)];
  return r.vector();
}
template <class V, class T>
inline V permute2(V a, __m512i index, V b) {
  const auto x = lanes<T>(a), y = lanes<T>(b);
  const auto position = lanes<T>(index);
  Lanes<T, V> r;
  for (int i = 0; i < r.kCount; ++i) {
    const int p = static_cast<int>(position.at[i]);
    r.at[i] = (p & r.kCount ? y : x).at[p & (r.kCount - 1)];
  }
  return r.vector();
}

// ---- conversions ---------------------------------------------------------------------------------------------------

inline __m512i cvtepu16_epi32(__m256i a) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
inline __m512i cvtepi8_epi32(__m128i a) {
  return join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}
inline __m256i cvtepi32_epi16(__m512i a) {
  const auto x = lanes<int>(a);
  Lanes<short, __m256i> r;
  for (int i = 0; i < 16; ++i) r.at[i] = static_cast<short>(x.at[i]);
  return r.vector();
}
inline __m512 cvtepi32_ps(__m512i a) { return __builtin_convertvector((__v16si)a, __v16sf); }
inline __m512i cvtps_epi32(__m512 a) {
  return join(_mm256_cvtps_epi32(extract_half(a, 0)), _mm256_cvtps_epi32(extract_half(a, 1)));
}
inline __m512 cvtph_ps(__m256i a) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
template <int kImm>
inline __m256i cvtps_ph(__m512 a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(extract_half(a, 1), kImm), _mm256_cvtps_ph(extract_half(a, 0), kImm));
}

// ---- AVX512_BF16: nearest even, denormals in and out are zero, MXCSR ignored ---------------------------------------

inline uint16_t to_bf16(float value) {
  uint32_t x;
  __builtin_memcpy(&x, &value, 4);
  const uint32_t exponent = x >> 23 & 0xff, fraction = x & 0x7fffff;
  if (exponent == 0) return static_cast<uint16_t>(x >> 16 & 0x8000);
  if (exponent == 0xff) return static_cast<uint16_t>(x >> 16 | (fraction ? 0x40 : 0));
  return static_cast<uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
}
inline __m256bh cvtneps_pbh(__m512 a) {
  const auto x = lanes<float>(a);
  Lanes<uint16_t, __m256bh> r;
  for (int i = 0; i < 16; ++i) r.at[i] = to_bf16(x.at[i]);
  return r.vector();
}
// Lanes of b go below those of a.
inline __m512bh cvtne2ps_pbh(__m512 a, __m512 b) {
  return (__m512bh)join((__m256i)cvtneps_pbh(b), (__m256i)cvtneps_pbh(a));
}
inline __m512 cvtpbh_ps(__m256bh a) { return (__m512)slli_epi32(cvtepu16_epi32((__m256i)a), 16); }

// Runs body with denormals as zero, in and out, rounding to nearest even.
constexpr unsigned kFlushToZero = 0x9fc0;
template <class Body>
inline void flushing_denormals(const Body& body) {
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(kFlushToZero);
  body();
  _mm_setcsr(saved);
}
// Out of line and through memory, so that no arithmetic moves out from between the writes of MXCSR.
__attribute__((noinline)) inline void dpbf16_into(__m512* sum, const __m512i* a, const __m512i* b) {
  const auto odd = [](__m512i v) { return (__m512)((__v16su)v & 0xffff0000u); };
  const auto even = [](__m512i v) { return (__m512)((__v16su)v << 16); };
  *sum = fmadd_ps(even(*a), even(*b), fmadd_ps(odd(*a), odd(*b), *sum));
}
inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const __m512i x = (__m512i)a, y = (__m512i)b;
  flushing_denormals([&] { dpbf16_into(&sum, &x, &y); });
  return sum;
}

}  // namespace llmfast::LLMFAST_TARGET::emulated
