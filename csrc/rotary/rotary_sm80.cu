// rotary; see rotary.h for the formula.
//
// A block owns one token, that is all heads of one (b, t), so that the rows of cos and sin are read from memory once
// and then from L1. A thread takes eight pairs (x[j], x[j + R/2]) of a head at a time, or eight of the elements from R
// on, which are copied. Every element is read and written once; the gradient is the same kernel with -sin. Most heads are
// aligned, rotated whole, and of a multiple of sixteen elements, with float32 tables: for those there is code without
// tails for each dtype.
#include "core/cuda_elements.h"
#include "core/cuda_launch.h"
#include "rotary/rotary_cuda.h"

namespace llmfast::cuda {
namespace {

constexpr int kMostThreads = 256;

// [B, H, T, D] with contiguous D.
struct Heads {
  char* data;
  int64_t stride[3];
  DType dtype;
  bool aligned;

  explicit Heads(const TensorView& t) : data(t.as<char>()), dtype(t.dtype) {
    aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int i = 0; i < 3; ++i) {
      stride[i] = t.stride[i];
      aligned = aligned && (t.shape[i] == 1 || stride[i] * size_of(dtype) % 16 == 0);
    }
  }

  // `count` elements of a head, from `first` on.
  __device__ __forceinline__ RowPointer part(int b, int h, int t, int first, int count) const {
    const int64_t bytes = size_of(dtype), offset = first * bytes;
    const int64_t start = b * stride[0] + h * stride[1] + t * stride[2];
    return {data + start * bytes + offset, count, dtype, aligned && offset % 16 == 0};
  }
};

// Heads as they may come; or of one dtype, aligned, with nothing but whole groups of eight pairs.
struct AnyHeads {
  static constexpr bool kPlain = false;
  __device__ static RowPointer part(const Heads& heads, int b, int h, int t, int first, int count) {
    return heads.part(b, h, t, first, count);
  }
  __device__ static RowPointer table(const RowSet& rows, uint32_t index) { return rows.row(index); }
};
template <DType kDType>
struct PlainHeads {
  static constexpr bool kPlain = true;
  __device__ static RowPointer part(const Heads& heads, int b, int h, int t, int first, int count) {
    const int64_t start = b * heads.stride[0] + h * heads.stride[1] + t * heads.stride[2] + first;
    return {heads.data + start * element_bytes(kDType), count, kDType, true, true};
  }
  __device__ static RowPointer table(const RowSet& rows, uint32_t index) {
    return TypedRows<DType::f32>::row(rows, index);
  }
};

struct Operands {
  Heads x, out;
  RowSet cos, sin;
  int H, T, D, half;
  bool table_per_batch, inverse;
};

template <class Kind>
__global__ void __launch_bounds__(kMostThreads) rotary_kernel(const __grid_constant__ Operands o) {
  const int t = static_cast<int>(blockIdx.x) % o.T, b = static_cast<int>(blockIdx.x) / o.T;
  const RowPointer cos_row = Kind::table(o.cos, o.table_per_batch ? blockIdx.x : t);
  const RowPointer sin_row = Kind::table(o.sin, o.table_per_batch ? blockIdx.x : t);
  const int rotated = (o.half + kEight - 1) / kEight;
  const int copied = Kind::kPlain ? 0 : (o.D - 2 * o.half + kEight - 1) / kEight;
  const int per_head = rotated + copied;
  for (int item = thread(); item < o.H * per_head; item += static_cast<int>(blockDim.x)) {
    const int h = item / per_head, group = item % per_head;
    if (!Kind::kPlain && group >= rotated) {
      const int rest = o.D - 2 * o.half, index = (group - rotated) * kEight;
      const Eight raw = load_eight<true>(o.x.part(b, h, t, 2 * o.half, rest), index);
      store_eight(o.out.part(b, h, t, 2 * o.half, rest), index, raw);
      continue;
    }
    const int index = group * kEight;
    const RowPointer low_part = Kind::part(o.x, b, h, t, 0, o.half), high_part = Kind::part(o.x, b, h, t, o.half, o.half);
    const Eight low_raw = load_eight<true>(low_part, index), high_raw = load_eight<true>(high_part, index);
    float cos[kEight], sin[kEight], low[kEight], high[kEight], low_out[kEight], high_out[kEight];
    load_floats(cos_row, index, 0.0f, cos);
    load_floats(sin_row, index, 0.0f, sin);
    widen(low_raw, low_part.dtype, low);
    widen(high_raw, high_part.dtype, high);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const float s = o.inverse ? -sin[j] : sin[j];
      low_out[j] = fmaf(low[j], cos[j], -high[j] * s);
      high_out[j] = fmaf(high[j], cos[j], low[j] * s);
    }
    store_floats(Kind::part(o.out, b, h, t, 0, o.half), index, low_out);
    store_floats(Kind::part(o.out, b, h, t, o.half, o.half), index, high_out);
  }
}

}  // namespace

void rotary_sm80(const RotaryParams& p, const Stream& stream) {
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  const int B = size(p.x.shape[0]), half = size(p.cos.shape[p.cos.ndim - 1]);
  const Operands o{Heads(p.x),
                   Heads(p.out),
                   RowSet(p.cos),
                   RowSet(p.sin),
                   size(p.x.shape[1]),
                   size(p.x.shape[2]),
                   size(p.x.shape[3]),
                   half,
                   p.cos.ndim == 3 && p.cos.shape[0] > 1,
                   p.inverse};
  const int items = o.H * ((half + kEight - 1) / kEight + (o.D - 2 * half + kEight - 1) / kEight);
  const int threads = items < kMostThreads ? (items + kWarpSize - 1) / kWarpSize * kWarpSize : kMostThreads;
  const bool plain = o.D == 2 * half && half % kEight == 0 && o.x.aligned && o.out.aligned &&
                     o.x.dtype == o.out.dtype && TypedRows<DType::f32>::hold(o.cos) && TypedRows<DType::f32>::hold(o.sin);
  const auto kernel = !plain                     ? rotary_kernel<AnyHeads>
                      : o.x.dtype == DType::bf16 ? rotary_kernel<PlainHeads<DType::bf16>>
                      : o.x.dtype == DType::f16  ? rotary_kernel<PlainHeads<DType::f16>>
                                                 : rotary_kernel<PlainHeads<DType::f32>>;
  launch(stream, Grid{static_cast<unsigned>(B) * o.T}, threads, 0, kernel, o);
}

}  // namespace llmfast::cuda
