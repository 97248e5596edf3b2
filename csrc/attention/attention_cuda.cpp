#include "attention/attention_cuda.h"

#include "attention/attention_checks.h"
#include "attention/cuda/mask_classes.h"
#include "attention/cuda/one_pass.h"
#include "gemm/gemm_cuda.h"

namespace llmfast {
namespace {

constexpr DTypeSet k16Bit = kBF16 | kF16;

const CudaTable<AttentionParams> kForward("attention",
                                          {LLMFAST_SM90A_ROW(k16Bit, cuda::attention_forward_sm90a_supports,
                                                             cuda::attention_forward_sm90a)
                                           {Arch::sm80, k16Bit, nullptr, cuda::attention_forward_sm80},
                                           {Arch::sm80, kF32, nullptr, cuda::attention_forward_fma_sm80}});
const CudaTable<AttentionParams> kDecode("attention_decode",
                                         {{Arch::sm80, k16Bit, nullptr, cuda::attention_decode_sm80},
                                          {Arch::sm80, kF32, nullptr, cuda::attention_forward_fma_sm80}});
// On Hopper's own kernels: 16 bit, head dims to 128, rows at multiples of 16 bytes, any mask tensor; but not a mask
// tensor together with a softcap, for which no registers are left. The gradient of a mask itself is nobody's here.
const CudaTable<AttentionBackwardParams> kBackward("attention_backward",
                                                   {LLMFAST_SM90A_ROW(k16Bit, cuda::supports_attention_backward_sm90a,
                                                                      cuda::attention_backward_sm90a)
                                                    {Arch::sm80, k16Bit, nullptr, cuda::attention_backward_sm80},
                                                    {Arch::sm80, kF32, nullptr, cuda::attention_backward_fma_sm80}});

void finish(AttentionParams& p, const AttentionArguments& a) {
  require(p.D <= cuda::kMostHeadDim && p.Dv <= cuda::kMostHeadDim, "q, v: a head dim is above 256");
  require_sizes_for_gpu({p.Tq, p.Tk});
  p.workspace = a.workspace.as<float>();
  if (!a.cu_seqlens_q.defined) return;
  for (const TensorView* offsets : {&a.cu_seqlens_q, &a.cu_seqlens_k}) {
    require_shape(*offsets, "cu_seqlens", {p.B + 1});
    require_dtype(*offsets, "cu_seqlens", DType::i64);
    require_contiguous(*offsets, "cu_seqlens");
  }
  p.first_q = a.cu_seqlens_q.as<const int64_t>();
  p.first_k = a.cu_seqlens_k.as<const int64_t>();
}

}  // namespace

void attention_forward(const AttentionArguments& arguments, const Stream& stream) {
  AttentionParams p = checked_attention(arguments);
  finish(p, arguments);
  if (p.B == 0 || p.Hq == 0 || p.Tq == 0) return;
  const bool few = !p.first_q && p.Tq * (p.Hq / p.Hkv) <= cuda::kTileDecodeRows;
  if (few) require_workspace(arguments.workspace, cuda::attention_workspace(p.B, p.Hq, p.Hkv, p.Tq, p.Tk, p.Dv));
  (few ? kDecode : kForward)(p.q.dtype, p, stream);
}

void attention_backward(const AttentionArguments& arguments, const AttentionGradients& gradients,
                        const Stream& stream) {
  AttentionBackwardParams p = checked_attention(arguments, gradients);
  finish(p, arguments);
  if (p.B == 0 || p.Hq == 0) return;
  require_workspace(arguments.workspace, cuda::attention_backward_workspace(p.B, p.Hq, p.Tq, p.first_q) +
                                             cuda::attention_backward_sums(p, stream.device));
  kBackward(p.q.dtype, p, stream);
}

int64_t cuda::attention_backward_sums(const AttentionParams& p, int device) {
#ifdef LLMFAST_SM90A
  const int64_t D = p.D > p.Dv ? p.D : p.Dv, width = D <= 64 ? 64 : 128;
  if (D > 128 || p.q.dtype == DType::f32 || !(p.mask.data || backward_way(p) != BackwardWay::kernels)) return 0;
  if (arch_cap() < Arch::sm90a || !runs_on(Arch::sm90a, device_info(device))) return 0;
  if (p.mask.data) return MaskClasses(p).floats();
  return p.Hq * tile_count(p.B, p.Tq, false, 128) * (128 * width + 4) + 4;
#else
  return static_cast<void>(p), static_cast<void>(device), 0;
#endif
}

}  // namespace llmfast
