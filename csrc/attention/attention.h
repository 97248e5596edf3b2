// Masked attention, forward and backward.
//
//   x[i,j] = scale * q[i] . k[j]                       i < Tq, j < Tk; softcap c > 0 makes it c * tanh(x / c)
//   s[i,j] = x[i,j] (+ mask[i,j])                      -inf where key j is hidden from query i
//   p[i,j] = exp(s[i,j] - lse[i]),  lse[i] = log sum_j exp(s[i,j])
//   out[i] = sum_j p[i,j] v[j]                         nothing of size Tq x Tk is ever stored
//
//   delta[i] = grad_out[i] . out[i]                    ds[i,j] = p[i,j] (grad_out[i] . v[j] - delta[i]) (* 1 - tanh^2)
//   grad_q[i] = scale sum_j ds[i,j] k[j]   grad_k[j] = scale sum_i ds[i,j] q[i]   grad_v[j] = sum_i p[i,j] grad_out[i]
//
// Dims: B sequences, Hq query heads, Hkv key/value heads (query head h reads kv head h / (Hq / Hkv)), Tq queries and Tk
// keys of a sequence, D the head dim of q and k, Dv that of v and out.
// Key j is visible to query i iff  i + Tk - Tq - left <= j <= i + Tk - Tq + right  and the mask lets it through
// (boolean: true; additive: not -inf). Causal is right = 0; SDPA's top-left causal is right = Tq - Tk.
// A row that sees nothing: out = 0, lse = -inf, gradients 0. What a hidden key or value holds (NaN, inf) never matters.
// A row whose every score is below kNoGradient (a mask of finfo.min everywhere) averages its values as PyTorch does,
// and passes no gradient. Dense and packed ("varlen") batches are one case: sequence s starts at token first_q[s]
// (first_k[s]) of its tensors.
#pragma once
#include "core/dispatch.h"
#include "core/types.h"

namespace llmfast {

constexpr int64_t kUnbounded = int64_t{1} << 40;  // `left` or `right` that hides nothing
constexpr float kNoGradient = -1e30f;             // natural log

// [sequence, head, token, dim], strides in elements; dim has stride 1. Element (s, h, t, 0) is at
// data + s * sequence_stride + h * head_stride + (first token of s + t) * token_stride.
struct HeadTensor {
  void* data;
  DType dtype;
  int64_t sequence_stride, head_stride, token_stride;
};

// [sequence, query head, query, key] with any strides, 0 where broadcast.
struct MaskTensor {
  const void* data;  // nullptr: no mask
  DType dtype;       // boolean, or the floating dtype of an additive mask
  int64_t sequence_stride, head_stride, query_stride, key_stride;
};

struct AttentionParams {
  int64_t B, Hq, Hkv, D, Dv;
  int64_t Tq, Tk;                           // of every sequence; packed: of the longest
  const int64_t *first_q, *first_k;         // packed: B + 1 token offsets; dense: nullptr
  int64_t left, right;                      // |left|, |right| <= kUnbounded
  float scale, softcap;                     // softcap 0: none
  HeadTensor q, k, v, out;                  // one floating dtype
  HeadTensor lse;                           // float32; an element a token
  MaskTensor mask;                          // dense only
  float* workspace;                         // on GPUs
  bool any_order;                           // on GPUs: sums of gradients need not be added in a fixed order
};

struct AttentionBackwardParams : AttentionParams {
  HeadTensor grad_out, grad_q, grad_k, grad_v;  // of q's dtype
};

// The same from the caller's side. Dense: q, grad_q [B,Hq,Tq,D]; k, grad_k [B,Hkv,Tk,D]; v, grad_v [B,Hkv,Tk,Dv];
// out, grad_out [B,Hq,Tq,Dv]; lse [B,Hq,Tq]; mask expanded to [B,Hq,Tq,Tk]. Packed, when cu_seqlens_q is defined: q
// [Tq total,Hq,D] and so on without B, lse [Hq,Tq total], cu_seqlens int32 or int64 [B+1].
struct AttentionArguments {
  TensorView q, k, v, out, lse, mask, cu_seqlens_q, cu_seqlens_k;
  int64_t left = kUnbounded, right = kUnbounded;
  float scale = 1.0f, softcap = 0.0f;
  TensorView workspace = {};  // float32, on GPUs
  bool any_order = false;     // as in AttentionParams
};

struct AttentionGradients {
  TensorView grad_out, grad_q, grad_k, grad_v;
};

void attention_forward(const AttentionArguments& arguments);
void attention_backward(const AttentionArguments& arguments, const AttentionGradients& gradients);

}  // namespace llmfast

LLMFAST_DECLARE_VEC(void attention_forward(const AttentionParams&))
LLMFAST_DECLARE_VEC(void attention_decode(const AttentionParams&))  // Tq * Hq / Hkv <= kDecodeRows
LLMFAST_DECLARE_VEC(void attention_backward(const AttentionBackwardParams&))
LLMFAST_DECLARE_VEC(void attention_decode_backward(const AttentionBackwardParams&))  // likewise
LLMFAST_DECLARE_BF16(void attention_forward(const AttentionParams&))
LLMFAST_DECLARE_BF16(void attention_backward(const AttentionBackwardParams&))

namespace llmfast {

constexpr int64_t kDecodeRows = 8;
constexpr int64_t kLeastBlockHeadDim = 16, kMostBlockHeadDim = 256;  // D and Dv that the bf16 targets' rows take

}  // namespace llmfast
