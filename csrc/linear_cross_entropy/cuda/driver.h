// linear_cross_entropy by the products of gemm/cuda, whichever one `Product` is; see linear_cross_entropy.h for the
// maths.
//
// The vocabulary is taken in chunks. Forward: the epilogue reduces each row's columns of a warp (32 or 64 of them) to a
// maximum and a sum of powers of two relative to it, written to parts[column group][M]; a second kernel folds a chunk's
// parts into each row's running pair, in ascending order. Logits stay in registers.
// Backward: a chunk's logits are computed again and turned into d_logits [M, chunk] in the operands' dtype, which feeds
// both products: grad_weight's rows of the chunk are written once, grad_x is summed in float32 over the chunks, in
// order. Everything is deterministic.
#pragma once
#include "linear_cross_entropy/linear_cross_entropy_cuda.h"

#include "gemm/cuda/gemm.h"
#include "gemm/cuda/hopper_schedule.h"
#include "gemm/cuda/scratch.h"
#include "ptx/math.h"
#include "ptx/warp.h"

namespace llmfast::cuda {
namespace cross_entropy {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
constexpr float kLowest = -3.0e38f;
constexpr int64_t kForwardParts = 128;                    // of a row's columns in a chunk of the vocabulary
constexpr int64_t kGradientElements = int64_t{1} << 27;  // of d_logits: large products, a bounded buffer

// A row's logits so far, in powers of two: sum of 2^(logit - top).
struct alignas(8) LogSum {
  float top, sum;
};

// Columns of the vocabulary whose gradients are in memory at a time: of the counts that kGradientElements allows, or
// half as many again, the one with the cheapest products, which fill whole rounds of multiprocessors, and passes over
// sum_x.
inline int64_t backward_chunk(int64_t M, int64_t C, int64_t V) {
  constexpr int64_t kUnit = 128, kBytesAClock = 1600;
  const auto clocks = [&](int64_t count) {
    if (count == 0) return int64_t{0};
    return hopper_plan({M, C, count}, true).clocks + hopper_plan({count, C, M}, true).clocks + 8 * M * C / kBytesAClock;
  };
  const int64_t fits = kGradientElements / (M > 0 ? M : 1) / kUnit, least = fits < 16 ? 16 : fits;
  if (least * kUnit >= V) return V;
  int64_t best = 0, cheapest = 0;
  for (int64_t units = least; units <= least + least / 2; ++units) {
    const int64_t chunk = units * kUnit, all = V / chunk * clocks(chunk) + clocks(V % chunk);
    if (best == 0 || all < cheapest) best = chunk, cheapest = all;
  }
  return best < V ? best : V;
}

struct ForwardScratch {
  LogSum *parts, *rows;
  float* target_logits;

  ForwardScratch(Scratch& scratch, int64_t M)
      : parts(scratch.take<LogSum>(M * kForwardParts)),
        rows(scratch.take<LogSum>(M)),
        target_logits(scratch.take<float>(M)) {}
};

template <class T>
struct BackwardScratch {
  T* d_logits;
  float *sum_x, *parts;
  int64_t ld;

  BackwardScratch(Scratch& scratch, int64_t M, int64_t C, int64_t V) {
    const int64_t chunk = backward_chunk(M, C, V), last = V % chunk;
    ld = ceil_div(chunk, kChunk) * kChunk;
    d_logits = scratch.take<T>(M * ld);
    sum_x = scratch.take<float>(M * C);
    int64_t most = 0;
    for (const int64_t count : {chunk, last})
      for (const GemmShape shape : {GemmShape{M, C, count}, GemmShape{count, C, M}})
        most = product_workspace(shape) > most ? product_workspace(shape) : most;
    parts = scratch.take<float>(most);
  }
};

struct LogSumEpilogue {
  LogSum* parts;
  float* target_logits;
  const int64_t* target;
  int64_t M, first;  // column of the vocabulary at which this chunk starts

  template <int kLanes>
  __device__ void columns(const float (&acc)[8], int64_t m, int64_t n, int count) const {
    float top = kLowest, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) top = fmaxf(top, acc[i] * kLog2E);
    top = group_max<kLanes>(top);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) sum += exp2_approx(fmaf(acc[i], kLog2E, -top));
    sum = group_sum<kLanes>(sum);
    if (count == 0) return;
    if (lane() % kLanes == 0) parts[n / (8 * kLanes) * M + m] = {top, sum};
    const int64_t here = target[m] - first - n;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count && here == i) target_logits[m] = acc[i];
  }
};

constexpr int kRowThreads = 128;

