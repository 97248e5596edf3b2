// Reading the next panel of an unpacked B while the one before it is packed or multiplied: packing alone waits for memory,
// multiplying alone leaves it idle. Measured (2-core Zen 5, one thread, bf16, M=128 K=768 N=3072): 2.21 -> 1.61 ms.
#pragma once
#include "gemm/gemm.h"

namespace llmfast::LLMFAST_TARGET {

// The lines of `cols` columns of B[K,...] from column 0 on, to be prefetched into L2 a few at a time. One of B's strides is 1.
class ReadAhead {
 public:
  ReadAhead() = default;  // of nothing
  ReadAhead(MatrixRef b, int64_t cols, int64_t K) {
    const bool by_columns = b.row_stride == 1;
    const int64_t lines = ((by_columns ? K : cols) * size_of(b.dtype) + kLine - 1) / kLine;
    run_ = line_ = static_cast<const char*>(b.data);
    end_ = run_ + lines * kLine;
    stride_ = (by_columns ? b.col_stride : b.row_stride) * size_of(b.dtype);
    left_ = lines * (by_columns ? cols : K);
  }

  int64_t left() const { return left_; }

  // The next `count` lines. Inlined always: gcc 12 drops calls of a function that only prefetches, as without effects.
  __attribute__((always_inline)) void step(int64_t count) {
    if (count > left_) count = left_;
    left_ -= count;
    for (; count > 0; --count) {
      __builtin_prefetch(line_, 0, 2);
      line_ += kLine;
      if (line_ != end_) continue;
      line_ = run_ += stride_;
      end_ += stride_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *run_ = nullptr, *line_ = nullptr, *end_ = nullptr;  // a contiguous run, the next line in it
  int64_t stride_ = 0, left_ = 0;
};

}  // namespace llmfast::LLMFAST_TARGET
