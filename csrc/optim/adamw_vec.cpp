// AdamW step and gradient norm; see adamw.h for the formulas.
//
// Both read each gradient once. The step is bound by memory (28 bytes an element, for float32 parameters as for bf16
// ones with bf16 gradients), so a thread owns an equal, contiguous share of all elements, whatever tensors they are in.
// The norm adds up to 1024 squares in float32 registers, then in float64; pieces have a fixed size, so the result does
// not depend on the number of threads.
#include "optim/adamw.h"

#include "core/parallel.h"
#include "simd/unrolled.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

template <class P, class G>
void step_range(const AdamWTensor& t, float grad_scale, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(t.param) + begin;
  const G* grad = static_cast<const G*>(t.grad) + begin;
  float *exp_avg = t.exp_avg + begin, *exp_avg_sq = t.exp_avg_sq + begin;
  float* value = (t.master ? t.master : static_cast<float*>(t.param)) + begin;
  const bool has_copy = t.master != nullptr;
  const Vec scale = Vec::set(grad_scale), one_minus_beta1 = Vec::set(t.one_minus_beta1), beta2 = Vec::set(t.beta2);
  const Vec one_minus_beta2 = Vec::set(t.one_minus_beta2), eps = Vec::set(t.eps), decay = Vec::set(t.decay);
  const Vec step_size = Vec::set(t.step_size), denom_scale = Vec::set(t.denom_scale);
  for_each_vec(end - begin, [&](int64_t i, auto lanes) {
    const Vec g = lanes.load(grad + i) * scale;
    const Vec m_before = lanes.load(exp_avg + i);
    const Vec m = fma(g - m_before, one_minus_beta1, m_before);
    const Vec v = fma(g * g, one_minus_beta2, lanes.load(exp_avg_sq + i) * beta2);
    const Vec denom = fma(sqrt(v), denom_scale, eps);
    const Vec w = fnma(step_size, m / denom, lanes.load(value + i) * decay);
    lanes.store(m, exp_avg + i);
    lanes.store(v, exp_avg_sq + i);
    lanes.store(w, value + i);
    if (has_copy) lanes.store(w, param + i);
  });
}

template <class G>
double squares_of(const G* values, int64_t count) {
  constexpr int64_t kRun = 1024;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t run = count - begin < kRun ? count - begin : kRun;
    FourSums sum;
    for_each_vec_of_four(run, [&](int64_t i, auto lanes, int u) __attribute__((always_inline)) {
      const Vec g = lanes.load(values + begin + i);
      sum.part[u] = fma(g, g, sum.part[u]);
    });
    total += static_cast<double>(sum.total());
  }
  return total;
}

}  // namespace

void adamw_step(const AdamWParams& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.tensor_count; ++i) total += p.tensors[i].count;
  parallel_for(total, int64_t{1} << 13, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // element of the whole range at which tensor i begins
    for (int64_t i = 0; i < p.tensor_count && first < end; first += p.tensors[i++].count) {
      const AdamWTensor& t = p.tensors[i];
      const int64_t from = begin > first ? begin - first : 0, to = end - first < t.count ? end - first : t.count;
      if (from >= to) continue;
      visit_float(t.param_dtype, [&](auto param_type) {
        visit_float(t.grad_dtype, [&](auto grad_type) {
          step_range<decltype(param_type), decltype(grad_type)>(t, p.grad_scale, from, to);
        });
      });
    }
  });
}

void sum_squares(const GradNormParams& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.piece_count; ++i) total += p.pieces[i].count;
  const int64_t grain = total ? 1 + p.piece_count * (int64_t{1} << 14) / total : 1;
  parallel_for(p.piece_count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      NormPiece& piece = p.pieces[i];
      visit_float(piece.dtype, [&](auto type) {
        piece.squares = squares_of(static_cast<const decltype(type)*>(piece.data), piece.count);
      });
    }
  });
}

}  // namespace llmfast::LLMFAST_TARGET
