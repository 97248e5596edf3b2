#include "block/block.h"

#include <cstring>

#include "attention/attention.h"
#include "core/check.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "linear/linear.h"
#include "norm/norm.h"
#include "rotary/rotary.h"

namespace llmfast {
namespace {

// Hands out 64-byte aligned matrices from one buffer; without a buffer it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  TensorView take(DType dtype, int64_t rows, int64_t cols) {
    TensorView t;
    t.data = base_ ? base_ + bytes_ : nullptr;
    t.dtype = dtype;
    t.ndim = 2;
    t.defined = true;
    t.shape[0] = rows;
    t.shape[1] = t.stride[0] = cols;
    t.stride[1] = 1;
    bytes_ += (rows * cols * size_of(dtype) + 63) / 64 * 64;
    return t;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

struct Dims {
  int64_t B, T, M, C, F, Hq, Hkv, D;
  DType dtype, stream_dtype;

  Dims(const BlockSettings& s, const BlockWeights& w, const BlockInputs& in)
      : B(in.x.shape[0]), T(in.x.shape[1]), M(B * T), C(in.x.shape[2]), F(w.up.shape[0]), Hq(s.heads), Hkv(s.kv_heads),
        D(s.head_dim), dtype(w.qkv.dtype), stream_dtype(in.stream.defined ? in.stream.dtype : in.x.dtype) {}
  int64_t qkv_width() const { return (Hq + 2 * Hkv) * D; }
};

// What the backward pass reads of the forward pass. Without `keep`, buffers are reused as soon as they are read.
struct Activations {
  TensorView sum1, normed1, mean1, rstd1, qkv, attended, lse, normed2, mean2, rstd2, up, gate;
  TensorView q, k, rstd_q, rstd_k;  // normed heads, where there are such norms

