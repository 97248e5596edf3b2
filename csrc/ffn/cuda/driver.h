// ffn by the products of gemm/cuda, whichever one `Product` is; see ffn.h for the maths.
//
// Forward: two products, or three when gated; the nonlinearity, the gate and the copy that the backward pass needs
// happen in the epilogue of the product that feeds them, so that the hidden row is written once and read once.
// Backward: the epilogue of grad * down_weight turns d_hidden into d_up (and d_gate) and rebuilds hidden from the saved
// pre-activations; the rest are plain products and column sums. Scratch: up to three M x F buffers of the op's dtype.
#pragma once
#include "gemm/cuda/activations.h"

#include "ffn/ffn_cuda.h"
#include "gemm/cuda/column_sums.h"
#include "gemm/cuda/gemm.h"
#include "gemm/cuda/hopper_schedule.h"
#include "gemm/cuda/scratch.h"

namespace llmfast::cuda {
namespace ffn {

constexpr int64_t kSlopeRows = 64;  // of d_up, whose sums Hopper's epilogue writes

// Rows of scratch start at whole chunks.
inline int64_t row_elements(int64_t F) { return ceil_div(F, kChunk) * kChunk; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
struct ForwardScratch {
  T *hidden, *gate;
  float* parts;

  ForwardScratch(Scratch& scratch, int64_t M, int64_t C, int64_t F, bool gated, bool saved)
      : hidden(scratch.take<T>(M * row_elements(F))),
        gate(gated && !saved ? scratch.take<T>(M * row_elements(F)) : nullptr),
        parts(scratch.take<float>(most(product_workspace({M, F, C}), product_workspace({M, C, F})))) {}
};

template <class T>
struct BackwardScratch {
  T *hidden, *d_up, *d_gate;
  float *partial_x, *parts;

  BackwardScratch(Scratch& scratch, int64_t M, int64_t C, int64_t F, bool gated)
      : hidden(scratch.take<T>(M * row_elements(F))),
        d_up(scratch.take<T>(M * row_elements(F))),
        d_gate(gated ? scratch.take<T>(M * row_elements(F)) : nullptr),
        partial_x(gated ? scratch.take<float>(M * C) : nullptr) {
    const int64_t whole = gated ? 2 * ceil_div(F, kHopperDepth) * kHopperDepth : F;  // depth of grad_x: GatedGradients
    int64_t floats = most(column_sums_workspace(M, most(C, F)), ceil_div(M, kSlopeRows) * F);
    const GemmShape shapes[] = {{M, F, C}, {C, F, M}, {F, C, M}, {M, C, F}, {M, C, whole}};
    for (const GemmShape& shape : shapes) floats = most(floats, product_workspace(shape));
    parts = scratch.take<float>(floats);
  }
};

// hidden = act(acc + bias), or act(gate) * (acc + bias); saved = acc + bias.
template <class T>
struct HiddenEpilogue {
  Activation activation;
  const T *bias, *gate;  // or null
  T *hidden, *saved;     // saved: or null
  int64_t ld_gate, ld_hidden, ld_saved;

  template <int kLanes>
  __device__ void columns(const float (&acc)[8], int64_t m, int64_t n, int count) const {
    if (count == 0) return;
    float up[8], other[8] = {};
    if (bias) load_columns(other, bias + n, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) up[i] = acc[i] + other[i];
    if (saved) store_columns(saved + m * ld_saved + n, up, count);
    if (gate) load_columns(other, gate + m * ld_gate + n, count);
    visit_activation(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < 8; ++i) up[i] = gate ? act.both_of(other[i]).value * up[i] : act.both_of(up[i]).value;
    });
    store_columns(hidden + m * ld_hidden + n, up, count);
  }
};

// acc = d_hidden; rebuilds hidden, writes d_up and, gated, d_gate.
template <class T>
struct SlopeEpilogue {
  Activation activation;
  const T *up, *gate;  // saved; gate null: plain
  T *hidden, *d_up, *d_gate;
  int64_t ld_up, ld_gate, ld;
  float* bias_sums = nullptr;  // for Hopper's epilogue alone

  template <int kLanes>
  __device__ void columns(const float (&acc)[8], int64_t m, int64_t n, int count) const {
    if (count == 0) return;
    float u[8], g[8], value[8], of_up[8], of_gate[8];
    load_columns(u, up + m * ld_up + n, count);
    if (gate) load_columns(g, gate + m * ld_gate + n, count);
    visit_activation(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const ValueAndSlope a = act.both_of(gate ? g[i] : u[i]);
        value[i] = gate ? a.value * u[i] : a.value;
        of_up[i] = acc[i] * (gate ? a.value : a.slope);
        of_gate[i] = acc[i] * u[i] * a.slope;
      }
    });
    const int64_t at = m * ld + n;
    store_columns(hidden + at, value, count);
    store_columns(d_up + at, of_up, count);
    if (gate) store_columns(d_gate + at, of_gate, count);
  }
};

// d_hidden and what its epilogue makes of it. True: bias_sums [ceil(M / kSlopeRows)][F], unless null, has sums of
// d_up's rows.
template <class Product>
struct SlopeProduct {
  template <class T>
  static bool run(const Operand& grad, const Operand& down_weight, GemmShape shape, const SlopeEpilogue<T>& epilogue,
                  float*, float* parts, const Stream& stream) {
    Product::template run<T, Major::k, Major::mn>(grad, down_weight, shape, epilogue, parts, stream);
    return false;
  }
};

