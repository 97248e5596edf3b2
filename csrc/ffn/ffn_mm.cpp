// ffn on the shared GEMM core; see ffn.h for the maths.
//
// Forward: both weights are packed once. Each thread owns rows of x and takes them rows_at_a_time() by the block through both
// products, so the hidden block (rows x F) never leaves its caches. With too few rows for that, the products run one
// after the other and threads share the columns.
// Backward: the epilogue of grad * down_weight turns d_hidden into d_up (and d_gate) and rebuilds hidden; the rest are
// plain products. Three M x F buffers of scratch at most, reused between calls.
#include "ffn/ffn.h"

#include "gemm/product.h"
#include "gemm/vectors.h"
#include "simd/activations.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kHiddenBytes = int64_t{2} << 20;  // of a thread's hidden block: near, yet many rows for each pass over B

// Rows that go through both products together.
template <class T>
int64_t rows_at_a_time(int64_t F) {
  const int64_t rows = kHiddenBytes / (F * static_cast<int64_t>(sizeof(T))) / Kernel::kRows * Kernel::kRows;
  return rows < 4 * Kernel::kRows ? 4 * Kernel::kRows : rows > 384 ? round_up(384, Kernel::kRows) : rows;
}

template <class T>
struct ActivationEpilogue {
  Activation activation;
  const float* bias;
  T *hidden, *saved;  // saved: pre-activation, or nullptr
  int64_t ld_hidden, ld_saved;

  void row(const float* acc, int64_t m, int64_t n, int64_t count) const {
    visit_activation(activation, [&](auto act) {
      for_each_vec(count, [&](int64_t i, auto lanes) {
        Vec up = Vec::load(acc + i);
        if (bias) up = up + lanes.load(bias + n + i);
        if (saved) lanes.store(up, saved + m * ld_saved + n + i);
        lanes.store(act.value(up), hidden + m * ld_hidden + n + i);
      });
    });
  }
};

// After the gate product, `gate` holds pre-activations; this runs on the up product.
template <class T>
struct GatedEpilogue {
  Activation activation;
  const float* bias;
  const T* gate;
  T *hidden, *saved;
  int64_t ld_gate, ld_hidden, ld_saved;

  void row(const float* acc, int64_t m, int64_t n, int64_t count) const {
    visit_activation(activation, [&](auto act) {
      for_each_vec(count, [&](int64_t i, auto lanes) {
        Vec up = Vec::load(acc + i);
        if (bias) up = up + lanes.load(bias + n + i);
        if (saved) lanes.store(up, saved + m * ld_saved + n + i);
        lanes.store(act.value(lanes.load(gate + m * ld_gate + n + i)) * up, hidden + m * ld_hidden + n + i);
      });
    });
  }
};

template <class T>
struct SlopeEpilogue {
  Activation activation;
  const T *up, *gate;  // saved; gate == nullptr: plain
  T *hidden, *d_up, *d_gate;
  int64_t ld_up, ld_gate, F;

  void row(const float* acc, int64_t m, int64_t n, int64_t count) const {
    visit_activation(activation, [&](auto act) {
      for_each_vec(count, [&](int64_t i, auto lanes) {
        const int64_t at = m * F + n + i;
        const Vec d_hidden = Vec::load(acc + i), u = lanes.load(up + m * ld_up + n + i);
        if (gate) {
          const ValueAndSlope a = act.both_of(lanes.load(gate + m * ld_gate + n + i));
          lanes.store(a.value * u, hidden + at);
          lanes.store(d_hidden * a.value, d_up + at);
          lanes.store(d_hidden * u * a.slope, d_gate + at);
        } else {
          const ValueAndSlope a = act.both_of(u);
          lanes.store(a.value, hidden + at);
          lanes.store(d_hidden * a.slope, d_up + at);
        }
      });
    });
  }
};

