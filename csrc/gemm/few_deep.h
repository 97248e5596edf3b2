// Products of depth up to kFewDeep (a weight's gradient from a token or two) where B's own rows are contiguous: C is all that
// counts, and is written row by row, as memory likes it, straight from B's rows.
#pragma once
#include "core/parallel.h"
#include "gemm/product.h"

namespace llmfast::LLMFAST_TARGET {

constexpr int kFewDeep = 4;

inline float value_at(MatrixRef a, int64_t m, int64_t k) {
  float value;
  visit_float(a.dtype, [&](auto type) { value = to_float(*static_cast<const decltype(type)*>(a.offset(m, k).data)); });
  return value;
}

template <int kK, class T>
void few_deep(MatrixRef a, const T* b, int64_t ldb, GemmSize size, EpilogueRef epilogue) {
  const PlainOutput plain = epilogue.plain();
  parallel_for(size.M, 1 + (int64_t{1} << 15) / size.N, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      Vec scale[kK];
#pragma GCC unroll 4
      for (int k = 0; k < kK; ++k) scale[k] = Vec::set(value_at(a, m, k));
      const auto values = [&](int64_t n, auto lanes) {
        Vec sum = scale[0] * lanes.load(b + n);
#pragma GCC unroll 4
        for (int k = 1; k < kK; ++k) sum = fma(scale[k], lanes.load(b + k * ldb + n), sum);
        return sum;
      };
      if (plain.c) {
        for_each_vec(size.N, [&](int64_t n, auto lanes) {
          const Vec sum = values(n, lanes);
          lanes.store(plain.bias ? sum + lanes.load(plain.bias + n) : sum, plain.c + m * plain.ldc + n);
        });
        continue;
      }
      for (int64_t n = 0; n < size.N; n += Kernel::kCols) {
        alignas(64) float acc[Kernel::kCols];
        const int64_t count = size.N - n < Kernel::kCols ? size.N - n : Kernel::kCols;
        for_each_vec(count, [&](int64_t i, auto lanes) { values(n + i, lanes).store(acc + i); });
        epilogue(acc, m, n, 1, count);
      }
    }
  });
}

template <class T>
void few_deep(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  const T* data = static_cast<const T*>(b.data);
  switch (size.K) {
    case 1: return few_deep<1>(a, data, b.row_stride, size, epilogue);
    case 2: return few_deep<2>(a, data, b.row_stride, size, epilogue);
    case 3: return few_deep<3>(a, data, b.row_stride, size, epilogue);
    case 4: return few_deep<4>(a, data, b.row_stride, size, epilogue);
  }
}

inline void gemm_few_deep(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  switch (b.dtype) {
    case DType::bf16: return few_deep<bf16>(a, b, size, epilogue);
    case DType::f16: return few_deep<fp16>(a, b, size, epilogue);
    default: return few_deep<float>(a, b, size, epilogue);
  }
}

}  // namespace llmfast::LLMFAST_TARGET
