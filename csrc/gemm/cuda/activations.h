// The FFN nonlinearities and their slopes in float32, by name at run time: the choice is made once for eight columns.
// The formulas are those of simd/activations.h.
#pragma once
#include "ptx/cuda.h"
#include "ptx/math.h"

namespace llmfast {
enum class Activation : int { gelu, gelu_tanh, relu, relu2, silu };
}

namespace llmfast::cuda {

struct ValueAndSlope {
  float value, slope;
};

__device__ inline float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-1.44269504f * x)); }

// phi(x) = (1 + erf(x / sqrt 2)) / 2 by Abramowitz and Stegun 7.1.26, absolute error 1e-7: its factor exp(-x^2 / 2) is the
// density's too, and it takes half the instructions of erff.
struct Gelu {
  __device__ static ValueAndSlope both_of(float x) {
    const float t = reciprocal_approx(fmaf(fabsf(x), 0.3275911f * 0.70710678f, 1.0f));
    const float bell = exp2_approx(x * x * (-0.5f * 1.44269504f));
    float p = 0.5f * 1.061405429f;
    p = fmaf(p, t, 0.5f * -1.453152027f);
    p = fmaf(p, t, 0.5f * 1.421413741f);
    p = fmaf(p, t, 0.5f * -0.284496736f);
    p = fmaf(p, t, 0.5f * 0.254829592f);
    const float tail = p * t * bell, phi = x < 0.0f ? tail : 1.0f - tail;
    return {x * phi, fmaf(x * 0.39894228f, bell, phi)};
  }
};

// x/2 (1 + tanh u) = x sigmoid(2u),  u = sqrt(2/pi) (x + 0.044715 x^3)
struct GeluTanh {
  __device__ static ValueAndSlope both_of(float x) {
    constexpr float kTwoC = 1.5957691216f, kCubic = 0.044715f;
    const float s = sigmoid(x * fmaf(x * x, kCubic * kTwoC, kTwoC));
    const float two_u_slope = fmaf(x * x, 3 * kCubic * kTwoC, kTwoC);
    return {x * s, fmaf(x * two_u_slope, fmaf(-s, s, s), s)};
  }
};

struct Relu {
  // A value of NaN stays.
  __device__ static ValueAndSlope both_of(float x) { return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f}; }
};

struct Relu2 {
  __device__ static ValueAndSlope both_of(float x) {
    const float r = Relu::both_of(x).value;
    return {r * r, r + r};
  }
};

struct Silu {
  __device__ static ValueAndSlope both_of(float x) {
    const float s = sigmoid(x);
    return {x * s, fmaf(x, fmaf(-s, s, s), s)};
  }
};

// What an epilogue with long code per element is compiled for: one activation, or either of the short ones. Code for all
// of them is five times as long, and the instruction caches do not hold it.
// `chosen` is true, which the compiler does not know: so it does not mingle two visits, for which registers are short.
template <class A>
struct OneActivation {
  bool chosen = true;
  template <class Body>
  __device__ __forceinline__ void visit(const Body& body) const {
    if (chosen) body(A{});
  }
};
struct ReluActivation {
  bool squared;
  template <class Body>
  __device__ __forceinline__ void visit(const Body& body) const {
    if (squared) body(Relu2{});
    else body(Relu{});
  }
};

// body(which of those `activation` is), on the host.
template <class Body>
inline void choose_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::gelu: return body(OneActivation<Gelu>{});
    case Activation::gelu_tanh: return body(OneActivation<GeluTanh>{});
    case Activation::silu: return body(OneActivation<Silu>{});
    case Activation::relu: return body(ReluActivation{false});
    case Activation::relu2: return body(ReluActivation{true});
  }
}

template <class Body>
__device__ inline void visit_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::gelu: return body(Gelu{});
    case Activation::gelu_tanh: return body(GeluTanh{});
    case Activation::relu: return body(Relu{});
    case Activation::relu2: return body(Relu2{});
    case Activation::silu: return body(Silu{});
  }
}

}  // namespace llmfast::cuda