  Activations(Arena& arena, const Dims& d, const BlockWeights& w, const BlockInputs& in, bool centred, bool keep) {
    const auto row = [&](int64_t heads = 1) {
      TensorView t = arena.take(DType::f32, 1, d.M * heads);
      t.ndim = 1;
      t.shape[0] = d.M * heads;
      t.stride[0] = 1;
      return t;
    };
    sum1 = in.stream.defined ? arena.take(d.stream_dtype, d.M, d.C) : TensorView{};
    normed1 = arena.take(d.dtype, d.M, d.C);
    if (centred) mean1 = row();
    rstd1 = row();
    qkv = arena.take(d.dtype, d.M, d.qkv_width());
    if (w.q_norm.defined) {
      q = arena.take(d.dtype, d.M, d.Hq * d.D);
      k = arena.take(d.dtype, d.M, d.Hkv * d.D);
      rstd_q = row(d.Hq);
      rstd_k = row(d.Hkv);
    }
    attended = arena.take(d.dtype, d.M, d.Hq * d.D);
    lse = arena.take(DType::f32, d.Hq, d.M);
    normed2 = keep ? arena.take(d.dtype, d.M, d.C) : normed1;
    if (centred) mean2 = row();
    rstd2 = row();
    if (!keep) return;
    up = arena.take(d.dtype, d.M, d.F);
    if (w.gate.defined) gate = arena.take(d.dtype, d.M, d.F);
  }
};

TensorView as_matrix(const TensorView& t) {
  TensorView m = t;
  if (!t.defined) return m;
  m.ndim = 2;
  m.shape[0] = t.shape[0] * t.shape[1];
  m.shape[1] = m.stride[0] = t.shape[2];
  m.stride[1] = 1;
  return m;
}

// Heads [first, first + count) of a matrix [M, heads D] as the ops take them: [B,H,T,D], or [M,H,D] for packed documents.
TensorView heads(const TensorView& matrix, const Dims& d, int64_t first, int64_t count, bool packed = false) {
  const int64_t row = matrix.stride[0];
  TensorView t;
  t.data = matrix.as<char>() + first * d.D * size_of(matrix.dtype);
  t.dtype = matrix.dtype;
  t.defined = true;
  const int64_t shape[] = {d.B, count, d.T, d.D}, stride[] = {d.T * row, d.D, row, 1};
  const int64_t packed_shape[] = {d.M, count, d.D}, packed_stride[] = {row, d.D, 1};
  t.ndim = packed ? 3 : 4;
  std::memcpy(t.shape, packed ? packed_shape : shape, t.ndim * sizeof(int64_t));
  std::memcpy(t.stride, packed ? packed_stride : stride, t.ndim * sizeof(int64_t));
  return t;
}

TensorView lse_view(const TensorView& lse, const Dims& d, bool packed) {
  TensorView t = lse;
  if (packed) return t;
  t.ndim = 3;
  t.shape[0] = d.B;
  t.shape[1] = d.Hq;
  t.shape[2] = t.stride[1] = d.T;
  t.stride[0] = d.Hq * d.T;
  t.stride[2] = 1;
  return t;
}

// Writes the new tokens' heads behind the `cached` ones and returns a view of all of them.
TensorView append(const TensorView& cache, const TensorView& fresh, int64_t cached) {
  const int64_t bytes = fresh.shape[3] * size_of(fresh.dtype);
  for (int64_t b = 0; b < fresh.shape[0]; ++b)
    for (int64_t h = 0; h < fresh.shape[1]; ++h)
      for (int64_t t = 0; t < fresh.shape[2]; ++t) {
        const int64_t to = b * cache.stride[0] + h * cache.stride[1] + (cached + t) * cache.stride[2];
        const int64_t from = b * fresh.stride[0] + h * fresh.stride[1] + t * fresh.stride[2];
        std::memcpy(cache.as<char>() + to * size_of(cache.dtype), fresh.as<char>() + from * size_of(fresh.dtype), bytes);
      }
  TensorView all = cache;
  all.shape[2] = cached + fresh.shape[2];
  return all;
}

AttentionArguments attention_arguments(const BlockSettings& s, const BlockInputs& in, const Activations& a,
                                       const Dims& d) {
  const bool packed = in.cu_seqlens.defined;
  return {a.q.defined ? heads(a.q, d, 0, d.Hq, packed) : heads(a.qkv, d, 0, d.Hq, packed),
          a.k.defined ? heads(a.k, d, 0, d.Hkv, packed) : heads(a.qkv, d, d.Hq, d.Hkv, packed),
          heads(a.qkv, d, d.Hq + d.Hkv, d.Hkv, packed),
          heads(a.attended, d, 0, d.Hq, packed),
          lse_view(a.lse, d, packed),
          in.mask,
          in.cu_seqlens,
          in.cu_seqlens,
          s.left,
          0,
          s.scale,
          0.0f};
}

void require_block(const BlockSettings& s, const BlockWeights& w, const BlockInputs& in) {
  require(in.x.defined && in.x.ndim == 3 && in.x.contiguous(), "x must be a contiguous [B, T, C]");
  require(w.qkv.defined && w.out.defined && w.up.defined && w.down.defined, "a block needs qkv, out, up and down weights");
  require(w.qkv.ndim == 2 && w.up.ndim == 2, "weights must be matrices");
  require_shape(w.qkv, "qkv weight", {(s.heads + 2 * s.kv_heads) * s.head_dim, in.x.shape[2]});
  require(w.q_norm.defined == w.k_norm.defined, "q_norm goes with k_norm");
  if (in.stream.defined) {
    require_shape(in.stream, "stream", {in.x.shape[0], in.x.shape[1], in.x.shape[2]});
    require_contiguous(in.stream, "stream");
  }
  if (!in.cache_k.defined) return;
  const Dims d(s, w, in);
  for (const TensorView* cache : {&in.cache_k, &in.cache_v}) {
    require(cache->defined && cache->ndim == 4, "cache must be [B, Hkv, capacity, D]");
    require_shape(*cache, "cache", {d.B, d.Hkv, cache->shape[2], d.D});
    require_dtype(*cache, "cache", d.dtype);
    require(cache->stride[3] == 1 && in.cached >= 0 && in.cached + d.T <= cache->shape[2], "cache: no room");
  }
}

void rotate(const TensorView& heads, const BlockInputs& in, bool back) {
  if (in.cos.defined) rotary({heads, heads, in.cos, in.sin, back});
}

// Heads [first, first + count) of qkv, each through an RMSNorm, side by side.
void norm_heads(const TensorView& qkv, int64_t first, int64_t count, const TensorView& weight, const TensorView& normed,
                const TensorView& rstd, const BlockSettings& s, const Dims& d) {
  norm_forward({heads(qkv, d, first, count, true), {}, weight, {}, heads(normed, d, 0, count, true), {}, {}, rstd, s.eps_qk,
                false});
}

// From the gradient for those normed heads to that for heads [first, first + count) of qkv, by way of `scratch`, which is no
// smaller than the former.
void norm_heads_backward(const TensorView& grad_normed, const TensorView& qkv, int64_t first, int64_t count,
                         const TensorView& weight, const TensorView& rstd, TensorView scratch,
                         const TensorView& grad_qkv, const TensorView& grad_weight, const BlockSettings& s, const Dims& d) {
  scratch.shape[1] = scratch.stride[0] = count * d.D;
  norm_backward({heads(grad_normed, d, 0, count, true), {}, heads(qkv, d, first, count, true), weight, {}, rstd,
                 heads(scratch, d, 0, count, true), {}, grad_weight, {}, s.eps_qk, false});
  const int64_t bytes = count * d.D * size_of(d.dtype), to = d.qkv_width() * size_of(d.dtype);
  const int64_t offset = first * d.D * size_of(d.dtype);
  parallel_for(d.M, 1 + (int64_t{1} << 18) / bytes, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      std::memcpy(grad_qkv.as<char>() + m * to + offset, scratch.as<char>() + m * bytes, bytes);
  });
}

void require_like(const TensorView& t, const char* name, const BlockInputs& in, DType dtype) {
  require_shape(t, name, {in.x.shape[0], in.x.shape[1], in.x.shape[2]});
  require_contiguous(t, name);
  require_dtype(t, name, dtype);
}

}  // namespace

