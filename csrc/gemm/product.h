// Products on the GEMM core, for ops: what gemm_mm.cpp compiles once for each target. The idea is told in gemm.h.
#pragma once
#include "core/parallel.h"
#include "core/workspace.h"
#include "gemm/epilogue.h"
#include "gemm/gemm.h"
#include "gemm/kernel.h"

namespace llmfast::LLMFAST_TARGET {

// A reference to an epilogue of any type (see epilogue.h), valid during the call that takes it. Products call it through
// a pointer, a few rows at a time, so that they need not be compiled anew for each op and dtype.
class EpilogueRef {
 public:
  template <class Epilogue>
  EpilogueRef(const Epilogue& epilogue)  // implicit, as a function_ref
      : self_(&epilogue), rows_(&call<Epilogue>), plain_(plain_output(epilogue)) {}

  // Rows [m, m + rows) and columns [n, n + cols) of C, from acc with kCols values a row.
  void operator()(const float* acc, int64_t m, int64_t n, int64_t rows, int64_t cols) const {
    rows_(self_, acc, m, n, rows, cols);
  }

  // Where finished float32 values may be stored as they are, if that is all the epilogue does.
  const PlainOutput& plain() const { return plain_; }

 private:
  template <class Epilogue>
  static void call(const void* self, const float* acc, int64_t m, int64_t n, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; ++r)
      static_cast<const Epilogue*>(self)->row(acc + r * Kernel::kCols, m + r, n, cols);
  }

  const void* self_;
  void (*rows_)(const void* self, const float* acc, int64_t m, int64_t n, int64_t rows, int64_t cols);
  PlainOutput plain_;
};

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline int64_t padded_depth(int64_t depth) { return round_up(depth, Kernel::kDepth); }

inline int64_t packed_b_elements(int64_t N, int64_t K) { return round_up(N, Kernel::kCols) * padded_depth(K); }

// Packs all of B[K,N] into dst (packed_b_elements(N, K), aligned to 64 bytes), threads sharing the work.
void pack_b(Kernel::Packed* dst, MatrixRef b, int64_t N, int64_t K);

// C = epilogue(A * B). K == 0 is a product of zeros.
void gemm(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue);

// The same with a B that is packed already.
void gemm_packed(MatrixRef a, const Kernel::Packed* packed_b, GemmSize size, EpilogueRef epilogue);

// Rows [rows.begin, rows.end) and columns [cols.begin, cols.end) of C on the calling thread, which holds a
// Kernel::ThreadState; cols.begin is at a panel.
void gemm_rectangle(MatrixRef a, const Kernel::Packed* packed_b, int64_t K, Range rows, Range cols,
                    EpilogueRef epilogue);

}  // namespace llmfast::LLMFAST_TARGET
