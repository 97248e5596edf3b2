// Residual sum + norm, backward; see norm.h for the formulas.
//
// A row makes two passes, of which only the first reads grad_normed and summed from memory:
//   gather_row  xhat and g = grad_normed * weight -> row buffers; their two sums; adds to grad_weight's and grad_bias'
//               partial sums
//   finish_row  grad_total, rounded to the dtypes of summed and of x
// A thread owns a contiguous slice of rows, two row buffers, and two partial sums of C floats; partial sums are added
// in thread order by columns. The result depends on the number of threads, never on their timing.
// A summed of half precision is not the sum whose statistics forward saved: xhat would have a mean (316 times the
// rounding error where the row is constant). So it is widened into xhat's buffer first and its own statistics are taken
// there, in one more pass over L1.
#include "norm/norm.h"

#include "core/parallel.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "gemm/vectors.h"
#include "norm/row_statistics.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

struct RowState {
  float *xhat, *g;                 // [C] of this row
  float *weight_sums, *bias_sums;  // [C] of this thread, or nullptr
  const float* weight;             // or nullptr
  Statistics stats;
  float mean_g, mean_g_xhat;
  int64_t C;
};

using GatherRow = void (*)(RowState& state, const void* grad_normed, const float* summed);
using FinishRow = void (*)(const RowState& state, const void* grad_summed, void* grad_total, void* grad_x, bool stream);

template <class G>
void gather_row(RowState& r, const void* grad_normed_row, const float* summed) {
  const G* grad_normed = static_cast<const G*>(grad_normed_row);
  const Vec centre = Vec::set(r.stats.mean), scale = Vec::set(r.stats.rstd);
  const float* weight = r.weight;
  float *xhats = r.xhat, *gs = r.g, *weight_sums = r.weight_sums, *bias_sums = r.bias_sums;
  FourSums sum_g, sum_g_xhat;
  for_each_vec_of_four(r.C, [&](int64_t i, auto lanes, int u) {
    const Vec grad = lanes.load(grad_normed + i);
    const Vec xhat = (lanes.load(summed + i) - centre) * scale;
    if (weight_sums) fma(grad, xhat, Vec::load(weight_sums + i)).store(weight_sums + i);
    if (bias_sums) (Vec::load(bias_sums + i) + grad).store(bias_sums + i);
    const Vec g = weight ? grad * lanes.load(weight + i) : grad;  // zero beyond the row, as grad is
    xhat.store(xhats + i);
    g.store(gs + i);
    sum_g.part[u] = sum_g.part[u] + g;
    sum_g_xhat.part[u] = fma(g, xhat, sum_g_xhat.part[u]);
  });
  r.mean_g = sum_g.total() / static_cast<float>(r.C);
  r.mean_g_xhat = sum_g_xhat.total() / static_cast<float>(r.C);
}

template <class S, class X>
void finish_row(const RowState& r, const void* grad_summed_row, void* grad_total_row, void* grad_x_row, bool stream) {
  const S* grad_summed = static_cast<const S*>(grad_summed_row);
  S* grad_total = static_cast<S*>(grad_total_row);
  X* grad_x = static_cast<X*>(grad_x_row);
  const Vec scale = Vec::set(r.stats.rstd), mean_g = Vec::set(r.mean_g), mean_g_xhat = Vec::set(r.mean_g_xhat);
  const float *xhats = r.xhat, *gs = r.g;
  for_each_vec_of_four(r.C, [&](int64_t i, auto lanes, int) {
    Vec total = fnma(Vec::load(xhats + i), mean_g_xhat, Vec::load(gs + i) - mean_g) * scale;
    if (grad_summed) total = total + lanes.load(grad_summed + i);
    if (grad_total) put(total, grad_total + i, lanes, stream);
    if (grad_x) put(total, grad_x + i, lanes, stream);
  });
}

GatherRow choose_gather_row(DType grad) {
  GatherRow chosen = nullptr;
  visit_float(grad, [&](auto type) { chosen = &gather_row<decltype(type)>; });
  return chosen;
}

