// The FFN nonlinearities and their slopes, by name at run time: visit_activation hands the body a functor, so the choice
// is made once a row, not once a lane.
#pragma once
#include "simd/math.h"

namespace llmfast {
enum class Activation : int { gelu, gelu_tanh, relu, relu2, silu };
}

namespace llmfast::LLMFAST_TARGET {

struct ValueAndSlope {
  Vec value, slope;
};

// x * Phi(x)
struct Gelu {
  static Vec value(Vec x) { return both_of(x).value; }
  static ValueAndSlope both_of(Vec x) {
    const Vec half = Vec::set(0.5f);
    const Vec bell = exp(x * x * Vec::set(-0.5f));  // for the distribution and for its density
    const Vec phi = fma(half, erf(x * Vec::set(0.70710678f), bell), half);
    const Vec density = Vec::set(0.39894228f) * bell;
    return {x * phi, fma(x, density, phi)};
  }
};

// x/2 (1 + tanh u) = x sigmoid(2u),  u = sqrt(2/pi) (x + 0.044715 x^3)
struct GeluTanh {
  static constexpr float kTwoC = 1.5957691216f, kCubic = 0.044715f;
  static Vec value(Vec x) { return x * gate(x); }
  static ValueAndSlope both_of(Vec x) {
    const Vec s = gate(x);
    const Vec two_u_slope = fma(x * x, Vec::set(3 * kCubic * kTwoC), Vec::set(kTwoC));
    return {x * s, fma(x * two_u_slope, fnma(s, s, s), s)};
  }

 private:
  static Vec gate(Vec x) { return sigmoid(x * fma(x * x, Vec::set(kCubic * kTwoC), Vec::set(kTwoC))); }
};

struct Relu {
  static Vec value(Vec x) { return max(Vec::zero(), x); }  // keeps NaN
  static ValueAndSlope both_of(Vec x) {
    return {value(x), select(gt(x, Vec::zero()), Vec::set(1.0f), Vec::zero())};
  }
};

struct Relu2 {
  static Vec value(Vec x) { return Relu::value(x) * Relu::value(x); }
  static ValueAndSlope both_of(Vec x) { return {value(x), Relu::value(x) + Relu::value(x)}; }
};

// x * sigmoid(x)
struct Silu {
  static Vec value(Vec x) { return x * sigmoid(x); }
  static ValueAndSlope both_of(Vec x) {
    const Vec s = sigmoid(x);
    return {x * s, fma(x, fnma(s, s, s), s)};
  }
};

template <class Body>
inline void visit_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::gelu: return body(Gelu{});
    case Activation::gelu_tanh: return body(GeluTanh{});
    case Activation::relu: return body(Relu{});
    case Activation::relu2: return body(Relu2{});
    case Activation::silu: return body(Silu{});
  }
}

}  // namespace llmfast::LLMFAST_TARGET