template <class T>
struct Saved {  // rows [row, ...) of an optional saved matrix
  T* data;
  int64_t ld;
  Saved(const TensorView& t, int64_t row) : data(t.defined ? t.as<T>() + row * t.stride[0] : nullptr), ld(t.stride[0]) {}
};

// Packed weights of the forward pass, in one buffer.
struct PackedWeights {
  const Kernel::Packed *up, *gate, *down;
};

PackedWeights pack_weights(const FfnParams& p, int64_t C, int64_t F) {
  const int64_t up_size = round_up(packed_b_elements(F, C), 64), down_size = round_up(packed_b_elements(C, F), 64);
  const bool gated = p.gate_weight.defined;
  auto* base = workspace<Kernel::Packed>(Slot::packed_b, up_size * (gated ? 2 : 1) + down_size + 64);
  const auto pack = [](Kernel::Packed* dst, const TensorView& weight, int64_t N, int64_t K) {
    pack_b(dst, matrix(weight).transposed(), N, K);
    return dst;
  };
  PackedWeights packed;
  packed.up = pack(base, p.up_weight, F, C);
  packed.gate = gated ? pack(base + up_size, p.gate_weight, F, C) : nullptr;
  packed.down = pack(base + up_size * (gated ? 2 : 1), p.down_weight, C, F);
  return packed;
}

// All of the forward pass for rows [begin, end) on the calling thread.
template <class T>
void forward_rows(const FfnParams& p, const PackedWeights& packed, const float* up_bias, const float* down_bias,
                  Range rows) {
  const int64_t C = p.x.shape[1], F = p.up_weight.shape[0];
  const bool gated = p.gate_weight.defined;
  const int64_t most = rows_at_a_time<T>(F);
  T* hidden = workspace<T>(Slot::hidden, most * F * (gated ? 2 : 1));
  for (int64_t m = rows.begin; m < rows.end; m += most) {
    const Range block{0, rows.end - m < most ? rows.end - m : most};
    const MatrixRef x = matrix(p.x).offset(m, 0);
    const Saved<T> up(p.up, m);
    if (gated) {
      const Saved<T> saved_gate(p.gate, m);
      T* gate = saved_gate.data ? saved_gate.data : hidden + most * F;
      const int64_t ld_gate = saved_gate.data ? saved_gate.ld : F;
      gemm_rectangle(x, packed.gate, C, block, {0, F}, StoreEpilogue<T>{gate, ld_gate, nullptr});
      gemm_rectangle(x, packed.up, C, block, {0, F},
                     GatedEpilogue<T>{p.activation, up_bias, gate, hidden, up.data, ld_gate, F, up.ld});
    } else {
      gemm_rectangle(x, packed.up, C, block, {0, F},
                     ActivationEpilogue<T>{p.activation, up_bias, hidden, up.data, F, up.ld});
    }
    gemm_rectangle({hidden, p.x.dtype, F, 1}, packed.down, F, block, {0, C},
                   StoreEpilogue<T>{p.out.as<T>() + m * p.out.stride[0], p.out.stride[0], down_bias});
  }
}

// Few rows: one product after the other, threads share the columns.
template <class T>
void forward_products(const FfnParams& p, const float* up_bias, const float* down_bias) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], F = p.up_weight.shape[0];
  const MatrixRef x = matrix(p.x);
  const bool gated = p.gate_weight.defined;
  T* hidden = workspace<T>(Slot::hidden, M * F * (gated ? 2 : 1));
  const Saved<T> up(p.up, 0), saved_gate(p.gate, 0);
  if (gated) {
    T* gate = saved_gate.data ? saved_gate.data : hidden + M * F;
    const int64_t ld_gate = saved_gate.data ? saved_gate.ld : F;
    gemm(x, matrix(p.gate_weight).transposed(), {M, F, C}, StoreEpilogue<T>{gate, ld_gate, nullptr});
    gemm(x, matrix(p.up_weight).transposed(), {M, F, C},
         GatedEpilogue<T>{p.activation, up_bias, gate, hidden, up.data, ld_gate, F, up.ld});
  } else {
    gemm(x, matrix(p.up_weight).transposed(), {M, F, C},
         ActivationEpilogue<T>{p.activation, up_bias, hidden, up.data, F, up.ld});
  }
  gemm({hidden, p.x.dtype, F, 1}, matrix(p.down_weight).transposed(), {M, C, F},
       StoreEpilogue<T>{p.out.as<T>(), p.out.stride[0], down_bias});
}

