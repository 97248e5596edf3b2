// What products with few rows of A share: A's rows side by side, and reading B ahead.
#pragma once
#include "core/workspace.h"
#include "gemm/product.h"

namespace llmfast::LLMFAST_TARGET {

// Into L2: prefetching into L1 takes the few buffers that loads need. 1.1 to 1.4 times as fast (Zen 4, weights from memory) as
// 1 KiB ahead into L1; 2 KiB ahead is up to a sixth slower.
constexpr int64_t kAhead = 4096;  // bytes

// Zen 3's own prefetchers keep up with float32: its weights come up to 1.2 times as fast from memory, 1.5 times from L3, without.
template <class T>
constexpr bool kReadsAhead = Vec::kRegisters == 32 || sizeof(T) == 2;

template <class T>
inline __attribute__((always_inline)) void prefetch_ahead(const T* p, int64_t count) {
  if (!kReadsAhead<T>) return;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(reinterpret_cast<const char*>(p + i) + kAhead, 0, 2);
}

// Rows of A as contiguous float32.
template <class T>
void gather_rows(float* x, const T* a, const MatrixRef& layout, GemmSize size) {
  for (int64_t m = 0; m < size.M; ++m) {
    const T* row = a + m * layout.row_stride;
    float* out = x + m * size.K;
    if (layout.col_stride == 1) {
      for_each_vec(size.K, [&](int64_t k, auto lanes) { lanes.store(lanes.load(row + k), out + k); });
    } else {
      for (int64_t k = 0; k < size.K; ++k) out[k] = to_float(row[k * layout.col_stride]);
    }
  }
}

inline const float* gather_rows(const MatrixRef& a, GemmSize size) {
  float* x = workspace<float>(Slot::packed_a, size.M * size.K);
  switch (a.dtype) {
    case DType::bf16: gather_rows(x, static_cast<const bf16*>(a.data), a, size); break;
    case DType::f16: gather_rows(x, static_cast<const fp16*>(a.data), a, size); break;
    default: gather_rows(x, static_cast<const float*>(a.data), a, size);
  }
  return x;
}

}  // namespace llmfast::LLMFAST_TARGET
