// Residual sum + norm, forward; see norm.h for the formula.
//
// A row makes three passes, of which only the first reads memory and the others find the row in L1:
//   add_row        total = x + residual in float32 -> row buffer; rounded -> summed; returns its sum (or of squares)
//   statistics_of  mean, and the sum of (total - mean)^2 in a pass of its own (LayerNorm only)
//   normalize_row  (total - mean) * rstd * weight + bias -> normed
// Each step is instantiated for the dtypes that it sees (at most two) and chosen before the loop over rows.
// A thread owns a contiguous slice of rows and two buffers of C floats. weight and bias are widened to float32 once.
// LayerNorm adds up a row before it normalizes the one before, which hides the wait for the sum across lanes (10% in the
// cache) as long as both rows stay in L1; RMSNorm, with one such wait a row, gains nothing by it.
#include "norm/norm.h"

#include <utility>

#include "core/parallel.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "gemm/vectors.h"
#include "norm/row_statistics.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kTwoRowsInL1 = 1024;  // C; with weight, bias and what comes and goes they take 32 KiB of float32

using NormalizeRow = void (*)(const float* row, float mean, float rstd, const float* weight, const float* bias,
                              void* normed, int64_t C, bool stream);

template <class T, bool kBias>
void normalize_row(const float* row, float mean, float rstd, const float* weight, const float* bias, void* normed_row,
                   int64_t C, bool stream) {
  T* normed = static_cast<T*>(normed_row);
  const Vec centre = Vec::set(mean), scale = Vec::set(rstd);
  for_each_vec_of_four(C, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
    Vec y = (Vec::load(row + i) - centre) * scale;
    if constexpr (kBias) {
      const Vec b = lanes.load(bias + i);
      y = weight ? fma(y, lanes.load(weight + i), b) : y + b;
    } else if (weight) {
      y = y * lanes.load(weight + i);
    }
    put(y, normed + i, lanes, stream);
  });
}

NormalizeRow choose_normalize_row(DType dtype, bool bias) {
  NormalizeRow chosen = nullptr;
  visit_float(dtype, [&](auto type) {
    using T = decltype(type);
    chosen = bias ? &normalize_row<T, true> : &normalize_row<T, false>;
  });
  return chosen;
}

}  // namespace

void norm_forward(const NormParams& p) {
  const int64_t C = p.x.shape[p.x.ndim - 1];
  const RowPointers x(p.x), residual(p.residual), normed(p.normed), summed(p.summed);
  float* vectors = workspace<float>(Slot::norm_vectors, 2 * round_up_to_lanes(C));
  const float* weight = as_float(p.weight, vectors);
  const float* bias = as_float(p.bias, vectors + round_up_to_lanes(C));
  float* means = p.mean.as<float>();
  float* rstds = p.rstd.as<float>();
  const AddRow add = choose_add_row(p.x.dtype, p.residual.defined ? p.residual.dtype : p.x.dtype, p.centred);
  const NormalizeRow normalize = choose_normalize_row(p.normed.dtype, bias);
  const int64_t out_bytes = p.normed.numel() * size_of(p.normed.dtype) +
                            (p.summed.defined ? p.summed.numel() * size_of(p.summed.dtype) : 0);
  const bool large = out_bytes > kStreamBytes;
  const bool stream_normed = large && streamable(p.normed, C);
  const bool stream_summed = large && p.summed.defined && streamable(p.summed, C);

  const bool overlap = p.centred && C <= kTwoRowsInL1;
  const int64_t row_grain = 1 + (int64_t{1} << 14) / C;
  parallel_for(x.rows.count, row_grain, [&](int64_t begin, int64_t end) {
    float* row = workspace<float>(Slot::norm_row, 2 * round_up_to_lanes(C));
    float* before = row + round_up_to_lanes(C);
    Statistics stats{};
    const auto finish = [&](int64_t m, const float* total) {
      normalize(total, stats.mean, stats.rstd, weight, bias, normed.row(m), C, stream_normed);
    };
    for (int64_t m = begin; m < end; ++m) {
      const float sum = add(x.row(m), residual.row(m), summed.row(m), row, C, stream_summed);
      if (overlap && m > begin) finish(m - 1, before);
      stats = statistics_of(row, sum, C, p.eps, p.centred);
      if (means) means[m] = stats.mean;
      if (rstds) rstds[m] = stats.rstd;
      if (overlap) std::swap(row, before);
      else finish(m, row);
    }
    if (overlap && begin < end) finish(end - 1, before);
    if (large) streamed_stores_done();
  });
}

}  // namespace llmfast::LLMFAST_TARGET