int64_t block_saved_bytes(const BlockSettings& s, const BlockWeights& w, const BlockInputs& in) {
  require_block(s, w, in);
  Arena arena(nullptr);
  Activations(arena, Dims(s, w, in), w, in, s.centred, true);
  return arena.bytes();
}

void block_forward(const BlockParams& p) {
  const BlockSettings& s = p.settings;
  const BlockWeights& w = p.weights;
  require_block(s, w, p.inputs);
  const Dims d(s, w, p.inputs);
  require_like(p.out, "out", p.inputs, d.dtype);
  require_like(p.stream_out, "stream_out", p.inputs, d.stream_dtype);
  const bool keep = p.saved.defined;
  Arena sizes(nullptr);
  Activations(sizes, d, w, p.inputs, s.centred, keep);
  require(!keep || (p.saved.contiguous() && p.saved.numel() * size_of(p.saved.dtype) >= sizes.bytes()),
          "saved is too small");
  // The projection's output lives only until the second norm has read it.
  const int64_t own = keep ? 0 : sizes.bytes();
  auto* scratch = static_cast<char*>(workspace_bytes(Slot::block, own + d.M * d.C * size_of(d.dtype) + 64));
  Arena arena(keep ? p.saved.data : scratch), after(scratch + own);
  const Activations a(arena, d, w, p.inputs, s.centred, keep);
  const TensorView projected = after.take(d.dtype, d.M, d.C);

  const TensorView x = as_matrix(p.inputs.x), sum2 = as_matrix(p.stream_out);
  norm_forward({x, as_matrix(p.inputs.stream), w.norm1, w.norm1_bias, a.normed1, a.sum1, a.mean1, a.rstd1, s.eps1,
                s.centred});
  linear_forward({a.normed1, w.qkv, w.qkv_bias, a.qkv});
  if (w.q_norm.defined) {
    norm_heads(a.qkv, 0, d.Hq, w.q_norm, a.q, a.rstd_q, s, d);
    norm_heads(a.qkv, d.Hq, d.Hkv, w.k_norm, a.k, a.rstd_k, s, d);
    rotate(heads(a.q, d, 0, d.Hq), p.inputs, false);
    rotate(heads(a.k, d, 0, d.Hkv), p.inputs, false);
  } else {
    rotate(heads(a.qkv, d, 0, d.Hq + d.Hkv), p.inputs, false);
  }
  AttentionArguments attention = attention_arguments(s, p.inputs, a, d);
  if (p.inputs.cache_k.defined) {
    attention.k = append(p.inputs.cache_k, attention.k, p.inputs.cached);
    attention.v = append(p.inputs.cache_v, attention.v, p.inputs.cached);
  }
  attention_forward(attention);
  linear_forward({a.attended, w.out, w.out_bias, projected});
  norm_forward({projected, a.sum1.defined ? a.sum1 : x, w.norm2, w.norm2_bias, a.normed2, sum2, a.mean2, a.rstd2, s.eps2,
                s.centred});
  ffn_forward({a.normed2, w.up, w.up_bias, w.gate, w.down, w.down_bias, as_matrix(p.out), a.up, a.gate, s.activation});
}

