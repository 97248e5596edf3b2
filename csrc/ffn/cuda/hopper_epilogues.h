// ffn's epilogues by boxes (gemm/cuda/hopper_boxes.h).
#pragma once
#include "ffn/cuda/driver.h"
#include "gemm/cuda/hopper_gemm.h"

namespace llmfast::cuda {

// hidden = act(acc + bias); saved = acc + bias.
template <class T>
struct HiddenBoxes {
  static constexpr int kSlabs = 2;
  TensorMap hidden, saved;
  const T* bias;  // or null
  int64_t N;
  Activation activation;
  bool saves;

  __device__ __forceinline__ void box(float (&x)[32], int m, int n, Slabs<kSlabs>& slabs) const {
    if (bias) add_bias(x, bias, n, N);
    if (saves) slabs.store<T>(&saved, x, m, n);
    visit_activation(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < 32; ++i) x[i] = act.both_of(x[i]).value;
    });
    slabs.store<T>(&hidden, x, m, n);
  }
};

// hidden = act(gate) * (up + bias); saved: up + bias, and gate.
template <class T>
struct GatedBoxes {
  static constexpr int kSlabs = 2;
  static constexpr bool kPaired = true;
  TensorMap hidden, saved_up, saved_gate;
  const T* bias;  // or null
  int64_t N;
  Activation activation;
  bool saves;

  __device__ __forceinline__ void box(float (&gate)[32], float (&up)[32], int m, int n, Slabs<kSlabs>& slabs) const {
    if (bias) add_bias(up, bias, n, N);
    if (saves) {
      slabs.store<T>(&saved_up, up, m, n);
      slabs.store<T>(&saved_gate, gate, m, n);
    }
    visit_activation(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < 32; ++i) up[i] *= act.both_of(gate[i]).value;
    });
    slabs.store<T>(&hidden, up, m, n);
  }
};

// As SlopeEpilogue. What is saved is read in the accumulators' layout, all of a box at once.
template <class T, bool kGated>
struct SlopeBoxes {
  static constexpr int kSlabs = 2;
  TensorMap hidden, d_up, d_gate;
  const T *up, *gate;
  int64_t ld_up, ld_gate, M, N;
  Activation activation;

  __device__ __forceinline__ void box(float (&x)[32], int m, int n, Slabs<kSlabs>& slabs) const {
    uint32_t u[16], g[16];
    load_box(u, up, ld_up, m, n, M, N);
    if constexpr (kGated) load_box(g, gate, ld_gate, m, n, M, N);
#pragma unroll
    for (int first = 0; first < 16; first += 4)  // all at once would hold too many registers
      visit_activation(activation, [&](auto act) {
#pragma unroll
        for (int i = first; i < first + 4; ++i) {
          float at[2], by[2], value[2], of_gate[2];
          unpack_pair<T>(u[i], by[0], by[1]);
          if constexpr (kGated) unpack_pair<T>(g[i], at[0], at[1]);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const ValueAndSlope a = act.both_of(kGated ? at[e] : by[e]);
            float& d = x[2 * i + e];
            value[e] = kGated ? a.value * by[e] : a.value;
            of_gate[e] = d * by[e] * a.slope;
            d *= kGated ? a.value : a.slope;
          }
          u[i] = pack_pair<T>(value[0], value[1]);
          if constexpr (kGated) g[i] = pack_pair<T>(of_gate[0], of_gate[1]);
        }
      });
    slabs.store(&hidden, u, m, n);
    slabs.store<T>(&d_up, x, m, n);
    if constexpr (kGated) slabs.store(&d_gate, g, m, n);
  }
};

template <class T>
MappedTensor mapped_rows(const T* data, int64_t ld, GemmShape shape) {
  return mapped_boxes(data, half_dtype<T>(), ld, shape);
}

template <class T>
struct OnHopper<ffn::HiddenEpilogue<T>> {  // never with a gate: see GatedProducts
  template <class Body>
  static void visit(const ffn::HiddenEpilogue<T>& e, GemmShape shape, const Body& body) {
    const TensorMap hidden = make_tensor_map(mapped_rows(e.hidden, e.ld_hidden, shape));
    const TensorMap saved = e.saved ? make_tensor_map(mapped_rows(e.saved, e.ld_saved, shape)) : hidden;
    body(HiddenBoxes<T>{hidden, saved, e.bias, shape.N, e.activation, e.saved != nullptr});
  }
};

template <class T>
struct OnHopper<ffn::SlopeEpilogue<T>> {
  template <class Body>
  static void visit(const ffn::SlopeEpilogue<T>& e, GemmShape shape, const Body& body) {
    const auto map = [&](const T* data) { return make_tensor_map(mapped_rows(data, e.ld, shape)); };
    const TensorMap hidden = map(e.hidden), d_up = map(e.d_up);
    if (e.gate)
      body(SlopeBoxes<T, true>{hidden, d_up, map(e.d_gate), e.up, e.gate, e.ld_up, e.ld_gate, shape.M, shape.N,
                               e.activation});
    else
      body(SlopeBoxes<T, false>{hidden, d_up, d_up, e.up, nullptr, e.ld_up, 0, shape.M, shape.N, e.activation});
  }
};

namespace ffn {

template <>
struct GatedProducts<HopperProduct> {
  template <class T>
  static void run(const Operand& x, const Operand& gate_weight, const Operand& up_weight, GemmShape shape, T* gate,
                  const HiddenEpilogue<T>& e, float*, const Stream& stream) {
    if (shape.M == 0 || shape.N == 0) return;
    const auto map = [&](const T* data, int64_t ld) { return make_tensor_map(mapped_rows(data, ld, shape)); };
    const TensorMap hidden = map(e.hidden, e.ld_hidden);
    HopperProduct::run_paired<T, Major::k, Major::k>(
        x, gate_weight, up_weight, shape,
        GatedBoxes<T>{hidden, e.saved ? map(e.saved, e.ld_saved) : hidden, e.saved ? map(gate, e.ld_gate) : hidden,
                      e.bias, shape.N, e.activation, e.saved != nullptr},
        stream);
  }
};

}  // namespace ffn
}  // namespace llmfast::cuda
