// Residual sum + norm, backward; see norm.h for the formulas.
//
//   1. a block walks over rows b, b + blocks, ...; it loads grad_normed and summed of a row and takes four sums over
//      it, with d = summed - saved mean and g = grad_normed * weight:  sum(d)  sum(d^2)  sum(g)  sum(g d)
//   2. from them the statistics of summed as it was rounded, and mean(g), mean(g * xhat): one barrier a row. d has a
//      mean of a rounding error, so sum(d^2) - sum(d)^2 / C does not cancel, unlike the same of summed itself
//   3. grad_total, grad_x for the row; the columns' grad_normed * xhat and grad_normed are added up in registers
//   4. at the end each block writes its row of partial sums, and a second kernel adds the rows of all blocks in a fixed
//      order: deterministic, as which rows a block has depends on the shape alone
//
// A thread holds one or two groups of eight columns (up to 8192 columns in a block of 512). Wider rows are read twice,
// and their partial sums live in the workspace, where only their owner touches them.
#include "core/cuda_elements.h"
#include "core/cuda_launch.h"
#include "core/cuda_row_sum.h"
#include "norm/norm_cuda.h"

namespace llmfast::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kStripColumns = 32, kStripRows = 32;  // of a block that adds partial sums

struct Operands {
  RowSet grad_normed, grad_summed, summed, weight, grad_total, grad_x;
  const float* mean;
  float *weight_sums, *bias_sums;  // [blocks, C] or nullptr
  uint32_t M;
  int C;
  float per_column;  // 1 / C
  float eps;
  bool centred;
};

// The rows of one step, and where the sums of its columns go.
struct RowStep {
  RowPointer grad_normed, grad_summed, summed, grad_total, grad_x;
  float mean;           // as saved, of the unrounded sum
  float shift, rstd;    // of d = summed - mean: its mean and 1 / sqrt(variance + eps)
  float mean_g, mean_g_xhat;

  __device__ __forceinline__ RowStep(const Operands& o, uint32_t row)
      : grad_normed(o.grad_normed.row(row)),
        grad_summed(o.grad_summed.row(row)),
        summed(o.summed.row(row)),
        grad_total(o.grad_total.row(row)),
        grad_x(o.grad_x.row(row)),
        mean(o.centred ? o.mean[row] : 0.0f) {}
};

// d and grad_normed of eight columns; zeros beyond the row.
__device__ __forceinline__ void widen_pair(const RowStep& r, const Eight& summed, const Eight& grad_normed, int count,
                                           float (&d)[kEight], float (&grad)[kEight]) {
  widen(summed, r.summed.dtype, d);
  widen(grad_normed, r.grad_normed.dtype, grad);
#pragma unroll
  for (int j = 0; j < kEight; ++j) d[j] = j < count ? d[j] - r.mean : 0.0f;
}

__device__ __forceinline__ void add_sums(const Operands& o, int index, const float (&d)[kEight],
                                         const float (&grad)[kEight], float (&sums)[4]) {
  float weight[kEight];
  load_floats(o.weight.row(0), index, 1.0f, weight);
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    const float g = grad[j] * weight[j];
    sums[0] += d[j];
    sums[1] = fmaf(d[j], d[j], sums[1]);
    sums[2] += g;
    sums[3] = fmaf(g, d[j], sums[3]);
  }
}

__device__ __forceinline__ void finish_sums(const Operands& o, const float (&sums)[4], RowStep* r) {
  r->shift = o.centred ? sums[0] * o.per_column : 0.0f;
  const float variance = fmaf(-r->shift, r->shift, sums[1] * o.per_column);
  r->rstd = rsqrtf(fmaxf(variance, 0.0f) + o.eps);
  r->mean_g = o.centred ? sums[2] * o.per_column : 0.0f;
  r->mean_g_xhat = fmaf(-r->shift, sums[2], sums[3]) * o.per_column * r->rstd;
}

