// Elementary functions on Vec, each once for all targets. Errors are against the exact function, over all floats.
#pragma once
#include "simd/vec.h"

namespace llmfast::LLMFAST_TARGET {

// 2^x. Relative error <= 3e-7; NaN stays NaN. x is clamped to [-126, 127], so that no denormal (a microcode assist each)
// arises: -inf gives 2^-126, not 0, and a softmax must zero its masked entries itself.
inline Vec exp2(Vec x) {
  x = min(Vec::set(127.0f), max(Vec::set(-126.0f), x));  // this operand order keeps NaN
  const Vec n = round_even(x), f = x - n;
  Vec p = Vec::set(1.5403530e-4f);
  p = fma(p, f, Vec::set(1.3333558e-3f));
  p = fma(p, f, Vec::set(9.6181291e-3f));
  p = fma(p, f, Vec::set(5.5504109e-2f));
  p = fma(p, f, Vec::set(2.4022651e-1f));
  p = fma(p, f, Vec::set(6.9314718e-1f));
  p = fma(p, f, Vec::set(1.0f));
  return scale_exp2(p, n);
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

inline Vec exp(Vec x) { return exp2(x * Vec::set(kLog2E)); }

inline Vec sigmoid(Vec x) { return Vec::set(1.0f) / (Vec::set(1.0f) + exp(Vec::zero() - x)); }

// erf(x), given exp(-x^2), by Abramowitz & Stegun 7.1.26: absolute error <= 1.5e-7.
inline Vec erf(Vec x, Vec exp_of_minus_square) {
  const Vec a = abs(x), one = Vec::set(1.0f);
  const Vec t = one / fma(Vec::set(0.3275911f), a, one);
  Vec p = Vec::set(1.061405429f);
  p = fma(p, t, Vec::set(-1.453152027f));
  p = fma(p, t, Vec::set(1.421413741f));
  p = fma(p, t, Vec::set(-0.284496736f));
  p = fma(p, t, Vec::set(0.254829592f));
  const Vec tail = p * t * exp_of_minus_square;
  const Vec magnitude = one - tail;
  return select(lt(x, Vec::zero()), Vec::zero() - magnitude, magnitude);
}

}  // namespace llmfast::LLMFAST_TARGET
