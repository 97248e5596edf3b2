// What norm kernels are compiled for: rows of x and its gradient, of the stream (residual, summed and theirs), of normed
// and its gradient, and weights.
//
// Code for one dtype without tails is a quarter as long as that for all (forward, three groups a lane: 1,112 and 4,640
// instructions, which the instruction caches do not hold). Measured, H200, 2026-11-28, bf16 beside a float32 stream, ms:
// forward 65536 x 768 0.225 with code for all, 0.172 with its own, 0.155 with a thread's quads apart besides; with
// backward 0.518, 0.451, 0.361.
#pragma once
#include <initializer_list>

#include "core/cuda_elements.h"

namespace llmfast::cuda {
namespace {

struct AnyKinds {
  using X = AnyRows;
  using Stream = AnyRows;
  using Normed = AnyRows;
  using Weights = AnyRows;
  static constexpr bool kApart = false;
};
template <DType kX, DType kStream, DType kNormed = kX>
struct TypedKinds {
  using X = TypedRows<kX>;
  using Stream = TypedRows<kStream>;
  using Normed = TypedRows<kNormed>;
  using Weights = AlignedRows;
  static constexpr bool kApart = kStream == DType::f32;  // Columns in core/cuda_elements.h
};

using RowSets = std::initializer_list<const RowSet*>;
template <class R>
bool all_hold(RowSets sets) {
  for (const RowSet* rows : sets)
    if (!R::hold(*rows)) return false;
  return true;
}

// body(kinds) of the first kinds that hold.
template <class Body>
void visit_kinds(const RowSet& x, RowSets streams, const RowSet& normed, RowSets weights, const Body& body) {
  bool found = false;
  const auto attempt = [&](auto kinds) {
    using K = decltype(kinds);
    if (found || !K::X::hold(x) || !K::Normed::hold(normed) || !all_hold<typename K::Stream>(streams) ||
        !all_hold<typename K::Weights>(weights))
      return;
    found = true;
    body(kinds);
  };
  constexpr DType kF32 = DType::f32, kBf16 = DType::bf16, kF16 = DType::f16;
  attempt(TypedKinds<kBf16, kBf16>{});
  attempt(TypedKinds<kBf16, kF32>{});
  attempt(TypedKinds<kBf16, kF32, kF32>{});  // under autocast
  attempt(TypedKinds<kF32, kF32, kBf16>{});  // a model's first
  attempt(TypedKinds<kF16, kF16>{});
  attempt(TypedKinds<kF16, kF32>{});
  attempt(TypedKinds<kF32, kF32>{});
  attempt(AnyKinds{});
}

}  // namespace
}  // namespace llmfast::cuda
