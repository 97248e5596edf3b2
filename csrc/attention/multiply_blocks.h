// Products of 32 x 32 blocks, the only step of the bf16 kernels that depends on the target:
//
//   multiply_blocks<Sum>(c, a, b, depth, work, share)   c = (c +) sum over i < depth of a[i] b[i]; meanwhile, or then,
//                                                       depth * share units of vector work
//   BlockState                                          RAII, one a thread and item that multiplies (AMX: tile configuration)
#pragma once
#include "simd/bf16_blocks.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

enum class Sum { fresh, continued };

// Vector work that is cut into units and done between products: step(n) does the next n units, or what is left.
struct NoWork {
  void step(int64_t) {}
};

// A sequence of operand blocks, `step` elements apart.
struct Blocks {
  const bf16* first;
  int64_t step;
};

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET

#if defined(LLMFAST_TARGET_AMX)
#include "attention/multiply_blocks_amx.h"
#else
#include "attention/multiply_blocks_dot.h"
#endif
