// Residual sum + norm, backward; see norm.h for the formulas.
//
// A row makes two passes, of which the second finds it in L1:
//   sum_row     reads grad_normed and summed: mean_C(g) and mean_C(g * xhat)
//   finish_row  reads them again, and grad_summed: grad_total, rounded to the dtypes of summed and of x; adds to the
//               partial sums of grad_weight and grad_bias
// Computing xhat and g twice costs less than keeping them, above all for 16-bit rows. Four rows at a time would load and
// store the partial sums once: 10% faster in the cache, but the eight streams cost a factor of 2 to 3 beyond it.
//
// A thread owns a contiguous slice of rows and two partial sums of C floats; partial sums are added in thread order by
// columns. The result depends on the number of threads, never on their timing.
//
// A summed of half precision is not the sum whose statistics forward saved: xhat would have a mean (316 times the
// rounding error where the row is constant). So sum_row takes its mean and variance too. One pass is enough because
// it measures from a centre near them all, the saved mean as it rounds in summed's dtype: mean - centre is about a unit
// in the last place, which is no more than the standard deviation of any row but a constant one, where all is exact.
#include "norm/norm.h"

#include "core/parallel.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "gemm/vectors.h"
#include "simd/stream.h"
#include "simd/unrolled.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

struct Row {
  const void *grad_normed, *summed, *grad_summed;
  void *grad_total, *grad_x;
  float mean, rstd;           // as forward saved them; after sum_row those of summed
  float mean_g, mean_g_xhat;  // set by sum_row
};

struct Vectors {
  const float* weight;             // [C] or nullptr
  float *weight_sums, *bias_sums;  // [C] of this thread, or nullptr
  int64_t C;
  float eps;
};

using SumRow = void (*)(Row& row, const Vectors& vectors);
using FinishRow = void (*)(const Row& row, const Vectors& vectors, bool stream);

// A sum in so many registers, a power of two up to four.
template <int kParts>
struct Sum {
  Vec part[kParts];

  Sum() {
    for (Vec& p : part) p = Vec::zero();
  }
  Vec& operator[](int u) { return part[u % kParts]; }
  float total() const {
    Vec sum = part[0] + part[1];
    if constexpr (kParts == 4) sum = sum + (part[2] + part[3]);
    return reduce_add(sum);
  }
};

template <class G, class S, bool kCentred>
void sum_row(Row& row, const Vectors& vectors) {
  constexpr bool kRounded = sizeof(S) < sizeof(float);
  const G* grad_normed = static_cast<const G*>(row.grad_normed);
  const S* summed = static_cast<const S*>(row.summed);
  const float* weight = vectors.weight;
  const float centre = kCentred ? to_float(from_float<S>(row.mean)) : 0.0f;
  const Vec centres = Vec::set(centre);
  Sum<kRounded && Vec::kRegisters < 32 ? 2 : 4> g_sum, g_gap_sum, gap_sum, square_sum;
  for_each_vec_of_four(vectors.C, [&](int64_t i, auto lanes, int u) __attribute__((always_inline)) {
    Vec gap = lanes.load(summed + i);
    Vec g = lanes.load(grad_normed + i);  // zero beyond the row
    if constexpr (kCentred) gap = gap - centres;
    if (weight) g = g * lanes.load(weight + i);
    g_gap_sum[u] = fma(g, gap, g_gap_sum[u]);
    if constexpr (kCentred) g_sum[u] = g_sum[u] + g;
    if constexpr (kRounded) {
      gap = keep(gap, lanes);
      square_sum[u] = fma(gap, gap, square_sum[u]);
      if constexpr (kCentred) gap_sum[u] = gap_sum[u] + gap;
    }
  });
  const float count = static_cast<float>(vectors.C);
  float off_centre = 0.0f;
  if constexpr (kRounded) {
    if constexpr (kCentred) off_centre = gap_sum.total() / count;
    const float variance = square_sum.total() / count - off_centre * off_centre;
    row.mean = centre + off_centre;
    row.rstd = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + vectors.eps);
  }
  const float sum = kCentred ? g_sum.total() : 0.0f;
  row.mean_g = sum / count;
  row.mean_g_xhat = (g_gap_sum.total() - off_centre * sum) * row.rstd / count;
}