void block_backward(const BlockBackwardParams& p) {
  const BlockSettings& s = p.settings;
  const BlockWeights &w = p.weights, &g = p.grads;
  require_block(s, w, p.inputs);
  const Dims d(s, w, p.inputs);
  for (const TensorView* t : {&p.stream_out, &p.grad_stream_out, &p.grad_stream})
    require_like(*t, "stream and its gradients", p.inputs, d.stream_dtype);
  require_like(p.grad_out, "grad_out", p.inputs, d.dtype);
  if (p.grad_x.defined) require_like(p.grad_x, "grad_x", p.inputs, p.inputs.x.dtype);
  require(p.grad_x.defined || p.inputs.x.dtype == d.stream_dtype, "grad_x is missing");

  Arena arena(p.saved.data);
  const Activations a(arena, d, w, p.inputs, s.centred, true);
  require(p.saved.numel() * size_of(p.saved.dtype) >= arena.bytes(), "saved is too small");
  const bool narrow = d.dtype != d.stream_dtype;
  const auto take_scratch = [&](Arena& from) {
    struct {
      TensorView grad_sum2, grad_normed, grad_projected, grad_attended, grad_qkv, grad_q, grad_k, grad_heads;
    } t;
    t.grad_sum2 = from.take(d.stream_dtype, d.M, d.C);
    t.grad_normed = from.take(d.dtype, d.M, d.C);
    t.grad_projected = narrow ? from.take(d.dtype, d.M, d.C) : t.grad_sum2;
    t.grad_attended = from.take(d.dtype, d.M, d.Hq * d.D);
    t.grad_qkv = from.take(d.dtype, d.M, d.qkv_width());
    if (w.q_norm.defined) {
      t.grad_q = from.take(d.dtype, d.M, d.Hq * d.D);
      t.grad_k = from.take(d.dtype, d.M, d.Hkv * d.D);
      t.grad_heads = from.take(d.dtype, d.M, d.Hq * d.D);
    }
    return t;
  };
  Arena sizes(nullptr);
  take_scratch(sizes);
  Arena scratch(workspace_bytes(Slot::block, sizes.bytes()));
  const auto t = take_scratch(scratch);

  ffn_backward({as_matrix(p.grad_out), a.normed2, w.up, w.gate, w.down, a.up, a.gate, t.grad_normed, g.up, g.up_bias,
                g.gate, g.down, g.down_bias, s.activation});
  norm_backward({t.grad_normed, as_matrix(p.grad_stream_out), as_matrix(p.stream_out), w.norm2, a.mean2, a.rstd2,
                 t.grad_sum2, narrow ? t.grad_projected : TensorView{}, g.norm2, g.norm2_bias, s.eps2, s.centred});
  linear_backward({t.grad_projected, a.attended, w.out, t.grad_attended, g.out, g.out_bias});

  const bool packed = p.inputs.cu_seqlens.defined;
  const TensorView& grad_q = w.q_norm.defined ? t.grad_q : t.grad_qkv;
  const TensorView& grad_k = w.q_norm.defined ? t.grad_k : t.grad_qkv;
  attention_backward(attention_arguments(s, p.inputs, a, d),
                     {heads(t.grad_attended, d, 0, d.Hq, packed), heads(grad_q, d, 0, d.Hq, packed),
                      heads(grad_k, d, w.q_norm.defined ? 0 : d.Hq, d.Hkv, packed),
                      heads(t.grad_qkv, d, d.Hq + d.Hkv, d.Hkv, packed)});
  if (w.q_norm.defined) {
    rotate(heads(t.grad_q, d, 0, d.Hq), p.inputs, true);
    rotate(heads(t.grad_k, d, 0, d.Hkv), p.inputs, true);
    norm_heads_backward(t.grad_q, a.qkv, 0, d.Hq, w.q_norm, a.rstd_q, t.grad_heads, t.grad_qkv, g.q_norm, s, d);
    norm_heads_backward(t.grad_k, a.qkv, d.Hq, d.Hkv, w.k_norm, a.rstd_k, t.grad_heads, t.grad_qkv, g.k_norm, s, d);
  } else {
    rotate(heads(t.grad_qkv, d, 0, d.Hq + d.Hkv), p.inputs, true);
  }
  linear_backward({t.grad_qkv, a.normed1, w.qkv, t.grad_normed, g.qkv, g.qkv_bias});
  norm_backward({t.grad_normed, t.grad_sum2, a.sum1.defined ? a.sum1 : as_matrix(p.inputs.x), w.norm1, a.mean1, a.rstd1,
                 as_matrix(p.grad_stream), as_matrix(p.grad_x), g.norm1, g.norm1_bias, s.eps1, s.centred});
}

}  // namespace llmfast
