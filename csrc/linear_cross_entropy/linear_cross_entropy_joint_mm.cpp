// linear_cross_entropy's loss and gradients in one pass; see linear_cross_entropy.h for the maths.
//
// Three products instead of the four that a forward and a backward pass take, and one exponential a logit. Everything is
// transposed: classes in rows, tokens in lanes, so no sum runs across lanes, and weight is the left operand, whose packing
// is a copy. For a block of R tokens:
//   1. logits^T = weight x^T by chunks of kChunk classes; the epilogue keeps 2^(logit - reference) in float32 and sums it.
//      A token's reference moves only when a logit exceeds it by more than 2^kSlack; the chunk's powers then move along.
//   2. Each token's loss, and for each chunk the factor that makes its powers gradients.
//   3. By chunks again: d_logits^T[kChunk, R] in the operands' dtype, grad_weight[chunk] += d_logits^T x,
//      grad_x += d_logits weight[chunk].
// Threads share a chunk's classes, each with references and sums of its own, or the tokens where classes are few.
// grad_weight is summed over the blocks in float32: in its own memory if it is float32, else in `workspace`, and rounded
// once, by the last block. `ld` is no multiple of a large power of two: a tile's rows would meet in one cache set.
// Measured (2026-11-26, Zen 4, one core, 1024 x 768 x 50304): 193 GFLOP/s in bf16, 97 in fp32, 1.33 and 1.41 times the
// two passes; see benchmarks/LOG.md.
#include "gemm/product.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "simd/math.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kChunk = 2048;
constexpr float kSlack = 30.0f;
constexpr float kNoReference = -3.0e38f;

inline int64_t chunk_end(int64_t begin, int64_t V) { return V - begin < kChunk ? V : begin + kChunk; }

// Running sums of powers of two: an array of floats each, a token a lane.
struct Tokens {
  float *reference, *sum, *target_logit;  // of one thread's share of the classes; logits in powers of two
  const float* target;                    // class, -1 if ignored
};

struct PowersEpilogue {
  Tokens tokens;
  float* powers;  // of this chunk [.., ld]
  int64_t ld;
  int64_t first;  // class at which the chunk starts
  int64_t begin;  // row of the chunk at which this thread's share does

  // Whole registers: lanes beyond `count` hold logits of zero, and the arrays have room for them.
  void row(const float* acc, int64_t v, int64_t m0, int64_t count) const {
    const Vec label = Vec::set(static_cast<float>(first + v));
    for (int64_t i = 0; i < count; i += Vec::kLanes) {
      const int64_t m = m0 + i;
      const Vec x = Vec::load(acc + i) * Vec::set(kLog2E);
      Vec reference = Vec::load(tokens.reference + m);
      if (__builtin_expect(any(gt(x, reference + Vec::set(kSlack))), 0)) reference = raise(x, v, m);
      const Mask is_target = eq(Vec::load(tokens.target + m), label);
      if (__builtin_expect(any(is_target), 0))
        select(is_target, x, Vec::load(tokens.target_logit + m)).store(tokens.target_logit + m);
      const Vec power = exp2(x - reference);
      (Vec::load(tokens.sum + m) + power).store(tokens.sum + m);
      power.store(powers + v * ld + m);
    }
  }

 private:
  __attribute__((noinline)) Vec raise(Vec x, int64_t v, int64_t m) const {
    const Vec old = Vec::load(tokens.reference + m);
    const Vec reference = select(gt(x, old + Vec::set(kSlack)), x, old);
    const Vec factor = exp2(old - reference);
    (Vec::load(tokens.sum + m) * factor).store(tokens.sum + m);
    for (int64_t row = begin; row < v; ++row) {
      float* at = powers + row * ld + m;
      (Vec::load(at) * factor).store(at);
    }
    reference.store(tokens.reference + m);
    return reference;
  }
};

// How threads share logits^T.
struct Parts {
  int classes, tokens;

  static Parts of(int64_t classes, int64_t multiplications) {
    const int threads = threads_for(multiplications, 1 << 17);
    return classes >= threads * 8 * Kernel::kRows ? Parts{threads, 1} : Parts{1, threads};
  }
  Range classes_of(int64_t count, int part) const { return slice(count, part, classes, Kernel::kRows); }
  Range tokens_of(int64_t R, int part) const { return slice(R, part, tokens, Kernel::kCols); }
};

