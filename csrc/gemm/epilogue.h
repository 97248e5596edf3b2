// What becomes of a finished tile. An epilogue has `void row(const float* acc, int64_t m, int64_t n, int64_t count)`:
// `count` accumulated values of row m of C from column n on, `count` <= Kernel::kCols and smaller only at C's edge; acc
// has room for whole registers beyond count. Each (m, n) comes exactly once; rows of different threads never meet.
#pragma once
#include "simd/vec.h"

namespace llmfast::LLMFAST_TARGET {

// Lanes of a register that are really there: all of them (known when compiling), or the first n.
struct AllLanes {
  static constexpr bool kAll = true;
  template <class T>
  Vec load(const T* p) const {
    return Vec::load(p);
  }
  template <class T>
  void store(Vec v, T* p) const {
    v.store(p);
  }
};
struct FirstLanes {
  static constexpr bool kAll = false;
  int64_t n;
  template <class T>
  Vec load(const T* p) const {
    return Vec::load_n(p, n);
  }
  template <class T>
  void store(Vec v, T* p) const {
    v.store_n(p, n);
  }
};

// body(i, lanes) for each register of [0, count): i is its first element.
template <class Body>
inline void for_each_vec(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) body(i, AllLanes{});
  if (i < count) body(i, FirstLanes{count - i});
}

// C = acc + bias, rounded to T.
template <class T>
struct StoreEpilogue {
  T* c;
  int64_t ldc;
  const float* bias;  // or nullptr

  void row(const float* acc, int64_t m, int64_t n, int64_t count) const {
    T* out = c + m * ldc + n;
    for_each_vec(count, [&](int64_t i, auto lanes) {
      Vec x = Vec::load(acc + i);
      if (bias) x = x + lanes.load(bias + n + i);
      lanes.store(x, out + i);
    });
  }
};

// C itself, where an epilogue does no more than store float32, and what it adds to each row, if anything; else nullptr.
struct PlainOutput {
  float* c = nullptr;
  int64_t ldc = 0;
  const float* bias = nullptr;
};
template <class Epilogue>
PlainOutput plain_output(const Epilogue&) {
  return {};
}
inline PlainOutput plain_output(const StoreEpilogue<float>& epilogue) {
  return {epilogue.c, epilogue.ldc, epilogue.bias};
}

// C = acc + addend, rounded to T: the second of two products with one sum.
template <class T>
struct AddStoreEpilogue {
  T* c;
  int64_t ldc;
  const float* addend;
  int64_t ld_addend;

  void row(const float* acc, int64_t m, int64_t n, int64_t count) const {
    for_each_vec(count, [&](int64_t i, auto lanes) {
      lanes.store(Vec::load(acc + i) + lanes.load(addend + m * ld_addend + n + i), c + m * ldc + n + i);
    });
  }
};

// C += acc in float32: for products summed over several calls.
struct AccumulateEpilogue {
  float* c;
  int64_t ldc;

  void row(const float* acc, int64_t m, int64_t n, int64_t count) const {
    float* out = c + m * ldc + n;
    for_each_vec(count, [&](int64_t i, auto lanes) { lanes.store(Vec::load(acc + i) + lanes.load(out + i), out + i); });
  }
};

}  // namespace llmfast::LLMFAST_TARGET
