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
// A thread holds one or two groups of eight columns (up to 8192 columns in a block of 512). What the next rows need is on
// its way meanwhile, as far as shared memory goes: each thread copies its own columns there, so that none waits for
// another. Rows that cannot be copied so, unaligned ones, are loaded when their turn comes. Wider rows are read twice,
// and their partial sums live in the workspace, where only their owner touches them.
#include "core/cuda_elements.h"
#include "core/cuda_launch.h"
#include "core/cuda_row_sum.h"
#include "norm/cuda/kinds.h"
#include "norm/norm_cuda.h"
#include "ptx/copy_async.h"

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

  template <class Kinds>
  __device__ __forceinline__ RowStep(Kinds, const Operands& o, uint32_t row, float saved_mean)
      : grad_normed(Kinds::Normed::row(o.grad_normed, row)),
        grad_summed(Kinds::Stream::row(o.grad_summed, row)),
        summed(Kinds::Stream::row(o.summed, row)),
        grad_total(Kinds::Stream::row(o.grad_total, row)),
        grad_x(Kinds::X::row(o.grad_x, row)),
        mean(saved_mean) {}
};

__device__ __forceinline__ float saved_mean(const Operands& o, uint32_t row) {
  return o.centred && row < o.M ? o.mean[row] : 0.0f;
}

// d and grad_normed of eight columns; zeros beyond the row.
__device__ __forceinline__ void widen_pair(const RowStep& r, const Eight& summed, const Eight& grad_normed,
                                           Columns columns, float (&d)[kEight], float (&grad)[kEight]) {
  widen(summed, r.summed.dtype, d);
  widen(grad_normed, r.grad_normed.dtype, grad);
#pragma unroll
  for (int j = 0; j < kEight; ++j) d[j] = columns.at(j) < r.summed.C ? d[j] - r.mean : 0.0f;
}

__device__ __forceinline__ void add_sums(const float (&weight)[kEight], const float (&d)[kEight],
                                         const float (&grad)[kEight], float (&sums)[4]) {
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
__device__ __forceinline__ void finish_columns(const RowStep& r, Columns columns, const float (&weight)[kEight],
                                               float (&d)[kEight], const float (&grad)[kEight],
                                               const Eight& grad_summed) {
  float total[kEight];
  widen(grad_summed, r.grad_summed.dtype, total);
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    d[j] = (d[j] - r.shift) * r.rstd;
    total[j] = fmaf(fmaf(-d[j], r.mean_g_xhat, fmaf(grad[j], weight[j], -r.mean_g)), r.rstd, total[j]);
  }
  if (r.grad_total) store_floats(r.grad_total, columns, total);
  if (r.grad_x) store_floats(r.grad_x, columns, total);
}

__device__ __forceinline__ RowPointer partial_row(float* sums, int C) {
  float* row = sums + static_cast<int64_t>(blockIdx.x) * C;
  return {reinterpret_cast<char*>(row), C, DType::f32, C % 4 == 0};
}

// Eight columns of the stream's gradient; zeros if there is none.
__device__ __forceinline__ Eight load_grad_summed(const RowStep& r, Columns columns) {
  return r.grad_summed ? load_eight<true>(r.grad_summed, columns) : Eight{};
}

// Where a thread's columns of the next rows wait: for each stage and group of columns, 16 bytes a thread of each 16-bit
// operand and twice 16 of each float32 one.
constexpr int kOperandBytes = 16;
__host__ __device__ constexpr int waiting_units(DType dtype) { return dtype == DType::f32 ? 2 : 1; }
__host__ __device__ inline int waiting_units(const Operands& o) {
  return waiting_units(o.grad_normed.dtype) + waiting_units(o.summed.dtype) +
         (o.grad_summed.data ? waiting_units(o.grad_summed.dtype) : 0);
}
struct Waiting {
  uint32_t address;   // this thread's 16 bytes of the first unit
  uint32_t distance;  // from a unit to the next