// Writes the gradients of eight columns; xhat takes the place of d.
__device__ __forceinline__ void finish_columns(const Operands& o, const RowStep& r, int index, float (&d)[kEight],
                                               const float (&grad)[kEight], const Eight& grad_summed) {
  float weight[kEight], total[kEight];
  load_floats(o.weight.row(0), index, 1.0f, weight);
  widen(grad_summed, r.grad_summed.dtype, total);
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    d[j] = (d[j] - r.shift) * r.rstd;
    total[j] = fmaf(fmaf(-d[j], r.mean_g_xhat, fmaf(grad[j], weight[j], -r.mean_g)), r.rstd, total[j]);
  }
  if (r.grad_total) store_floats(r.grad_total, index, total);
  if (r.grad_x) store_floats(r.grad_x, index, total);
}

__device__ __forceinline__ RowPointer partial_row(float* sums, int C) {
  float* row = sums + static_cast<int64_t>(blockIdx.x) * C;
  return {reinterpret_cast<char*>(row), C, DType::f32, C % 4 == 0};
}

// Eight columns of the stream's gradient; zeros if there is none.
__device__ __forceinline__ Eight load_grad_summed(const RowStep& r, int index) {
  return r.grad_summed ? load_eight<true>(r.grad_summed, index) : Eight{};
}

// A thread with one group has registers for the next row's operands: they are on their way while this row's sums are
// waited for, and so is the stream's gradient of this row.
template <int kGroups>
__global__ void __launch_bounds__(kGroups == 1 ? kMostThreads / 2 : kMostThreads, 1)
    norm_backward_kernel(const __grid_constant__ Operands o) {
  constexpr bool kAhead = kGroups == 1;
  const int threads = static_cast<int>(blockDim.x);
  float weight_sums[kGroups][kEight] = {}, bias_sums[kGroups][kEight] = {};
  RowSum<false, kMostThreads, 4> row_sum;
  Eight summed[kGroups], grad_normed[kGroups], grad_summed;
  const auto load_row = [&](uint32_t row) {
    const RowPointer from_summed = o.summed.row(row), from_grad = o.grad_normed.row(row);
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int index = (k * threads + thread()) * kEight;
      summed[k] = load_eight<true>(from_summed, index);
      grad_normed[k] = load_eight<true>(from_grad, index);
    }
  };
  if (kAhead && blockIdx.x < o.M) load_row(blockIdx.x);
  for (uint32_t row = blockIdx.x; row < o.M; row += gridDim.x) {
    RowStep r(o, row);
    if (kAhead) grad_summed = load_grad_summed(r, thread() * kEight);
    else load_row(row);
    float d[kGroups][kEight], grad[kGroups][kEight], sums[4] = {};
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int index = (k * threads + thread()) * kEight;
      widen_pair(r, summed[k], grad_normed[k], elements_at(index, o.C), d[k], grad[k]);
      add_sums(o, index, d[k], grad[k], sums);
    }
    if (kAhead && o.M - row > gridDim.x) load_row(row + gridDim.x);
    row_sum(sums);
    finish_sums(o, sums, &r);
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int index = (k * threads + thread()) * kEight;
      if (!kAhead) grad_summed = load_grad_summed(r, index);
      finish_columns(o, r, index, d[k], grad[k], grad_summed);
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        weight_sums[k][j] = fmaf(grad[k][j], d[k][j], weight_sums[k][j]);
        bias_sums[k][j] += grad[k][j];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    const int index = (k * threads + thread()) * kEight;
    if (o.weight_sums) store_floats(partial_row(o.weight_sums, o.C), index, weight_sums[k]);
    if (o.bias_sums) store_floats(partial_row(o.bias_sums, o.C), index, bias_sums[k]);
  }
}

// sums[index..] = addend, or += after the block's first row
__device__ __forceinline__ void add_to_partial(float* sums, int C, int index, bool first,
                                               const float (&addend)[kEight]) {
  const RowPointer row = partial_row(sums, C);
  float sum[kEight];
  load_floats(first ? RowPointer{} : row, index, 0.0f, sum);
#pragma unroll
  for (int j = 0; j < kEight; ++j) sum[j] += addend[j];
  store_floats(row, index, sum);
}

