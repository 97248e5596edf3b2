// From products to scores: scale, softcap, mask tensor, band. Scores are in the log2 domain, so that softmax is exp2.
//
// A warp's score tile is in registers as mma leaves it: scores[j][0..1] are row lane / 4, columns 8j + 2 (lane % 4) and
// the next, scores[j][2..3] the same eight rows below. Rows are the warp's own tokens, columns the tokens that stream
// by: rows are queries and columns keys in the forward and grad_q kernels, the other way round for grad_k and grad_v.
#pragma once
#include "attention/cuda/tiles.h"
#include "ptx/convert.h"
#include "ptx/math.h"

namespace llmfast::cuda {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
constexpr float kLowest = -3.40282347e38f;  // log2-domain score that no finite one is below

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }

// tanh, absolute error < 2e-7 and relative < 1e-6: an odd polynomial near 0, where (e - 1) / (e + 1) would cancel.
__device__ inline float tanh_of(float x) {
  const float a = fabsf(x), square = x * x;
  const float far = 1.0f - 2.0f / (exp2_approx(a * (2.0f * kLog2E)) + 1.0f);
  float p = -0.00886323553f;
  p = fmaf(p, square, 0.0218694885f);
  p = fmaf(p, square, -0.0539682540f);
  p = fmaf(p, square, 0.133333333f);
  p = fmaf(p, square, -0.333333333f);
  return a < 0.35f ? fmaf(p * square, x, x) : copysignf(far, x);
}

// What makes a product of q and k a score. Without softcap, mask and odd scales the factor joins the exponent's
// multiply-add; otherwise scores are finished first and the factor is 1.
struct ScoreScale {
  float product, cap;  // score = product * s, or cap * tanh(product * s)
  bool finished;       // finish() is to be called

  __device__ explicit ScoreScale(const AttentionParams& p)
      : product(p.softcap > 0.0f ? p.scale / p.softcap : p.scale * kLog2E),
        cap(p.softcap * kLog2E),
        finished(p.softcap > 0.0f || p.mask.data || !(p.scale > 0.0f)) {}
  __device__ float factor() const { return finished ? 1.0f : product; }
};

template <int kFragments>
__device__ void scale_scores(float (&scores)[kFragments][4], const ScoreScale& scale) {
#pragma unroll
  for (int j = 0; j < kFragments; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[j][e] *= scale.product;
      if (scale.cap > 0.0f) scores[j][e] = scale.cap * tanh_of(scores[j][e]);
    }
}

// What the mask tensor says about two rows: addresses of their elements for column 0, and the stride from column to
// column.
struct MaskRows {
  const char* row[2];
  int64_t column_stride;  // bytes
  DType dtype;
  int columns;  // that exist
};

__device__ inline const char* mask_element(const AttentionParams& p, int64_t sequence, int64_t head, int query,
                                           int key) {
  const MaskTensor& m = p.mask;
  return static_cast<const char*>(m.data) + (sequence * m.sequence_stride + head * m.head_stride +
                                             query * m.query_stride + key * m.key_stride) *
                                                size_of(m.dtype);
}

// Of this thread's two of the 16 rows from first_row on; rows beyond `last`, which do not exist, read its values.
// kKeysAreRows: rows are keys of the sequence and columns queries.
template <bool kKeysAreRows>
__device__ MaskRows mask_rows(const AttentionParams& p, int64_t sequence, int64_t head, int first_row, int last,
                              int columns) {
  MaskRows rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane() / 4 + 8 * half, read = row < last ? row : last;
    rows.row[half] = mask_element(p, sequence, head, kKeysAreRows ? 0 : read, kKeysAreRows ? read : 0);
  }
  rows.column_stride = (kKeysAreRows ? p.mask.query_stride : p.mask.key_stride) * size_of(p.mask.dtype);
  rows.dtype = p.mask.dtype;
  rows.columns = columns;
  return rows;
}

// What to add to a log2-domain score; -inf hides. Finite values stay finite.
__device__ inline float mask_value(bool visible) { return visible ? 0.0f : -infinity(); }
__device__ inline float mask_value(float value) {
  const float scaled = value * kLog2E;
  return scaled < kLowest && value > -infinity() ? kLowest : scaled;
}
template <class M>
__device__ inline float mask_value_at(const char* at) {
  if constexpr (sizeof(M) == 1) return mask_value(*at != 0);
  else return mask_value(to_float(*reinterpret_cast<const M*>(at)));
}

template <class M, int kFragments>
__device__ void add_mask(float (&scores)[kFragments][4], const MaskRows& mask, int first_column) {
  const int column = first_column + lane() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const char* at = mask.row[half] + column * mask.column_stride;
#pragma unroll
    for (int j = 0; j < kFragments; ++j, at += 8 * mask.column_stride)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (column + 8 * j + e >= mask.columns) continue;
        float& score = scores[j][2 * half + e];
        const float bias = mask_value_at<M>(at + e * mask.column_stride);
        score = bias == -infinity() ? bias : score + bias;
      }
  }
}

template <int kFragments>
__device__ void add_mask(float (&scores)[kFragments][4], const MaskRows& mask, int first_column) {
  switch (mask.dtype) {
    case DType::boolean: return add_mask<uint8_t>(scores, mask, first_column);
    case DType::bf16: return add_mask<bf16>(scores, mask, first_column);
    case DType::f16: return add_mask<fp16>(scores, mask, first_column);
    default: return add_mask<float>(scores, mask, first_column);
  }
}

// Columns outside a row's range become -inf.
template <int kFragments>
__device__ void hide_outside(float (&scores)[kFragments][4], const Span (&visible)[2], int first_column) {
#pragma unroll
  for (int j = 0; j < kFragments; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!visible[e / 2].has(first_column + 8 * j + lane() % 4 * 2 + e % 2)) scores[j][e] = -infinity();
}

// Running maximum and sum of a thread's two rows. The maximum is the row's, the same in the four lanes that share it;
// the sum is this lane's share of it.
struct OnlineSoftmax {
  float highest[2] = {kLowest, kLowest};  // finite: -inf - kLowest is -inf, and never NaN
  float sum[2] = {0.0f, 0.0f};

  // scores * factor -> 2^(score - highest); keep: by what to multiply what was summed before.
  template <int kFragments>
  __device__ void update(float (&scores)[kFragments][4], float factor, float (&keep)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = scores[0][2 * half];
#pragma unroll
      for (int j = 0; j < kFragments; ++j) top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float now = fmaxf(highest[half], top * factor);
      keep[half] = exp2_approx(highest[half] - now);
      highest[half] = now;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kFragments; ++j)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          scores[j][e] = exp2_approx(fmaf(scores[j][e], factor, -now));
          total += scores[j][e];
        }
      sum[half] = fmaf(sum[half], keep[half], total);
    }
  }

  // The rows' sums, complete.
  __device__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 1);
      sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 2);
    }
  }
  __device__ float inverse(int half) const { return sum[half] == 0.0f ? 0.0f : 1.0f / sum[half]; }
};

// Natural log of the sum of exp(score); -inf for a row that saw nothing.
__device__ inline float natural_lse(float highest, float sum) {
  return sum == 0.0f ? -infinity() : (highest + log2f(sum)) * kLn2;
}

}  // namespace llmfast::cuda
