// Rotary position embedding; see rotary.h for the formula.
//
// One pass: a head's row of D elements is read once and written once, in float32 registers in between. The loop over
// (t, h) follows x's memory: heads inside when they lie closer together than positions ([B,T,H,D] storage, where a row
// of the tables then serves all heads from L1), else positions inside. A thread owns a contiguous slice of that order.
#include "rotary/rotary.h"

#include "core/parallel.h"
#include "gemm/epilogue.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

template <class X, class Angle>
inline void rotate_row(const X* x, X* out, const Angle* cos, const Angle* sin, int64_t half, int64_t D, Vec sign) {
  for_each_vec(half, [&](int64_t j, auto lanes) {
    const Vec a = lanes.load(x + j), b = lanes.load(x + half + j);
    const Vec c = lanes.load(cos + j), s = lanes.load(sin + j) * sign;
    lanes.store(fnma(b, s, a * c), out + j);
    lanes.store(fma(a, s, b * c), out + half + j);
  });
  for (int64_t j = 2 * half; j < D; ++j) out[j] = x[j];
}

// Strides of a [T,..] or [B,T,..] table over (b, t); a batch of one serves all.
struct TableStride {
  int64_t batch, position;
  explicit TableStride(const TensorView& table)
      : batch(table.ndim == 3 && table.shape[0] > 1 ? table.stride[0] : 0), position(table.stride[table.ndim - 2]) {}
};

template <class X, class Angle>
void rotate_all(const RotaryParams& p) {
  const int64_t B = p.x.shape[0], H = p.x.shape[1], T = p.x.shape[2], D = p.x.shape[3];
  const int64_t half = p.cos.shape[p.cos.ndim - 1];
  const Vec sign = Vec::set(p.inverse ? -1.0f : 1.0f);
  const TableStride cos_stride(p.cos), sin_stride(p.sin);
  const bool heads_inside = p.x.stride[1] < p.x.stride[2];
  const int outer_dim = heads_inside ? 2 : 1, inner_dim = heads_inside ? 1 : 2;
  const int64_t outer_size = heads_inside ? T : H, inner_size = heads_inside ? H : T;

  parallel_for(B * H * T, 1 + (int64_t{1} << 14) / (D + 1), [&](int64_t begin, int64_t end) {
    int64_t inner = begin % inner_size, outer = begin / inner_size % outer_size, b = begin / inner_size / outer_size;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t t = heads_inside ? outer : inner;
      const auto offset = [&](const TensorView& v) {
        return b * v.stride[0] + outer * v.stride[outer_dim] + inner * v.stride[inner_dim];
      };
      rotate_row(p.x.as<const X>() + offset(p.x), p.out.as<X>() + offset(p.out),
                 p.cos.as<const Angle>() + b * cos_stride.batch + t * cos_stride.position,
                 p.sin.as<const Angle>() + b * sin_stride.batch + t * sin_stride.position, half, D, sign);
      if (++inner < inner_size) continue;
      inner = 0;
      if (++outer < outer_size) continue;
      outer = 0;
      ++b;
    }
  });
}

}  // namespace

void rotary(const RotaryParams& p) {
  visit_float(p.x.dtype, [&](auto type) {
    visit_float(p.cos.dtype, [&](auto angle) { rotate_all<decltype(type), decltype(angle)>(p); });
  });
}

}  // namespace llmfast::LLMFAST_TARGET