  __device__ __forceinline__ uint32_t unit(int i) const { return address + i * distance; }
  // Zeros take the place of columns beyond the row.
  __device__ __forceinline__ void request(int unit_index, const RowPointer& row, Columns columns) const {
    const auto valid = [&](int column, int count) {
      const int rest = row.C - column;
      return (rest < 0 ? 0 : rest < count ? rest : count) * element_bytes(row.dtype);
    };
    const auto from = [&](int column) { return row.data + static_cast<int64_t>(column) * element_bytes(row.dtype); };
    const uint32_t to = unit(unit_index);
    if (row.dtype == DType::f32) {
      copy_async_16(to, from(columns.first), valid(columns.first, 4));
      copy_async_16(unit(unit_index + 1), from(columns.second), valid(columns.second, 4));
    } else if (columns.together()) {
      copy_async_16(to, from(columns.first), valid(columns.first, 8));
    } else {
      copy_async_8(to, from(columns.first), valid(columns.first, 4));
      copy_async_8(to + 8, from(columns.second), valid(columns.second, 4));
    }
  }
  __device__ __forceinline__ Eight take(int unit_index, DType dtype) const {
    Eight raw = {};
    const Bytes16 low = load_shared(unit(unit_index));
#pragma unroll
    for (int j = 0; j < 4; ++j) raw.word[j] = low.word[j];
    if (dtype == DType::f32) {
      const Bytes16 high = load_shared(unit(unit_index + 1));
#pragma unroll
      for (int j = 0; j < 4; ++j) raw.word[4 + j] = high.word[j];
    }
    return raw;
  }
};

// kStages: rows whose operands are in shared memory or on their way there, or 0.
template <class Kinds, int kGroups, int kStages>
__global__ void __launch_bounds__(kMostThreads, 1) norm_backward_kernel(const __grid_constant__ Operands o) {
  const int threads = static_cast<int>(blockDim.x);
  const int units = waiting_units(o);
  const auto columns = [&](int k) { return Columns(k, threads, thread(), Kinds::kApart); };
  const auto waiting = [&](int stage, int k) {
    const uint32_t distance = static_cast<uint32_t>(threads) * kOperandBytes;
    return Waiting{shared_address(dynamic_shared<char>()) + (stage * kGroups + k) * units * distance +
                       static_cast<uint32_t>(thread()) * kOperandBytes,
                   distance};
  };
  const auto request_row = [&](uint32_t row, int stage) {
    if (row < o.M) {
      const RowStep r(Kinds{}, o, row, 0.0f);
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        const Waiting there = waiting(stage, k);
        int unit = 0;
        for (const RowPointer* from : {&r.grad_normed, &r.summed, &r.grad_summed}) {
          if (*from) there.request(unit, *from, columns(k));
          unit += waiting_units(from->dtype);
        }
      }
    }
    copy_async_commit();
  };
  float weight[kGroups][kEight], weight_sums[kGroups][kEight] = {}, bias_sums[kGroups][kEight] = {};
#pragma unroll
  for (int k = 0; k < kGroups; ++k) load_floats(Kinds::Weights::row(o.weight, 0), columns(k), 1.0f, weight[k]);
  RowSum<false, kMostThreads, 4> row_sum;
  int stage = 0;
  float next_mean = saved_mean(o, blockIdx.x);