// rows = rows and the chunk's parts; with the last chunk, losses and lse.
template <class Product>
__global__ void __launch_bounds__(kRowThreads)
    fold_parts_kernel(const LogSum* parts, LogSum* rows, const float* target_logits, const int64_t* target, int64_t M,
                      int64_t V, int count, bool is_first, bool is_last, int64_t ignore_index, float* losses,
                      float* lse) {
  const int64_t m = blockIdx.x * int64_t{kRowThreads} + thread();
  if (m >= M) return;
  LogSum row = is_first ? LogSum{kLowest, 0.0f} : rows[m];
#pragma unroll 8
  for (int i = 0; i < count; ++i) {  // eight loads at once: a row has one thread
    const LogSum part = parts[i * M + m];
    const float top = fmaxf(row.top, part.top);
    row.sum = row.sum * exp2_approx(row.top - top) + part.sum * exp2_approx(part.top - top);
    row.top = top;
  }
  rows[m] = row;
  if (!is_last) return;
  const float total = (row.top + log2f(row.sum)) * kLn2;
  const int64_t t = target[m];
  lse[m] = total;
  losses[m] = t == ignore_index ? 0.0f : t < 0 || t >= V ? __uint_as_float(0x7fc00000u) : total - target_logits[m];
}

// d_logits = grad (exp(logit - lse) - [column is the target])
template <class T>
struct LogitGradientEpilogue {
  const float *lse, *grad;
  const int64_t* target;
  int64_t first, ignore_index;
  T* d_logits;
  int64_t ld;

  template <int kLanes>
  __device__ void columns(const float (&acc)[8], int64_t m, int64_t n, int count) const {
    if (count == 0) return;
    const int64_t t = target[m], here = t - first - n;
    const float weight = t == ignore_index ? 0.0f : grad[m], shift = lse[m] * kLog2E;
    float d[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      d[i] = weight * (exp2_approx(fmaf(acc[i], kLog2E, -shift)) - (here == i ? 1.0f : 0.0f));
    store_columns(d_logits + m * ld + n, d, count);
  }
};

template <class Product, class T>
void forward(const LinearCrossEntropyParams& p, const Stream& stream) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], V = p.weight.shape[0];
  Scratch carve(p.workspace.data);
  const ForwardScratch scratch(carve, M);
  const auto* target = p.target.as<const int64_t>();
  constexpr int64_t kColumns = kForwardParts * Product::kLeastColumnsTogether;
  for (int64_t v = 0; v < V; v += kColumns) {
    const int64_t count = V - v < kColumns ? V - v : kColumns;
    const GemmShape shape{M, count, C};
    const int64_t group = Product::template columns_together<T>(shape);
    Operand weight = operand(p.weight);
    weight.data = p.weight.as<const T>() + v * weight.stride_mn;
    Product::template run<T, Major::k, Major::k>(
        operand(p.x), weight, shape, LogSumEpilogue{scratch.parts, scratch.target_logits, target, M, v}, nullptr,
        stream);
    launch(stream, {static_cast<unsigned>(ceil_div(M, kRowThreads))}, kRowThreads, 0, fold_parts_kernel<Product>,
           scratch.parts, scratch.rows, scratch.target_logits, target, M, V, static_cast<int>(ceil_div(count, group)),
           v == 0, v + count == V, p.ignore_index, p.losses.as<float>(), p.lse.as<float>());
  }
}

template <class Product, class T>
void backward(const LinearCrossEntropyBackwardParams& p, const Stream& stream) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], V = p.weight.shape[0], chunk = backward_chunk(M, C, V);
  Scratch carve(p.workspace.data);
  const BackwardScratch<T> scratch(carve, M, C, V);
  for (int64_t v = 0; v < V; v += chunk) {
    const int64_t count = V - v < chunk ? V - v : chunk;
    Operand weight = operand(p.weight), weight_transposed = operand_transposed(p.weight);
    weight.data = weight_transposed.data = p.weight.as<const T>() + v * weight.stride_mn;
    Product::template run<T, Major::k, Major::k>(
        operand(p.x), weight, {M, count, C},
        LogitGradientEpilogue<T>{p.lse.as<const float>(), p.grad.as<const float>(), p.target.as<const int64_t>(), v,
                                 p.ignore_index, scratch.d_logits, scratch.ld},
        nullptr, stream);
    const Operand rows{scratch.d_logits, scratch.ld, 1}, columns{scratch.d_logits, 1, scratch.ld};
    if (p.grad_weight.defined) {
      const int64_t ld = p.grad_weight.stride[0];
      Product::template run<T, Major::mn, Major::mn>(columns, operand_transposed(p.x), {count, C, M},
                                                     StoreEpilogue<T>{p.grad_weight.as<T>() + v * ld, ld},
                                                     scratch.parts, stream);
    }
    if (!p.grad_x.defined) continue;
    const float* before = v > 0 ? scratch.sum_x : nullptr;
    if (v + count < V)
      Product::template run<T, Major::k, Major::mn>(rows, weight_transposed, {M, C, count},
                                                    StoreEpilogue<T, float>{scratch.sum_x, C, nullptr, before, C},
                                                    scratch.parts, stream);
    else
      Product::template run<T, Major::k, Major::mn>(
          rows, weight_transposed, {M, C, count},
          StoreEpilogue<T>{p.grad_x.as<T>(), p.grad_x.stride[0], nullptr, before, C}, scratch.parts, stream);
  }
}

}  // namespace cross_entropy
}  // namespace llmfast::cuda