template <class T>
void backward(const FfnBackwardParams& p) {
  const int64_t M = p.grad.shape[0], C = p.grad.shape[1], F = p.up_weight.shape[0];
  const bool gated = p.gate_weight.defined;
  const MatrixRef grad = matrix(p.grad), x = matrix(p.x);
  T* d_up = workspace<T>(Slot::hidden, M * F * (gated ? 3 : 2));
  T *hidden = d_up + M * F, *d_gate = gated ? hidden + M * F : nullptr;
  gemm(grad, matrix(p.down_weight), {M, F, C},
       SlopeEpilogue<T>{p.activation, p.up.as<T>(), gated ? p.gate.as<T>() : nullptr, hidden, d_up, d_gate,
                        p.up.stride[0], p.gate.stride[0], F});

  const DType dtype = p.grad.dtype;
  const auto store = [](const TensorView& t) { return StoreEpilogue<T>{t.as<T>(), t.stride[0], nullptr}; };
  if (p.grad_down_weight.defined)
    gemm(grad.transposed(), {hidden, dtype, F, 1}, {C, F, M}, store(p.grad_down_weight));
  if (p.grad_down_bias.defined) column_sums(p.grad, p.grad_down_bias);
  if (p.grad_up_weight.defined) gemm({d_up, dtype, 1, F}, x, {F, C, M}, store(p.grad_up_weight));
  if (p.grad_up_bias.defined) column_sums(d_up, F, 1, M, F, p.grad_up_bias);
  if (p.grad_gate_weight.defined) gemm({d_gate, dtype, 1, F}, x, {F, C, M}, store(p.grad_gate_weight));
  if (!p.grad_x.defined) return;
  if (!gated) {
    gemm({d_up, dtype, F, 1}, matrix(p.up_weight), {M, C, F}, store(p.grad_x));
  } else {
    float* partial = workspace<float>(Slot::staging, M * C);
    gemm({d_up, dtype, F, 1}, matrix(p.up_weight), {M, C, F}, StoreEpilogue<float>{partial, C, nullptr});
    gemm({d_gate, dtype, F, 1}, matrix(p.gate_weight), {M, C, F},
         AddStoreEpilogue<T>{p.grad_x.as<T>(), p.grad_x.stride[0], partial, C});
  }
}

}  // namespace

void ffn_forward(const FfnParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], F = p.up_weight.shape[0];
  float* biases = workspace<float>(Slot::reduction, C + F + 2 * Vec::kLanes);
  const float* up_bias = as_float(p.up_bias, biases);
  const float* down_bias = as_float(p.down_bias, biases + F + Vec::kLanes);
  const int threads = threads_for(M, 2 * Kernel::kRows);
  visit_float(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    if (M < threads * Kernel::rows_worth_a_thread(C) || threads < omp_get_max_threads())
      return forward_products<T>(p, up_bias, down_bias);
    const PackedWeights packed = pack_weights(p, C, F);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Kernel::ThreadState state;
      (void)state;
      forward_rows<T>(p, packed, up_bias, down_bias,
                      slice(M, omp_get_thread_num(), omp_get_num_threads(), Kernel::kRows));
    }
  });
}

void ffn_backward(const FfnBackwardParams& p) {
  visit_float(p.grad.dtype, [&](auto type) { backward<decltype(type)>(p); });
}

}  // namespace llmfast::LLMFAST_TARGET
