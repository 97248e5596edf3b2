// linear_cross_entropy on the shared GEMM core; see linear_cross_entropy.h for the maths.
//
// The vocabulary is taken in chunks of kChunk rows of weight, small enough that a packed chunk stays in cache while all of
// x passes over it.
// Forward: the epilogue folds each row's logits into a running reference maximum and, lane by lane, a sum of powers of two
// relative to it. The reference moves only when a logit exceeds it by more than 2^kSlack, so the usual path has no
// horizontal operation. Threads share rows, never a row.
// Few rows are not worth packing the weight: their logits of a chunk are computed as linear's are, and folded afterwards.
// Backward: a chunk's logits are computed again and turned into d_logits [M, kChunk] in the operands' dtype, which feeds
// both products: grad_weight's rows of this chunk are written once, grad_x is summed in float32 over the chunks.
#include "linear_cross_entropy/linear_cross_entropy.h"

#include "gemm/product.h"
#include "simd/math.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kChunk = 2048;
constexpr float kSlack = 30.0f;

// Running log-sum-exp of a row, in powers of two: sum = reference-relative, one partial sum a lane.
struct RowState {
  float reference = -3.0e38f;
  float target_logit = 0.0f;
  float sums[Vec::kLanes] = {};
};

struct LogSumExpEpilogue {
  RowState* rows;
  const int64_t* target;
  int64_t first;  // column of the vocabulary at which this product starts

  void row(const float* acc, int64_t m, int64_t n, int64_t count) const {
    RowState& state = rows[m];
    const int64_t t = target[m] - first - n;
    if (t >= 0 && t < count) state.target_logit = acc[t];
    const Vec scale = Vec::set(kLog2E);
    const Vec limit = Vec::set(state.reference + kSlack);
    Vec top = limit;
    for_each_vec(count, [&](int64_t i, auto lanes) { top = max(valid(Vec::load(acc + i) * scale, lanes), top); });
    if (__builtin_expect(any(gt(top, limit)), 0)) raise_reference(state, acc, count);
    const Vec reference = Vec::set(state.reference);
    Vec sums = Vec::load(state.sums);
    for_each_vec(count, [&](int64_t i, auto lanes) {
      const Vec x = valid(Vec::load(acc + i) * scale, lanes);
      sums = sums + exp2(x - reference);
    });
    sums.store(state.sums);
  }

 private:
  // Absent lanes must not count: they get a logit whose power of two vanishes beside any real one.
  static Vec valid(Vec x, AllLanes) { return x; }
  static Vec valid(Vec x, FirstLanes lanes) {
    return select(lt(Vec::iota(), Vec::set(static_cast<float>(lanes.n))), x, Vec::set(-3.0e38f));
  }
  static void raise_reference(RowState& state, const float* acc, int64_t count) {
    float top = state.reference;
    for (int64_t i = 0; i < count; ++i) top = acc[i] * kLog2E > top ? acc[i] * kLog2E : top;
    const float shift = state.reference - top;
    (Vec::load(state.sums) * exp2(Vec::set(shift < -126.0f ? -126.0f : shift))).store(state.sums);
    state.reference = top;
  }
};

template <class T>
struct LogitGradientEpilogue {
  const float* lse;   // natural logarithm
  const float* grad;
  const int64_t* target;
  int64_t first, ignore_index;
  T* d_logits;  // [M, ld]
  int64_t ld;

  void row(const float* acc, int64_t m, int64_t n, int64_t count) const {
    const float g = target[m] == ignore_index ? 0.0f : grad[m];
    const Vec scale = Vec::set(kLog2E), shift = Vec::set(lse[m] * kLog2E), weight = Vec::set(g);
    const Vec t = Vec::set(static_cast<float>(target[m] - first - n));  // far outside [0, count) if elsewhere
    T* out = d_logits + m * ld + n;
    for_each_vec(count, [&](int64_t i, auto lanes) {
      const Vec p = exp2(Vec::load(acc + i) * scale - shift);
      const Vec here = select(eq(Vec::iota() + Vec::set(static_cast<float>(i)), t), Vec::set(1.0f), Vec::zero());
      lanes.store(weight * (p - here), out + i);
    });
  }
};

inline int64_t chunk_end(int64_t begin, int64_t V) { return V - begin < kChunk ? V : begin + kChunk; }

}  // namespace