// hidden, and what is saved, of a gated ffn: `epilogue` reads the gate that the first product writes.
template <class Product>
struct GatedProducts {
  template <class T>
  static void run(const Operand& x, const Operand& gate_weight, const Operand& up_weight, GemmShape shape, T* gate,
                  const HiddenEpilogue<T>& epilogue, float* parts, const Stream& stream) {
    Product::template run<T, Major::k, Major::k>(x, gate_weight, shape, StoreEpilogue<T>{gate, epilogue.ld_gate}, parts,
                                                 stream);
    Product::template run<T, Major::k, Major::k>(x, up_weight, shape, epilogue, parts, stream);
  }
};

// grad_x of a gated ffn, the sum of two products, by way of partial_x [M, C].
template <class Product>
struct GatedGradients {
  template <class T>
  static void run(const Operand& d_gate, const Operand& gate_weight, const Operand& d_up, const Operand& up_weight,
                  GemmShape shape, StoreEpilogue<T> store, float* partial_x, float* parts, const Stream& stream) {
    Product::template run<T, Major::k, Major::mn>(d_gate, gate_weight, shape,
                                                  StoreEpilogue<T, float>{partial_x, shape.N}, parts, stream);
    store.addend = partial_x;
    store.ld_addend = shape.N;
    Product::template run<T, Major::k, Major::mn>(d_up, up_weight, shape, store, parts, stream);
  }
};

template <class Product, class T>
void forward(const FfnParams& p, const Stream& stream) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], F = p.up_weight.shape[0], ld = row_elements(F);
  const bool gated = p.gate_weight.defined, saved = p.up.defined;
  Scratch carve(p.workspace.data);
  const ForwardScratch<T> scratch(carve, M, C, F, gated, saved);
  const Operand x = operand(p.x), hidden{scratch.hidden, ld, 1};
  T* gate = saved ? p.gate.as<T>() : scratch.gate;
  const int64_t ld_gate = saved ? p.gate.stride[0] : ld;
  const HiddenEpilogue<T> epilogue{p.activation,   p.up_bias.as<const T>(), gated ? gate : nullptr,
                                   scratch.hidden, p.up.as<T>(),            ld_gate,
                                   ld,             p.up.stride[0]};
  const GemmShape shape{M, F, C};
  if (gated)
    GatedProducts<Product>::run(x, operand(p.gate_weight), operand(p.up_weight), shape, gate, epilogue, scratch.parts,
                                stream);
  else
    Product::template run<T, Major::k, Major::k>(x, operand(p.up_weight), shape, epilogue, scratch.parts, stream);
  Product::template run<T, Major::k, Major::k>(hidden, operand(p.down_weight), {M, C, F},
                                               store_to<T>(p.out, p.down_bias), scratch.parts, stream);
}

template <class Product, class T>
void backward(const FfnBackwardParams& p, const Stream& stream) {
  const int64_t M = p.grad.shape[0], C = p.grad.shape[1], F = p.up_weight.shape[0], ld = row_elements(F);
  const bool gated = p.gate_weight.defined;
  Scratch carve(p.workspace.data);
  const BackwardScratch<T> scratch(carve, M, C, F, gated);
  const auto rows = [&](const T* data) { return Operand{data, ld, 1}; };
  const auto columns = [&](const T* data) { return Operand{data, 1, ld}; };
  const bool summed = SlopeProduct<Product>::template run<T>(
      operand(p.grad), operand_transposed(p.down_weight), {M, F, C},
      SlopeEpilogue<T>{p.activation, p.up.as<const T>(), p.gate.as<const T>(), scratch.hidden, scratch.d_up,
                       scratch.d_gate, p.up.stride[0], p.gate.stride[0], ld},
      p.grad_up_bias.defined ? scratch.parts : nullptr, scratch.parts, stream);
  if (summed && p.grad_up_bias.defined)
    add_column_parts<Product>(scratch.parts, ceil_div(M, kSlopeRows), F, p.grad_up_bias.as<T>(), stream);

  const auto weight_gradient = [&](const Operand& a, const Operand& b, GemmShape shape, const TensorView& out) {
    if (out.defined)
      Product::template run<T, Major::mn, Major::mn>(a, b, shape, store_to<T>(out), scratch.parts, stream);
  };
  weight_gradient(operand_transposed(p.grad), columns(scratch.hidden), {C, F, M}, p.grad_down_weight);
  weight_gradient(columns(scratch.d_up), operand_transposed(p.x), {F, C, M}, p.grad_up_weight);
  if (gated) weight_gradient(columns(scratch.d_gate), operand_transposed(p.x), {F, C, M}, p.grad_gate_weight);
  if (p.grad_down_bias.defined)
    column_sums<Product>(p.grad.as<const T>(), p.grad.stride[0], p.grad.stride[1], M, C, p.grad_down_bias.as<T>(),
                         scratch.parts, stream);
  if (!summed && p.grad_up_bias.defined)
    column_sums<Product>(scratch.d_up, ld, 1, M, F, p.grad_up_bias.as<T>(), scratch.parts, stream);
  if (!p.grad_x.defined) return;

  const GemmShape shape{M, C, F};
  const Operand up_weight = operand_transposed(p.up_weight);
  const StoreEpilogue<T> store = store_to<T>(p.grad_x);
  if (gated)
    GatedGradients<Product>::run(rows(scratch.d_gate), operand_transposed(p.gate_weight), rows(scratch.d_up), up_weight,
                                 shape, store, scratch.partial_x, scratch.parts, stream);
  else
    Product::template run<T, Major::k, Major::mn>(rows(scratch.d_up), up_weight, shape, store, scratch.parts, stream);
}

}  // namespace ffn
}  // namespace llmfast::cuda