__global__ void __launch_bounds__(kMostThreads, 1) norm_backward_long_kernel(const __grid_constant__ Operands o) {
  const int stride = static_cast<int>(blockDim.x) * kEight;
  RowSum<false, kMostThreads, 4> row_sum;
  for (uint32_t row = blockIdx.x; row < o.M; row += gridDim.x) {
    RowStep r(o, row);
    const auto load_pair = [&](int index, float(&d)[kEight], float(&grad)[kEight]) {
      const Eight summed = load_eight(r.summed, index), grad_normed = load_eight(r.grad_normed, index);
      widen_pair(r, summed, grad_normed, elements_at(index, o.C), d, grad);
    };
    float d[kEight], grad[kEight], sums[4] = {};
    for (int index = thread() * kEight; index < o.C; index += stride) {
      load_pair(index, d, grad);
      add_sums(o, index, d, grad, sums);
    }
    row_sum(sums);
    finish_sums(o, sums, &r);
    for (int index = thread() * kEight; index < o.C; index += stride) {
      load_pair(index, d, grad);
      finish_columns(o, r, index, d, grad, load_grad_summed(r, index));
      const bool first = row == blockIdx.x;
      if (o.bias_sums) add_to_partial(o.bias_sums, o.C, index, first, grad);
#pragma unroll
      for (int j = 0; j < kEight; ++j) grad[j] *= d[j];
      if (o.weight_sums) add_to_partial(o.weight_sums, o.C, index, first, grad);
    }
  }
}

// to[c] = the sum over `count` rows of partials[.., C], for a strip of columns; lanes have neighbouring columns.
__global__ void __launch_bounds__(kStripColumns * kStripRows)
    add_partials_kernel(const float* partials, int count, const __grid_constant__ RowSet to) {
  __shared__ float sums[kStripRows][kStripColumns];
  const int column = static_cast<int>(blockIdx.x) * kStripColumns + lane();
  float sum = 0;
  if (column < to.C) {
#pragma unroll 8
    for (int row = warp(); row < count; row += kStripRows) sum += partials[static_cast<int64_t>(row) * to.C + column];
  }
  sums[warp()][lane()] = sum;
  __syncthreads();
  if (warp() != 0 || column >= to.C) return;
  sum = 0;
  for (int row = 0; row < kStripRows; ++row) sum += sums[row][lane()];
  if (to.dtype == DType::f32) {
    reinterpret_cast<float*>(to.data)[column] = sum;
  } else {
    reinterpret_cast<uint16_t*>(to.data)[column] =
        to.dtype == DType::bf16 ? from_float<bf16>(sum).bits : from_float<fp16>(sum).bits;
  }
}

}  // namespace

void norm_backward_sm80(const NormBackwardParams& p, const Stream& stream) {
  const RowSet summed(p.summed);
  const NormBackwardPlan plan = norm_backward_plan(summed.rows.count, summed.C);
  const int64_t partials = static_cast<int64_t>(plan.blocks) * summed.C;
  float* workspace = p.workspace.as<float>();
  const Operands o{RowSet(p.grad_normed),
                   RowSet(p.grad_summed),
                   summed,
                   RowSet(p.weight),
                   RowSet(p.grad_total),
                   RowSet(p.grad_x),
                   p.mean.as<float>(),
                   p.grad_weight.defined ? workspace : nullptr,
                   p.grad_bias.defined ? workspace + (p.grad_weight.defined ? partials : 0) : nullptr,
                   static_cast<uint32_t>(summed.rows.count),
                   summed.C,
                   1.0f / static_cast<float>(summed.C),
                   p.eps,
                   p.centred};
  if (plan.blocks > 0) {
    const auto kernel = plan.groups == 1   ? norm_backward_kernel<1>
                        : plan.groups == 2 ? norm_backward_kernel<2>
                                           : norm_backward_long_kernel;
    launch(stream, Grid{static_cast<unsigned>(plan.blocks)}, plan.threads, 0, kernel, o);
  }
  const Grid strips{static_cast<unsigned>((o.C + kStripColumns - 1) / kStripColumns)};
  for (const auto& [sums, gradient] : {std::pair(o.weight_sums, p.grad_weight), std::pair(o.bias_sums, p.grad_bias)})
    if (gradient.defined)
      launch(stream, strips, kStripColumns * kStripRows, 0, add_partials_kernel, sums, plan.blocks, RowSet(gradient));
}

}  // namespace llmfast::cuda