#pragma unroll
  for (int s = 0; s + 1 < kStages; ++s) request_row(blockIdx.x + s * gridDim.x, s);
  for (uint32_t row = blockIdx.x; row < o.M; row += gridDim.x) {
    if constexpr (kStages > 0) {
      request_row(row + (kStages - 1) * gridDim.x, stage == 0 ? kStages - 1 : stage - 1);
      copy_async_wait<kStages - 1>();
    }
    RowStep r(Kinds{}, o, row, next_mean);
    next_mean = saved_mean(o, row + gridDim.x);
    const int normed_units = waiting_units(r.grad_normed.dtype), stream_units = waiting_units(r.summed.dtype);
    float d[kGroups][kEight], grad[kGroups][kEight], sums[4] = {};
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const Waiting here = waiting(stage, k);
      const Eight grad_normed =
          kStages > 0 ? here.take(0, r.grad_normed.dtype) : load_eight<true>(r.grad_normed, columns(k));
      const Eight summed =
          kStages > 0 ? here.take(normed_units, r.summed.dtype) : load_eight<true>(r.summed, columns(k));
      widen_pair(r, summed, grad_normed, columns(k), d[k], grad[k]);
      add_sums(weight[k], d[k], grad[k], sums);
    }
    row_sum(sums);
    finish_sums(o, sums, &r);
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const bool waits = kStages > 0 && r.grad_summed;
      const Eight grad_summed = waits ? waiting(stage, k).take(normed_units + stream_units, r.grad_summed.dtype)
                                      : load_grad_summed(r, columns(k));
      finish_columns(r, columns(k), weight[k], d[k], grad[k], grad_summed);
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        weight_sums[k][j] = fmaf(grad[k][j], d[k][j], weight_sums[k][j]);
        bias_sums[k][j] += grad[k][j];
      }
    }
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    if (o.weight_sums) store_floats(partial_row(o.weight_sums, o.C), columns(k), weight_sums[k]);
    if (o.bias_sums) store_floats(partial_row(o.bias_sums, o.C), columns(k), bias_sums[k]);
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
    RowStep r(AnyKinds{}, o, row, saved_mean(o, row));
    const auto load_pair = [&](int index, float(&weight)[kEight], float(&d)[kEight], float(&grad)[kEight]) {
      const Eight summed = load_eight(r.summed, index), grad_normed = load_eight(r.grad_normed, index);
      widen_pair(r, summed, grad_normed, index, d, grad);
      load_floats(o.weight.row(0), index, 1.0f, weight);
    };
    float weight[kEight], d[kEight], grad[kEight], sums[4] = {};
    for (int index = thread() * kEight; index < o.C; index += stride) {
      load_pair(index, weight, d, grad);
      add_sums(weight, d, grad, sums);
    }
    row_sum(sums);
    finish_sums(o, sums, &r);
    for (int index = thread() * kEight; index < o.C; index += stride) {
      load_pair(index, weight, d, grad);
      finish_columns(r, index, weight, d, grad, load_grad_summed(r, index));
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

// None, where copies are not aligned.
int stages_that_fit(const Operands& o, const NormBackwardPlan& plan, size_t stage_bytes, const Stream& stream) {
  for (const RowSet* rows : {&o.grad_normed, &o.summed, &o.grad_summed})
    if (rows->data && !rows->aligned) return 0;
  const DeviceInfo& device = device_info(stream.device);
  return norm_backward_stages(plan.threads, static_cast<int>(stage_bytes), device.shared_per_block,
                              device.shared_per_multiprocessor);
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
  const Grid blocks{static_cast<unsigned>(plan.blocks)};
  if (plan.blocks > 0 && plan.groups == 0) launch(stream, blocks, plan.threads, 0, norm_backward_long_kernel, o);
  else if (plan.blocks > 0)
    visit_kinds(o.grad_x, {&o.summed, &o.grad_summed, &o.grad_total}, o.grad_normed, {&o.weight}, [&](auto kinds) {
      using Kinds = decltype(kinds);
      const size_t stage_bytes = size_t{kOperandBytes} * plan.threads * plan.groups * waiting_units(o);
      const int stages = stages_that_fit(o, plan, stage_bytes, stream);
      const auto of_groups = [&](auto groups) {
        constexpr int kGroups = decltype(groups)::value;
        return stages == 3   ? norm_backward_kernel<Kinds, kGroups, 3>
               : stages == 2 ? norm_backward_kernel<Kinds, kGroups, 2>
                             : norm_backward_kernel<Kinds, kGroups, 0>;
      };
      const auto kernel = plan.groups == 1 ? of_groups(std::integral_constant<int, 1>{})
                                           : of_groups(std::integral_constant<int, 2>{});
      launch(stream, blocks, plan.threads, stages * stage_bytes, kernel, o);
    });
  const Grid strips{static_cast<unsigned>((o.C + kStripColumns - 1) / kStripColumns)};
  for (const auto& [sums, gradient] : {std::pair(o.weight_sums, p.grad_weight), std::pair(o.bias_sums, p.grad_bias)})
    if (gradient.defined)
      launch(stream, strips, kStripColumns * kStripRows, 0, add_partials_kernel, sums, plan.blocks, RowSet(gradient));
}

}  // namespace llmfast::cuda
