// ffn's epilogues by boxes (gemm/cuda/hopper_boxes.h).
#pragma once
#include "ffn/cuda/driver.h"
#include "gemm/cuda/hopper_boxes.h"

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

template <class T>
struct OnHopper<ffn::HiddenEpilogue<T>> {
  static constexpr bool kOwn = true;
  static MappedTensor mapped(const T* data, int64_t ld, GemmShape shape) {
    return mapped_boxes(data, half_dtype<T>(), ld, shape);
  }
  static bool fits(const ffn::HiddenEpilogue<T>& e, GemmShape shape) {
    return !e.gate && can_map(mapped(e.hidden, e.ld_hidden, shape)) &&
           (!e.saved || can_map(mapped(e.saved, e.ld_saved, shape)));
  }
  static HiddenBoxes<T> make(const ffn::HiddenEpilogue<T>& e, GemmShape shape) {
    const TensorMap hidden = make_tensor_map(mapped(e.hidden, e.ld_hidden, shape));
    return {hidden, e.saved ? make_tensor_map(mapped(e.saved, e.ld_saved, shape)) : hidden, e.bias, shape.N,
            e.activation, e.saved != nullptr};
  }
};

}  // namespace llmfast::cuda
