// block: one pre-norm transformer block, forward and backward, as a sequence of the other ops' dispatch tables.
//   sum1 = stream + x;  qkv = norm1(sum1) Wqkv^T;  q, k = rotate(norm_q(q), norm_k(k));  attended = attention(q, k, v)
//   sum2 = sum1 + attended Wout^T;  out = ffn(norm2(sum2))
// It has no arithmetic of its own: what it saves is the cost of making these calls from Python, which is a fifth of a
// small model's training step and most of a decoding step. Intermediates that the backward pass reads lie in one buffer,
// `saved`, whose size saved_bytes() gives; the other scratch is the workspace's.
// x, out: [B,T,C]; stream, stream_out: [B,T,C] of the stream's dtype. All are contiguous; weights share one dtype. Without
// `saved`, out may be x and stream_out stream: the first norm reads both before either is written. With a cache, keys and
// values of the T new tokens are written behind the `cached` ones and attention reads all of them.
#pragma once
#include "core/types.h"
#include "ffn/ffn.h"

namespace llmfast {

struct BlockSettings {
  int64_t heads, kv_heads, head_dim;
  int64_t left;  // keys before its own position that a query sees; kUnbounded: all
  bool centred;  // LayerNorm, else RMSNorm
  float eps1, eps2, eps_qk, scale;
  Activation activation;
};

// In the order in which data meets them; undefined where the block has none. The gradients have the same form.
struct BlockWeights {
  TensorView norm1, norm1_bias, qkv, qkv_bias;
  TensorView q_norm, k_norm;  // [D], both or neither: RMSNorm of each head
  TensorView out, out_bias, norm2, norm2_bias, up, up_bias, gate, down, down_bias;
};
constexpr int kBlockWeights = sizeof(BlockWeights) / sizeof(TensorView);

struct BlockInputs {
  TensorView x, stream;          // stream undefined: x is the stream (the first block)
  TensorView cos, sin;           // [T,D/2] or [B,T,D/2]; undefined: no rotary
  TensorView mask;               // [B,Hq,T,Tk], strides 0 where broadcast
  TensorView cu_seqlens;         // packed documents: bounds in the B*T tokens; excludes mask and cache
  TensorView cache_k, cache_v;   // [B,Hkv,capacity,D]
  int64_t cached = 0;
};

struct BlockParams {
  BlockSettings settings;
  BlockWeights weights;
  BlockInputs inputs;
  TensorView out, stream_out;
  TensorView saved;  // undefined: nothing is kept
};

struct BlockBackwardParams {
  BlockSettings settings;
  BlockWeights weights;
  BlockInputs inputs;        // x is read only by the first block
  TensorView stream_out, saved;
  TensorView grad_out, grad_stream_out;
  TensorView grad_x, grad_stream;  // grad_x may be undefined where its dtype is the stream's: the two are then one
  BlockWeights grads;
};

int64_t block_saved_bytes(const BlockSettings& settings, const BlockWeights& weights, const BlockInputs& inputs);
void block_forward(const BlockParams& params);
void block_backward(const BlockBackwardParams& params);

}  // namespace llmfast