template <class G, class S, class X, bool kCentred>
void finish_row(const Row& row, const Vectors& vectors, bool stream) {
  const G* grad_normed = static_cast<const G*>(row.grad_normed);
  const S *summed = static_cast<const S*>(row.summed), *grad_summed = static_cast<const S*>(row.grad_summed);
  S* grad_total = static_cast<S*>(row.grad_total);
  X* grad_x = static_cast<X*>(row.grad_x);
  const float* weight = vectors.weight;
  float *weight_sums = vectors.weight_sums, *bias_sums = vectors.bias_sums;
  const Vec mean = Vec::set(row.mean), rstd = Vec::set(row.rstd);
  const Vec mean_g = Vec::set(row.mean_g), mean_g_xhat = Vec::set(row.mean_g_xhat);
  for_each_vec_of_four(vectors.C, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
    const Vec grad = lanes.load(grad_normed + i);
    Vec xhat = lanes.load(summed + i);
    if constexpr (kCentred) xhat = xhat - mean;
    xhat = xhat * rstd;
    if (weight_sums) fma(grad, xhat, Vec::load(weight_sums + i)).store(weight_sums + i);
    if (bias_sums) (Vec::load(bias_sums + i) + grad).store(bias_sums + i);
    Vec g = weight ? grad * lanes.load(weight + i) : grad;
    if constexpr (kCentred) g = g - mean_g;
    Vec total = fnma(xhat, mean_g_xhat, g);
    total = grad_summed ? fma(total, rstd, lanes.load(grad_summed + i)) : total * rstd;
    if (grad_total) put(total, grad_total + i, lanes, stream);
    if (grad_x) put(total, grad_x + i, lanes, stream);
  });
}

SumRow choose_sum_row(DType grad, DType summed, bool centred) {
  SumRow chosen = nullptr;
  visit_float(grad, [&](auto grad_type) {
    visit_float(summed, [&](auto summed_type) {
      using G = decltype(grad_type);
      using S = decltype(summed_type);
      chosen = centred ? &sum_row<G, S, true> : &sum_row<G, S, false>;
    });
  });
  return chosen;
}

FinishRow choose_finish_row(DType grad, DType summed, DType x, bool centred) {
  FinishRow chosen = nullptr;
  visit_float(grad, [&](auto grad_type) {
    visit_float(summed, [&](auto summed_type) {
      visit_float(x, [&](auto x_type) {
        using G = decltype(grad_type);
        using S = decltype(summed_type);
        using X = decltype(x_type);
        chosen = centred ? &finish_row<G, S, X, true> : &finish_row<G, S, X, false>;
      });
    });
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

// Everything that a block of rows is read from and written to.
struct Tensors {
  RowPointers grad_normed, grad_summed, summed, grad_total, grad_x;
  const float *means, *rstds;

  explicit Tensors(const NormBackwardParams& p)
      : grad_normed(p.grad_normed), grad_summed(p.grad_summed), summed(p.summed), grad_total(p.grad_total),
        grad_x(p.grad_x), means(p.mean.as<const float>()), rstds(p.rstd.as<const float>()) {}

  Row row(int64_t m) const {
    return {grad_normed.row(m), summed.row(m), grad_summed.row(m), grad_total.row(m), grad_x.row(m),
            means ? means[m] : 0.0f, rstds[m], 0.0f, 0.0f};
  }
};

}  // namespace

void norm_backward(const NormBackwardParams& p) {
  const int64_t C = p.summed.shape[p.summed.ndim - 1], stride = round_up_to_lanes(C);
  const Tensors tensors(p);
  const float* weight = as_float(p.weight, workspace<float>(Slot::norm_vectors, stride));
  const DType x_dtype = p.grad_x.defined ? p.grad_x.dtype : p.summed.dtype;
  const SumRow sum = choose_sum_row(p.grad_normed.dtype, p.summed.dtype, p.centred);
  const FinishRow finish = choose_finish_row(p.grad_normed.dtype, p.summed.dtype, x_dtype, p.centred);
  const bool large = p.summed.numel() * size_of(p.summed.dtype) > kStreamBytes;
  const bool stream = large && (!p.grad_total.defined || streamable(p.grad_total, C)) &&
                      (!p.grad_x.defined || streamable(p.grad_x, C));

  const int64_t M = tensors.summed.rows.count;
  const int threads = threads_for(M, 1 + (int64_t{1} << 14) / C);
  float* weight_partials = workspace<float>(Slot::reduction, 2 * stride * threads);
  float* bias_partials = weight_partials + stride * threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    Vectors vectors{weight, nullptr, nullptr, C, p.eps};
    if (p.grad_weight.defined) vectors.weight_sums = weight_partials + thread * stride;
    if (p.grad_bias.defined) vectors.bias_sums = bias_partials + thread * stride;
    for (int64_t i = 0; vectors.weight_sums && i < stride; ++i) vectors.weight_sums[i] = 0.0f;
    for (int64_t i = 0; vectors.bias_sums && i < stride; ++i) vectors.bias_sums[i] = 0.0f;

    const Range mine = slice(M, thread, team);
    for (int64_t m = mine.begin; m < mine.end; ++m) {
      Row row = tensors.row(m);
      sum(row, vectors);
      finish(row, vectors, stream);
    }
    if (stream) streamed_stores_done();
#pragma omp barrier
    const Range columns = slice(C, thread, team, 64);
    if (p.grad_weight.defined) add_partials(weight_partials, stride, team, columns, p.grad_weight);
    if (p.grad_bias.defined) add_partials(bias_partials, stride, team, columns, p.grad_bias);
  }
}

}  // namespace llmfast::LLMFAST_TARGET
