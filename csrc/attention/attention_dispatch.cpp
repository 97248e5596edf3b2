// Reads the offsets of packed sequences and picks the row. The formulas are in attention.h.
#include <string>
#include <vector>

#include "attention/attention_checks.h"
#include "core/check.h"

namespace llmfast {
namespace {

// Narrower heads would be mostly padding, and float32 does them as well: nearly all their work is the softmax.
template <class Params>
bool fits_blocks(const Params& p) {
  const auto fits = [](int64_t dim) { return dim >= kLeastBlockHeadDim && dim <= kMostBlockHeadDim; };
  return fits(p.D) && fits(p.Dv);
}

const DispatchTable<AttentionParams> kForward("attention", {
    LLMFAST_BF16_AND_VEC_ROWS(attention_forward, fits_blocks)});
const DispatchTable<AttentionParams> kDecode("attention_decode", {LLMFAST_VEC_ROWS(attention_decode, kAllFloat)});
const DispatchTable<AttentionBackwardParams> kBackward("attention_backward", {
    LLMFAST_BF16_AND_VEC_ROWS(attention_backward, fits_blocks)});
const DispatchTable<AttentionBackwardParams> kDecodeBackward("attention_decode_backward", {
    LLMFAST_VEC_ROWS(attention_decode_backward, kAllFloat)});

template <class Params>
bool has_few_rows(const Params& p) { return p.Tq * (p.Hq / p.Hkv) <= kDecodeRows; }

// Blocks of bf16, five products of them, are fast enough that rows which are not there do not matter.
bool fills_blocks(const AttentionBackwardParams& p) {
  return p.q.dtype == DType::bf16 && active_isa() >= Isa::avx512bf16 && fits_blocks(p);
}

// Token offsets of packed sequences as int64, which the params point to.
struct Offsets {
  std::vector<int64_t> first;
  int64_t longest = 0;

  Offsets(const TensorView& cu_seqlens, const char* name, int64_t tokens) {
    require(cu_seqlens.ndim == 1 && cu_seqlens.shape[0] >= 1, (std::string(name) + ": expected shape [B + 1]").c_str());
    const bool wide = cu_seqlens.dtype == DType::i64;
    if (!wide) require_dtype(cu_seqlens, name, DType::i32);
    const int64_t stride = cu_seqlens.stride[0];
    for (int64_t i = 0; i < cu_seqlens.shape[0]; ++i)
      first.push_back(wide ? cu_seqlens.as<int64_t>()[i * stride] : cu_seqlens.as<int32_t>()[i * stride]);
    bool good = first.front() == 0 && first.back() == tokens;
    for (size_t i = 1; i < first.size(); ++i) {
      good = good && first[i] >= first[i - 1];
      longest = first[i] - first[i - 1] > longest ? first[i] - first[i - 1] : longest;
    }
    if (!good)
      throw std::invalid_argument(std::string(name) +
                                  ": expected token offsets that start at 0, never decrease and end at " +
                                  std::to_string(tokens) + ", got " + std::to_string(first.front()) + " .. " +
                                  std::to_string(first.back()));
  }
};

// Calls run(params) with the offsets of packed sequences in place.
template <class Params, class Run>
void with_offsets(const AttentionArguments& a, Params p, const Run& run) {
  if (!a.cu_seqlens_q.defined) return run(p);
  const Offsets q(a.cu_seqlens_q, "cu_seqlens_q", p.Tq), k(a.cu_seqlens_k, "cu_seqlens_k", p.Tk);
  require(q.first.size() == k.first.size(), "cu_seqlens_k: expected the length of cu_seqlens_q");
  p.first_q = q.first.data();
  p.first_k = k.first.data();
  p.Tq = q.longest;
  p.Tk = k.longest;
  run(p);
}

}  // namespace

void attention_forward(const AttentionArguments& arguments) {
  with_offsets(arguments, checked_attention(arguments), [&](const AttentionParams& p) {
    if (p.B == 0 || p.Hq == 0 || p.Tq == 0) return;
    (has_few_rows(p) ? kDecode : kForward)(p.q.dtype, p);
  });
}

void attention_backward(const AttentionArguments& arguments, const AttentionGradients& gradients) {
  with_offsets(arguments, checked_attention(arguments, gradients), [&](const AttentionBackwardParams& p) {
    if (p.B == 0 || p.Hkv == 0 || p.Hq == 0) return;
    (has_few_rows(p) && !fills_blocks(p) ? kDecodeBackward : kBackward)(p.q.dtype, p);
  });
}

}  // namespace llmfast