FinishRow choose_finish_row(DType summed, DType x) {
  FinishRow chosen = nullptr;
  visit_float(summed, [&](auto summed_type) {
    visit_float(x, [&](auto x_type) { chosen = &finish_row<decltype(summed_type), decltype(x_type)>; });
  });
  return chosen;
}

// sums[c] = partial[0][c] + partial[1][c] + ..., for this thread's columns.
void add_partials(const float* partials, int64_t stride, int count, Range columns, const TensorView& sums) {
  visit_float(sums.dtype, [&](auto type) {
    auto* out = sums.as<decltype(type)>() + columns.begin;
    for_each_vec(columns.end - columns.begin, [&](int64_t i, auto lanes) {
      Vec sum = Vec::zero();
      for (int t = 0; t < count; ++t) sum = sum + Vec::load(partials + t * stride + columns.begin + i);
      lanes.store(sum, out + i);
    });
  });
}

}  // namespace

void norm_backward(const NormBackwardParams& p) {
  const int64_t C = p.summed.shape[p.summed.ndim - 1], stride = round_up_to_lanes(C);
  const RowPointers grad_normed(p.grad_normed), grad_summed(p.grad_summed), summed(p.summed);
  const RowPointers grad_total(p.grad_total), grad_x(p.grad_x);
  const float* weight = as_float(p.weight, workspace<float>(Slot::norm_vectors, stride));
  const float *means = p.mean.as<const float>(), *rstds = p.rstd.as<const float>();
  const GatherRow gather = choose_gather_row(p.grad_normed.dtype);
  const FinishRow finish = choose_finish_row(p.summed.dtype, p.grad_x.defined ? p.grad_x.dtype : p.summed.dtype);
  const bool rounded = p.summed.dtype != DType::f32;
  const AddRow widen = choose_add_row(p.summed.dtype, p.summed.dtype, p.centred);
  const bool wants_total = p.grad_total.defined || p.grad_x.defined;
  const bool large = p.summed.numel() * size_of(p.summed.dtype) > kStreamBytes;
  const bool stream = large && (!p.grad_total.defined || streamable(p.grad_total, C)) &&
                      (!p.grad_x.defined || streamable(p.grad_x, C));

  const int64_t M = summed.rows.count;
  const int threads = threads_for(M, 1 + (int64_t{1} << 14) / C);
  float* weight_partials = workspace<float>(Slot::reduction, 2 * stride * threads);
  float* bias_partials = weight_partials + stride * threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    float* buffers = workspace<float>(Slot::norm_row, 2 * stride);
    RowState state{buffers, buffers + stride, nullptr, nullptr, weight, {0, 0}, 0, 0, C};
    if (p.grad_weight.defined) state.weight_sums = weight_partials + thread * stride;
    if (p.grad_bias.defined) state.bias_sums = bias_partials + thread * stride;
    for (int64_t i = 0; state.weight_sums && i < stride; ++i) state.weight_sums[i] = 0.0f;
    for (int64_t i = 0; state.bias_sums && i < stride; ++i) state.bias_sums[i] = 0.0f;

    const Range mine = slice(M, thread, team);
    for (int64_t m = mine.begin; m < mine.end; ++m) {
      const float* row = static_cast<const float*>(summed.row(m));
      state.stats = {means ? means[m] : 0.0f, rstds[m]};
      if (rounded) {
        const float sum = widen(row, nullptr, nullptr, state.xhat, C, false);
        row = state.xhat;
        state.stats = statistics_of(row, sum, C, p.eps, p.centred);
      }
      gather(state, grad_normed.row(m), row);
      if (!p.centred) state.mean_g = 0.0f;
      if (wants_total) finish(state, grad_summed.row(m), grad_total.row(m), grad_x.row(m), stream);
    }
    if (stream) streamed_stores_done();
#pragma omp barrier
    const Range columns = slice(C, thread, team, 64);
    if (p.grad_weight.defined) add_partials(weight_partials, stride, team, columns, p.grad_weight);
    if (p.grad_bias.defined) add_partials(bias_partials, stride, team, columns, p.grad_bias);
  }
}

}  // namespace llmfast::LLMFAST_TARGET
