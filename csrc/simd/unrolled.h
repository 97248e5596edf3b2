// Long walks: four registers a step, and sums in four registers, so that additions need not wait for each other.
#pragma once
#include "gemm/epilogue.h"

namespace llmfast::LLMFAST_TARGET {

struct FourSums {
  Vec part[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  float total() const { return reduce_add((part[0] + part[1]) + (part[2] + part[3])); }
};

// body(i, lanes, u) for each register of [0, count); u = 0..3 says which of four accumulators to use.
template <class Body>
inline __attribute__((always_inline)) void for_each_vec_of_four(int64_t count, const Body& body) {
  constexpr int64_t kLanes = Vec::kLanes;
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    body(i, AllLanes{}, 0);
    body(i + kLanes, AllLanes{}, 1);
    body(i + 2 * kLanes, AllLanes{}, 2);
    body(i + 3 * kLanes, AllLanes{}, 3);
  }
  for (; i + kLanes <= count; i += kLanes) body(i, AllLanes{}, 0);
  if (i < count) body(i, FirstLanes{count - i}, 0);
}

// Lanes beyond the walk's end become zero.
inline Vec keep(Vec v, AllLanes) { return v; }
inline Vec keep(Vec v, FirstLanes lanes) {
  return select(lt(Vec::iota(), Vec::set(static_cast<float>(lanes.n))), v, Vec::zero());
}

inline int64_t round_up_to_lanes(int64_t count) { return (count + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes; }

}  // namespace llmfast::LLMFAST_TARGET