// A block of tokens and its scratch; T: the operands' element type.
template <class T>
struct Block {
  const LinearCrossEntropyJointParams& p;
  int64_t R, C, V, ld;
  MatrixRef x;
  const int64_t* target;
  Parts parts;
  float *reference = nullptr, *sum = nullptr, *target_logit = nullptr;  // [parts.classes][ld]
  float* labels = nullptr;                                              // [ld]
  float* factors = nullptr;  // [chunks][parts.classes][ld]; at first the references at the chunk's end
  float* powers = nullptr;   // [V, ld]
  T* d_logits = nullptr;     // [kChunk, ld]
  float* sum_x = nullptr;    // [R, C]
  Kernel::Packed *packed_xt = nullptr, *packed_x = nullptr;

  float* factors_of(int64_t v, int part) const { return factors + (v / kChunk * parts.classes + part) * ld; }
};

template <class T>
void logits(const Block<T>& b) {
  for (int64_t m = 0; m < b.ld; ++m)
    b.labels[m] = m < b.R && b.target[m] != b.p.ignore_index ? static_cast<float>(b.target[m]) : -1.0f;
  for (int64_t i = 0; i < b.parts.classes * b.ld; ++i) {
    b.reference[i] = kNoReference;
    b.sum[i] = b.target_logit[i] = 0.0f;
  }
  pack_b(b.packed_xt, b.x.transposed(), b.R, b.C);
  for_each_part(b.parts.classes * b.parts.tokens, [&](int index) {
    Kernel::ThreadState state;
    (void)state;
    const int part = index / b.parts.tokens;
    const Range tokens = b.parts.tokens_of(b.R, index % b.parts.tokens);
    const Tokens mine{b.reference + part * b.ld, b.sum + part * b.ld, b.target_logit + part * b.ld, b.labels};
    for (int64_t v = 0; v < b.V; v = chunk_end(v, b.V)) {
      const Range classes = b.parts.classes_of(chunk_end(v, b.V) - v, part);
      const PowersEpilogue epilogue{mine, b.powers + v * b.ld, b.ld, v, classes.begin};
      gemm_rectangle(matrix(b.p.weight).offset(v, 0), b.packed_xt, b.C, classes, tokens, epilogue);
      float* references = b.factors_of(v, part);
      for (int64_t m = tokens.begin; m < tokens.end; ++m) references[m] = mine.reference[m];
    }
  });
}

// The block's share of the loss's sum. References become factors: a power times its factor is the gradient of its logit,
// but for the target's, which lacks `grad`.
template <class T>
double losses(const Block<T>& b, float grad) {
  double loss = 0;
  for (int64_t m = 0; m < b.R; ++m) {
    float reference = b.reference[m], sum = b.sum[m], target_logit = b.target_logit[m];
    for (int part = 1; part < b.parts.classes; ++part) {
      const float other = b.reference[part * b.ld + m], top = other > reference ? other : reference;
      sum = sum * __builtin_exp2f(reference - top) + b.sum[part * b.ld + m] * __builtin_exp2f(other - top);
      reference = top;
      target_logit += b.target_logit[part * b.ld + m];  // zero but for one part
    }
    const bool counts = b.labels[m] >= 0.0f;
    if (counts) loss += (reference + __builtin_log2f(sum) - target_logit) * kLn2;
    b.sum[m] = counts ? grad / sum : 0.0f;
    b.reference[m] = reference;
  }
  for (int64_t v = 0; v < b.V; v = chunk_end(v, b.V))
    for (int part = 0; part < b.parts.classes; ++part) {
      float* factors = b.factors_of(v, part);
      for_each_vec(b.R, [&](int64_t m, auto lanes) {
        lanes.store(exp2(lanes.load(factors + m) - lanes.load(b.reference + m)) * lanes.load(b.sum + m), factors + m);
      });
    }
  return loss;
}

// d_logits^T of classes [v, v + count).
template <class T>
void differentiate(const Block<T>& b, int64_t v, int64_t count, float grad) {
  const float* powers = b.powers + v * b.ld;
  parallel_for(count, 1 + (int64_t{1} << 14) / b.R, [&](int64_t begin, int64_t end) {
    for (int part = 0; part < b.parts.classes; ++part) {
      const Range classes = b.parts.classes_of(count, part);
      const float* factors = b.factors_of(v, part);
      for (int64_t row = begin > classes.begin ? begin : classes.begin; row < end && row < classes.end; ++row)
        for_each_vec(b.R, [&](int64_t m, auto lanes) {
          lanes.store(lanes.load(powers + row * b.ld + m) * lanes.load(factors + m), b.d_logits + row * b.ld + m);
        });
    }
  });
  for (int64_t m = 0; m < b.R; ++m) {
    const int64_t row = b.target[m] - v;
    if (row < 0 || row >= count || b.labels[m] < 0.0f) continue;
    int part = 0;
    while (row >= b.parts.classes_of(count, part).end) ++part;
    Vec::set(powers[row * b.ld + m] * b.factors_of(v, part)[m] - grad).store_n(b.d_logits + row * b.ld + m, 1);
  }
}

