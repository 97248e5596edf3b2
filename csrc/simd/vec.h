// The vector vocabulary: `Vec`, one register of float lanes, and `Mask`, one boolean a lane. Kernels of `_vec.cpp`,
// `_round.cpp`, `_mm.cpp` and `_bf16.cpp` files are written against these names alone and are compiled once for each
// target, in its own namespace.
//
//   Vec::zero() Vec::set(x) Vec::iota()            constants; iota = 0, 1, 2, ...
//   Vec::load(p) Vec::load_n(p, n)                 p: float, bf16 or fp16; lanes >= n are zero and not read
//   v.store(p) v.store_n(p, n) v.stream(p)         rounds to nearest even; stream: around the caches, p register-aligned
//   + - * /  fma(a, b, c) = a*b + c  fnma(a, b, c) = c - a*b
//   max min abs sqrt round_even                    max/min return the second operand if either is NaN
//   scale_exp2(a, n) = a * 2^n for integral n in [-126, 127]
//   reduce_add reduce_max
//   sum_each(r)                                  r[kLanes]: lane i of the result is the sum of r[i]'s lanes
//   transpose(r)                                 r[kLanes], in place: lane j of r[i] <-> lane i of r[j]
//   gt ge lt le eq -> Mask   both(m, n)   any(m)   all(m)   select(m, a, b) = m ? a : b
//
// Index arithmetic is done in float lanes: exact below 2^24.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/types.h"

#ifndef LLMFAST_TARGET
#error "simd/vec.h is for files that are compiled for a target (suffix _vec, _round, _mm or _bf16); see setup.py"
#endif

#if defined(__AVX512F__) || (defined(LLMFAST_WIDTH) && LLMFAST_WIDTH == 512)
#include "simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "simd/vec_avx2.h"
#else
#include "simd/vec_portable.h"
#endif
