// Products with up to kAcrossRows rows of A, where B's own rows are contiguous (weights stored [in, out], as GPT-2's
// are): no packing, no transpose. Each thread owns a stretch of columns whose sums stay in its L1 and adds up eight rows
// of B at a time, and reads the next eight ahead: eight short streams are more than hardware prefetchers follow. Memory-bound:
// B is read once.
#pragma once
#include "core/parallel.h"
#include "gemm/gather.h"

namespace llmfast::LLMFAST_TARGET {

constexpr int kAcrossRows = 8;
constexpr int kRowsAtOnce = 8;           // of B
constexpr int64_t kSumBytes = 16 << 10;  // of a thread's sums: half of L1

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// sums[m][j] += sum_r x[m][r] * b[r][j] for kR rows of B and one panel of `count` columns.
template <int kM, int kR, class T>
inline void add_rows(const float* x, int64_t ldx, const T* b, int64_t ldb, int64_t count, float* sums) {
  for (int64_t i = 0; kReadsAhead<T> && i < count; i += static_cast<int64_t>(64 / sizeof(T)))
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) __builtin_prefetch(b + (kR + r) * ldb + i, 0, 2);
  for_each_vec(count, [&](int64_t i, auto lanes) {
    Vec acc[kM];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) acc[m] = Vec::load(sums + m * Kernel::kCols + i);
    const auto add_row = [&](int r) __attribute__((always_inline)) {
      const Vec weights = lanes.load(b + r * ldb + i);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) acc[m] = fma(Vec::set(x[m * ldx + r]), weights, acc[m]);
    };
    if constexpr (lanes.kAll) {
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) add_row(r);
    } else {  // B's last columns, at most one register: not worth eight times the code
#pragma GCC unroll 1
      for (int r = 0; r < kR; ++r) add_row(r);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) acc[m].store(sums + m * Kernel::kCols + i);
  });
}

template <int kM, class T>
void few_rows_across(const float* x, const T* b, int64_t ldb, GemmSize size, EpilogueRef epilogue) {
  constexpr int64_t kPanel = Kernel::kCols, kMost = kSumBytes / (kM * kPanel * 4);
  const auto width = [&](int64_t panel) { return size.N - panel * kPanel < kPanel ? size.N - panel * kPanel : kPanel; };
  const int64_t panels = (size.N + kPanel - 1) / kPanel;
  parallel_for(panels, 1 + (int64_t{1} << 15) / (kPanel * size.K), [&](int64_t first, int64_t last) {
    alignas(64) float sums[kMost * kM * kPanel];
    for (int64_t begin = first; begin < last; begin += kMost) {
      const int64_t end = begin + kMost < last ? begin + kMost : last;
      const auto add = [&](int64_t k, auto rows) {
        for (int64_t p = begin; p < end; ++p)
          add_rows<kM, decltype(rows)::value>(x + k, size.K, b + k * ldb + p * kPanel, ldb, width(p),
                                              sums + (p - begin) * kM * kPanel);
      };
      for (int64_t i = 0; i < (end - begin) * kM * kPanel; i += Vec::kLanes) Vec::zero().store(sums + i);
      int64_t k = 0;
      for (; k + kRowsAtOnce <= size.K; k += kRowsAtOnce) add(k, Constant<kRowsAtOnce>{});
      for (; k < size.K; ++k) add(k, Constant<1>{});
      for (int64_t p = begin; p < end; ++p)
        epilogue(sums + (p - begin) * kM * kPanel, 0, p * kPanel, kM, width(p));
    }
  });
}

template <class T>
void few_rows_across(const float* x, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  const T* data = static_cast<const T*>(b.data);
  switch (size.M) {
    case 1: return few_rows_across<1>(x, data, b.row_stride, size, epilogue);
    case 2: return few_rows_across<2>(x, data, b.row_stride, size, epilogue);
    case 3: return few_rows_across<3>(x, data, b.row_stride, size, epilogue);
    case 4: return few_rows_across<4>(x, data, b.row_stride, size, epilogue);
    case 5: return few_rows_across<5>(x, data, b.row_stride, size, epilogue);
    case 6: return few_rows_across<6>(x, data, b.row_stride, size, epilogue);
    case 7: return few_rows_across<7>(x, data, b.row_stride, size, epilogue);
    case 8: return few_rows_across<8>(x, data, b.row_stride, size, epilogue);
  }
}

inline void gemm_few_rows_across(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  const float* x = gather_rows(a, size);
  switch (b.dtype) {
    case DType::bf16: return few_rows_across<bf16>(x, b, size, epilogue);
    case DType::f16: return few_rows_across<fp16>(x, b, size, epilogue);
    default: return few_rows_across<float>(x, b, size, epilogue);
  }
}

}  // namespace llmfast::LLMFAST_TARGET
