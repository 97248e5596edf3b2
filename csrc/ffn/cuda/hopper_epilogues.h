// ffn's epilogues by boxes (gemm/cuda/hopper_boxes.h).
#pragma once
#include "ffn/cuda/driver.h"
#include "gemm/cuda/hopper_gemm.h"

namespace llmfast::cuda {

// hidden = act(acc + bias); saved = acc + bias. Act: gemm/cuda/activations.h.
template <class T, class Act>
struct HiddenBoxes {
  static constexpr int kSlabs = 2;
  static constexpr bool kBias = true, kPingPong = true;
  TensorMap hidden, saved;
  const T* bias;  // or null
  int64_t N;
  Act activation;
  bool saves;

  __device__ __forceinline__ void box(float (&x)[32], int m, int n, Slabs<kSlabs>& slabs) const {
    if (bias) slabs.template add_bias<T>(x, n);
    if (saves) slabs.template store<T>(&saved, x, m, n);
    activation.visit([&](auto act) {
#pragma unroll
      for (int i = 0; i < 32; ++i) x[i] = act.both_of(x[i]).value;
    });
    slabs.template store<T>(&hidden, x, m, n);
  }
};

// hidden = act(gate) * (up + bias); saved: up + bias, and gate.
template <class T, class Act>
struct GatedBoxes {
  static constexpr int kSlabs = 2;
  static constexpr bool kPaired = true, kBias = true, kPingPong = true;
  TensorMap hidden, saved_up, saved_gate;
  const T* bias;  // or null
  int64_t N;
  Act activation;
  bool saves;

  __device__ __forceinline__ void box(float (&gate)[32], float (&up)[32], int m, int n, Slabs<kSlabs>& slabs) const {
    if (bias) slabs.template add_bias<T>(up, n);
    if (saves) {
      slabs.template store<T>(&saved_up, up, m, n);
      slabs.template store<T>(&saved_gate, gate, m, n);
    }
    activation.visit([&](auto act) {
#pragma unroll
      for (int i = 0; i < 32; ++i) up[i] *= act.both_of(gate[i]).value;
    });
    slabs.template store<T>(&hidden, up, m, n);
  }
};

// As SlopeEpilogue. What is saved is in shared memory by the time that it is needed.
template <class T, bool kGated, class Act>
struct SlopeBoxes {
  static constexpr int kSlabs = 2, kRead = kGated ? 2 : 1;
  TensorMap hidden, d_up, d_gate, up, gate;
  Act activation;
  float* bias_sums;  // [ceil(M / 64)][N], of d_up's rows; or null
  int64_t M, N;

  __device__ const TensorMap* read(int which) const { return which == 0 ? &up : &gate; }

  __device__ __forceinline__ void box(float (&x)[32], int m, int n, Slabs<kSlabs, kRead>& slabs) const {
    uint32_t u[16], g[16];
    slabs.await();
    slabs.load(u, 0);
    if constexpr (kGated) slabs.load(g, 1);
#pragma unroll
    for (int first = 0; first < 16; first += 8)  // all at once would hold too many registers
      activation.visit([&](auto act) {
#pragma unroll
        for (int i = first; i < first + 8; ++i) {
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
    float2 sums = make_float2(0.0f, 0.0f);
    if (bias_sums) sums = slabs.share_sums(x);
    slabs.store(&hidden, u, m, n);
    slabs.release();
    if (bias_sums) slabs.write_sums(sums, bias_sums, m, n, M, N);
    slabs.template store<T>(&d_up, x, m, n);
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
    choose_activation(e.activation, [&](auto act) {
      body(HiddenBoxes<T, decltype(act)>{hidden, saved, e.bias, shape.N, act, e.saved != nullptr});
    });
  }
};

template <class T>
struct MayBeNarrow<ffn::HiddenEpilogue<T>> {
  static constexpr bool kHolds = true;
};

template <class T>
struct OnHopper<ffn::SlopeEpilogue<T>> {
  template <class Body>
  static void visit(const ffn::SlopeEpilogue<T>& e, GemmShape shape, const Body& body) {
    const auto map = [&](const T* data, int64_t ld) { return make_tensor_map(mapped_rows(data, ld, shape)); };
    const TensorMap hidden = map(e.hidden, e.ld), d_up = map(e.d_up, e.ld), up = map(e.up, e.ld_up);
    choose_activation(e.activation, [&](auto act) {
      if (e.gate)
        body(SlopeBoxes<T, true, decltype(act)>{hidden, d_up, map(e.d_gate, e.ld), up, map(e.gate, e.ld_gate), act,
                                                e.bias_sums, shape.M, shape.N});
      else
        body(SlopeBoxes<T, false, decltype(act)>{hidden, d_up, d_up, up, up, act, e.bias_sums, shape.M, shape.N});
    });
  }
};

namespace ffn {

// Whether boxes of a saved tensor [M, F] can be written and read.
inline bool saved_fits(const TensorView& t) {
  return !t.defined || can_map(mapped_boxes(t.data, DType::bf16, t.stride[0], {t.shape[0], t.shape[1], 0}));
}

template <>
struct GatedProducts<HopperProduct> {
  template <class T>
  static void run(const Operand& x, const Operand& gate_weight, const Operand& up_weight, GemmShape shape, T* gate,
                  const HiddenEpilogue<T>& e, float*, const Stream& stream) {
    if (shape.M == 0 || shape.N == 0) return;
    const auto map = [&](const T* data, int64_t ld) { return make_tensor_map(mapped_rows(data, ld, shape)); };
    const TensorMap hidden = map(e.hidden, e.ld_hidden);
    const TensorMap saved_up = e.saved ? map(e.saved, e.ld_saved) : hidden;
    const TensorMap saved_gate = e.saved ? map(gate, e.ld_gate) : hidden;
    choose_activation(e.activation, [&](auto act) {
      HopperProduct::run_paired<T, Major::k, Major::k>(
          x, gate_weight, up_weight, shape,
          GatedBoxes<T, decltype(act)>{hidden, saved_up, saved_gate, e.bias, shape.N, act, e.saved != nullptr}, stream);
    });
  }
};

template <>
struct SlopeProduct<HopperProduct> {
  template <class T>
  static bool run(const Operand& grad, const Operand& down_weight, GemmShape shape, SlopeEpilogue<T> epilogue,
                  float* bias_sums, float* parts, const Stream& stream) {
    const bool whole = hopper_plan(shape, true).parts == 1;
    if (whole) epilogue.bias_sums = bias_sums;
    HopperProduct::run<T, Major::k, Major::mn>(grad, down_weight, shape, epilogue, parts, stream);
    return whole;
  }
};

// As one product of twice the depth.
template <>
struct GatedGradients<HopperProduct> {
  template <class T>
  static void run(const Operand& d_gate, const Operand& gate_weight, const Operand& d_up, const Operand& up_weight,
                  GemmShape shape, const StoreEpilogue<T>& store, float*, float* parts, const Stream& stream) {
    HopperProduct::run<T, Major::k, Major::mn>(d_gate, gate_weight, shape, store, parts, stream, {&d_up, &up_weight});
  }
};

}  // namespace ffn
}  // namespace llmfast::cuda