void linear_cross_entropy_forward(const LinearCrossEntropyParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], V = p.weight.shape[0], most = kChunk < V ? kChunk : V;
  auto* rows = workspace<RowState>(Slot::reduction, M);
  for (int64_t m = 0; m < M; ++m) rows[m] = RowState{};
  const auto* target = p.target.as<const int64_t>();
  const int threads = threads_for(M, 2 * Kernel::kRows);
  const bool few = M <= Kernel::kFewRows;
  Kernel::Packed* packed = few ? nullptr : workspace<Kernel::Packed>(Slot::packed_b, packed_b_elements(most, C) + 64);
  float* logits = few ? workspace<float>(Slot::hidden, M * most + Vec::kLanes) : nullptr;
  for (int64_t v = 0; v < V; v = chunk_end(v, V)) {
    const int64_t count = chunk_end(v, V) - v;
    const MatrixRef weight = matrix(p.weight).offset(v, 0).transposed();
    const LogSumExpEpilogue epilogue{rows, target, v};
    if (few) {
      gemm(matrix(p.x), weight, {M, count, C}, StoreEpilogue<float>{logits, most, nullptr});
      parallel_for(M, 1 + (int64_t{1} << 13) / count, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) epilogue.row(logits + m * most, m, 0, count);
      });
      continue;
    }
    pack_b(packed, weight, count, C);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Kernel::ThreadState state;
      (void)state;
      const Range mine = slice(M, omp_get_thread_num(), omp_get_num_threads(), Kernel::kRows);
      gemm_rectangle(matrix(p.x), packed, C, mine, {0, count}, epilogue);
    }
  }
  auto *losses = p.losses.as<float>(), *lse = p.lse.as<float>();
  for (int64_t m = 0; m < M; ++m) {
    lse[m] = (rows[m].reference + __builtin_log2f(reduce_add(Vec::load(rows[m].sums)))) * kLn2;
    losses[m] = target[m] == p.ignore_index ? 0.0f : lse[m] - rows[m].target_logit;
  }
}

void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], V = p.weight.shape[0];
  const int64_t most = kChunk < V ? kChunk : V;
  const auto* target = p.target.as<const int64_t>();
  visit_float(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    T* d_logits = workspace<T>(Slot::hidden, M * most);
    const bool few = M <= Kernel::kFewRows;
    // x as the right operand of grad_weight is the same for every chunk: packed once, beside the chunk's own weights
    const bool packs_x = p.grad_weight.defined && !few;
    const int64_t packed_x_size = packs_x ? round_up(packed_b_elements(C, M), 64) : 0;
    auto* packed_x = workspace<Kernel::Packed>(Slot::staging, packed_x_size + (few ? 0 : packed_b_elements(most, C)) + 64);
    auto* packed_weight = packed_x + packed_x_size;
    if (packs_x) pack_b(packed_x, matrix(p.x), C, M);
    float* sum_x = p.grad_x.defined ? workspace<float>(Slot::reduction, M * C) : nullptr;

    for (int64_t v = 0; v < V; v = chunk_end(v, V)) {
      const int64_t count = chunk_end(v, V) - v;
      const MatrixRef weight = matrix(p.weight).offset(v, 0);
      const LogitGradientEpilogue<T> differentiate{p.lse.as<const float>(), p.grad.as<const float>(), target, v, p.ignore_index,
                                                   d_logits, most};
      if (few) {
        gemm(matrix(p.x), weight.transposed(), {M, count, C}, differentiate);
      } else {
        pack_b(packed_weight, weight.transposed(), count, C);
        gemm_packed(matrix(p.x), packed_weight, {M, count, C}, differentiate);
      }
      const MatrixRef d = {d_logits, p.x.dtype, most, 1};
      if (p.grad_weight.defined) {
        const int64_t ld = p.grad_weight.stride[0];
        const StoreEpilogue<T> store{p.grad_weight.as<T>() + v * ld, ld, nullptr};
        if (few) gemm(d.transposed(), matrix(p.x), {count, C, M}, store);
        else gemm_packed(d.transposed(), packed_x, {count, C, M}, store);
      }
      if (!p.grad_x.defined) continue;
      if (count == V) {
        gemm(d, weight, {M, C, count}, StoreEpilogue<T>{p.grad_x.as<T>(), p.grad_x.stride[0], nullptr});
      } else if (v == 0) {
        gemm(d, weight, {M, C, count}, StoreEpilogue<float>{sum_x, C, nullptr});
      } else if (v + count < V) {
        gemm(d, weight, {M, C, count}, AccumulateEpilogue{sum_x, C});
      } else {
        gemm(d, weight, {M, C, count}, AddStoreEpilogue<T>{p.grad_x.as<T>(), p.grad_x.stride[0], sum_x, C});
      }
    }
  });
}

}  // namespace llmfast::LLMFAST_TARGET
