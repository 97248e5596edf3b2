// rotary: rotates pairs (x[j], x[j + R/2]), j < R/2, of each head by the angle of its position (half-split convention):
//   out[j]       = x[j] * cos[j] - x[j + R/2] * sin[j]
//   out[j + R/2] = x[j + R/2] * cos[j] + x[j] * sin[j]          inverse: with -sin, which is also the gradient
//   out[R..D)    = x[R..D)
// x, out: [B,H,T,D], any strides with contiguous D, one dtype. cos, sin: [T,R/2] or [B or 1,T,R/2], contiguous rows, of
// any floating dtype.
#pragma once
#include "core/dispatch.h"
#include "core/types.h"

namespace llmfast {

struct RotaryParams {
  TensorView out, x, cos, sin;
  bool inverse;
};

void rotary(const RotaryParams& params);

}  // namespace llmfast

LLMFAST_DECLARE_VEC(void rotary(const RotaryParams&))
