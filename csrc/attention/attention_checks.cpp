#include "attention/attention_checks.h"

#include <stdexcept>
#include <string>

#include "core/check.h"

namespace llmfast {
namespace {

// [B,H,T,D] or, packed, [T,H,D]; without the last dim for lse.
HeadTensor head_tensor(const TensorView& t, bool packed) {
  if (packed) return {t.data, t.dtype, 0, t.stride[1], t.stride[0]};
  return {t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2]};
}

void require_rows(const TensorView& t, const char* name, DType dtype, bool packed, int64_t B, int64_t H, int64_t T,
                  int64_t D) {
  if (packed) require_shape(t, name, {T, H, D});
  else require_shape(t, name, {B, H, T, D});
  require_dtype(t, name, dtype);
  if (t.stride[t.ndim - 1] != 1 && D > 1)
    throw std::invalid_argument(std::string(name) + ": got " + describe(t) + ", expected a last dimension of stride 1");
}

int64_t bounded(int64_t distance) {
  return distance > kUnbounded ? kUnbounded : distance < -kUnbounded ? -kUnbounded : distance;
}

}  // namespace

AttentionParams checked_attention(const AttentionArguments& a) {
  const bool packed = a.cu_seqlens_q.defined;
  const int rank = packed ? 3 : 4;
  require(a.q.ndim == rank && a.k.ndim == rank && a.v.ndim == rank, "q, k, v: wrong number of dimensions");
  require_floating(a.q, "q");
  const int head = 1, token = packed ? 0 : 2;
  AttentionParams p = {};
  p.any_order = a.any_order;
  p.B = packed ? a.cu_seqlens_q.shape[0] - 1 : a.q.shape[0];
  p.Hq = a.q.shape[head];
  p.Hkv = a.k.shape[head];
  p.Tq = a.q.shape[token];
  p.Tk = a.k.shape[token];
  p.D = a.q.shape[rank - 1];
  p.Dv = a.v.shape[rank - 1];
  require(p.D > 0 && p.Dv > 0, "q, v: expected a head dim of at least 1");
  require(p.Hkv > 0 ? p.Hq % p.Hkv == 0 : p.Hq == 0, "q: its heads must be a multiple of k's");
  const DType dtype = a.q.dtype;
  require_rows(a.q, "q", dtype, packed, p.B, p.Hq, p.Tq, p.D);
  require_rows(a.k, "k", dtype, packed, p.B, p.Hkv, p.Tk, p.D);
  require_rows(a.v, "v", dtype, packed, p.B, p.Hkv, p.Tk, p.Dv);
  require_rows(a.out, "out", dtype, packed, p.B, p.Hq, p.Tq, p.Dv);
  require_dtype(a.lse, "lse", DType::f32);
  if (packed) {
    require_shape(a.lse, "lse", {p.Hq, p.Tq});
    p.lse = {a.lse.data, DType::f32, 0, a.lse.stride[0], a.lse.stride[1]};
    require(!a.mask.defined, "mask: packed sequences take none");
  } else {
    require_shape(a.lse, "lse", {p.B, p.Hq, p.Tq});
    p.lse = head_tensor(a.lse, false);
  }
  if (a.mask.defined) {
    require_shape(a.mask, "mask", {p.B, p.Hq, p.Tq, p.Tk});
    if (a.mask.dtype != DType::boolean) require_floating(a.mask, "mask");
    const int64_t* stride = a.mask.stride;
    p.mask = {a.mask.data, a.mask.dtype, stride[0], stride[1], stride[2], stride[3]};
  }
  p.q = head_tensor(a.q, packed);
  p.k = head_tensor(a.k, packed);
  p.v = head_tensor(a.v, packed);
  p.out = head_tensor(a.out, packed);
  p.left = bounded(a.left);
  p.right = bounded(a.right);
  p.scale = a.scale;
  p.softcap = a.softcap;
  return p;
}

AttentionBackwardParams checked_attention(const AttentionArguments& arguments, const AttentionGradients& gradients) {
  const AttentionParams common = checked_attention(arguments);
  const bool packed = arguments.cu_seqlens_q.defined;
  const auto read = [&](const TensorView& t, const char* name, int64_t H, int64_t T, int64_t D) {
    require_rows(t, name, common.q.dtype, packed, common.B, H, T, D);
    return head_tensor(t, packed);
  };
  AttentionBackwardParams params = {};
  static_cast<AttentionParams&>(params) = common;
  params.grad_out = read(gradients.grad_out, "grad_out", common.Hq, common.Tq, common.Dv);
  params.grad_q = read(gradients.grad_q, "grad_q", common.Hq, common.Tq, common.D);
  params.grad_k = read(gradients.grad_k, "grad_k", common.Hkv, common.Tk, common.D);
  params.grad_v = read(gradients.grad_v, "grad_v", common.Hkv, common.Tk, common.Dv);
  return params;
}

}  // namespace llmfast
