// bf16 and fp16 <-> float, one value at a time, for tails and portable code. Rounds to nearest even; NaN stays NaN.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace llmfast::LLMFAST_TARGET {

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  float value;
  if (magnitude < 0x0400) {  // zero and subnormals: multiples of 2^-24
    value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const uint32_t rebias = magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u;  // infinities and NaN keep exponent 255
  const uint32_t bits = sign | ((magnitude << 13) + rebias);
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline fp16 from_float<fp16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or beyond
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 aligns the subnormal to the low bits, rounding once
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    uint32_t shifted_bits;
    std::memcpy(&shifted_bits, &shifted, 4);
    result = shifted_bits - 0x3f000000;
  } else {
    result = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

}  // namespace llmfast::LLMFAST_TARGET
