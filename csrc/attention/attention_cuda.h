// Attention on a GPU: the kernels' entry points, and the scratch they need. As attention.h says, except that the token
// offsets of packed sequences (first_q, first_k) are contiguous int64 on the device, and Tq and Tk are then the tokens
// of all sequences together: lengths are never read back to the host. Wrong offsets give wrong results, but no access
// outside the tensors.
#pragma once
#include "attention/attention.h"
#include "core/cuda_dispatch.h"

namespace llmfast {

void attention_forward(const AttentionArguments& arguments, const Stream& stream);
void attention_backward(const AttentionArguments& arguments, const AttentionGradients& gradients,
                        const Stream& stream);

namespace cuda {

constexpr int64_t kMostHeadDim = 256;  // of D and Dv

void attention_forward_sm80(const AttentionParams& params, const Stream& stream);      // bf16, fp16
void attention_forward_fma_sm80(const AttentionParams& params, const Stream& stream);  // float32
// Compute capability 9.0; bf16, fp16; rows at multiples of 16 bytes.
bool attention_forward_sm90a_supports(const AttentionParams& params);
void attention_forward_sm90a(const AttentionParams& params, const Stream& stream);
void attention_backward_sm80(const AttentionBackwardParams& params, const Stream& stream);
void attention_backward_fma_sm80(const AttentionBackwardParams& params, const Stream& stream);
bool supports_attention_backward_sm90a(const AttentionBackwardParams& params);
void attention_backward_sm90a(const AttentionBackwardParams& params, const Stream& stream);

// Few queries to a key/value head: they share one tile of 16 rows, and blocks share the keys. bf16, fp16.
constexpr int64_t kTileDecodeRows = 16;
void attention_decode_sm80(const AttentionParams& params, const Stream& stream);

// wide [2, B + 1] int64, contiguous, from int32 offsets.
void widen_offsets(const TensorView& q, const TensorView& k, const TensorView& wide, const Stream& stream);

// Floats of workspace; 0: none.
int64_t attention_workspace(int64_t B, int64_t Hq, int64_t Hkv, int64_t Tq, int64_t Tk, int64_t Dv);
int64_t attention_backward_workspace(int64_t B, int64_t Hq, int64_t Tq, bool packed);  // Tq as in AttentionParams
// Floats behind those: 0 but for dense attention in 16 bit on Hopper. Of a mask it looks at the strides, and whether
// there is one.
int64_t attention_backward_sums(const AttentionParams& params, int device);

}  // namespace cuda
}  // namespace llmfast