// One of several products with one sum: `sum` in float32, the last leaves it rounded in `out`.
template <class T, class Product>
void add_product(const Product& product, T* out, float* sum, int64_t ld, bool first, bool last) {
  if (first && last) product(StoreEpilogue<T>{out, ld, nullptr});
  else if (first) product(StoreEpilogue<float>{sum, ld, nullptr});
  else if (last) product(AddStoreEpilogue<T>{out, ld, sum, ld});
  else product(AccumulateEpilogue{sum, ld});
}

template <class T>
void gradients(const Block<T>& b, int64_t m0, float grad) {
  const TensorView &grad_x = b.p.grad_x, &grad_weight = b.p.grad_weight, &sums = b.p.workspace;
  const bool first_block = m0 == 0, last_block = m0 + b.R == b.p.x.shape[0];
  if (grad_weight.defined) pack_b(b.packed_x, b.x, b.C, b.R);
  for (int64_t v = 0; v < b.V; v = chunk_end(v, b.V)) {
    const int64_t count = chunk_end(v, b.V) - v;
    differentiate(b, v, count, grad);
    const MatrixRef dt = {b.d_logits, b.p.x.dtype, b.ld, 1};
    if (grad_weight.defined) {
      T* out = grad_weight.as<T>() + v * b.C;
      float* sum = sums.defined ? sums.as<float>() + v * b.C : reinterpret_cast<float*>(out);
      add_product([&](EpilogueRef epilogue) { gemm_packed(dt, b.packed_x, {count, b.C, b.R}, epilogue); }, out, sum, b.C,
                  first_block, last_block);
    }
    if (grad_x.defined) {
      const MatrixRef weight = matrix(b.p.weight).offset(v, 0);
      add_product([&](EpilogueRef epilogue) { gemm(dt.transposed(), weight, {b.R, b.C, count}, epilogue); },
                  grad_x.as<T>() + m0 * b.C, b.sum_x, b.C, v == 0, v + count == b.V);
    }
  }
}

template <class T>
void run(const LinearCrossEntropyJointParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], V = p.weight.shape[0];
  const auto* target = p.target.as<const int64_t>();
  int64_t counted = 0;
  for (int64_t m = 0; m < M; ++m) counted += target[m] != p.ignore_index;
  const float grad = p.mean && counted ? 1.0f / static_cast<float>(counted) : 1.0f;

  const int64_t most = kChunk < V ? kChunk : V, chunks = (V + kChunk - 1) / kChunk;
  const int64_t rows = round_up(p.rows < M ? p.rows : M, Kernel::kCols), ld = rows + 16;
  Block<T> b{p, rows, C, V, ld, matrix(p.x), target, Parts::of(most, rows * most * C)};
  b.powers = workspace<float>(Slot::hidden, (V + most) * ld);
  b.d_logits = reinterpret_cast<T*>(b.powers + V * ld);
  b.reference = workspace<float>(Slot::norm_vectors, (1 + (3 + chunks) * b.parts.classes) * ld);
  b.sum = b.reference + b.parts.classes * ld;
  b.target_logit = b.sum + b.parts.classes * ld;
  b.labels = b.target_logit + b.parts.classes * ld;
  b.factors = b.labels + ld;
  b.sum_x = workspace<float>(Slot::reduction, rows * C);
  b.packed_xt = workspace<Kernel::Packed>(Slot::staging, packed_b_elements(rows, C) + packed_b_elements(C, rows) + 64);
  b.packed_x = b.packed_xt + round_up(packed_b_elements(rows, C), 32);

  double sum = 0;
  for (int64_t m = 0; m < M; m += rows) {
    b.R = M - m < rows ? M - m : rows;
    b.x = matrix(p.x).offset(m, 0);
    b.target = target + m;
    logits(b);
    sum += losses(b, grad);
    gradients(b, m, grad);
  }
  *p.loss.as<float>() = static_cast<float>(p.mean ? sum / static_cast<double>(counted) : sum);
}

}  // namespace

void linear_cross_entropy_joint(const LinearCrossEntropyJointParams& p) {
  if (p.x.dtype == DType::bf16) run<bf16>(p);
  else run<float>(p);
}

}  // namespace llmfast::LLMFAST_TARGET
