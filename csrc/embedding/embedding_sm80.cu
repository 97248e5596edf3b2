// embedding, forward and backward; see embedding.h for the formulas and embedding_cuda.h for ids out of range.
//
// Forward: a warp owns a row of the result, eight columns to a lane at a time, in two quads where rows of float32 take
// part (Columns in core/cuda_elements.h).
// Backward: a warp owns 256 columns of a row v of the table. It finds v's run in the sorted ids by bisection and adds
// the gradients in the order of n, four loads in flight. Every element of grad_weight is written once, zero for absent
// ids: no atomics, and the result depends on the ids alone. A run is as serial as it is long: 4096 equal ids take about
// a thousand memory latencies.
#include "core/cuda_elements.h"
#include "core/cuda_launch.h"
#include "embedding/embedding_cuda.h"

namespace llmfast::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kStrip = kEight * kWarpSize;  // columns of a warp
constexpr int kInFlight = 4;

// Ids of any strides as int64; nullptr: the index along the last dimension.
struct Ids {
  const void* data;
  RowSet elements;  // each a row of one
  bool wide;
  uint32_t T;

  Ids(const TensorView& ids, const TensorView& like) : data(ids.data), elements(columns_of(ids)) {
    wide = ids.dtype == DType::i64;
    T = static_cast<uint32_t>(like.shape[like.ndim - 1]);
  }

  static TensorView columns_of(TensorView ids) {
    if (!ids.defined) return ids;
    ids.shape[ids.ndim] = 1;
    ids.stride[ids.ndim++] = 1;
    return ids;
  }

  __device__ __forceinline__ int64_t at(uint32_t n) const {
    if (!data) return n % T;
    const int64_t offset = elements.offset(n);
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

struct ForwardOperands {
  Ids ids, position_ids;
  RowSet weight, position_weight, out;
  uint32_t M;
  int64_t V, P;
  bool apart;
};

__global__ void __launch_bounds__(kWarpsPerBlock * kWarpSize)
    embedding_forward_kernel(const __grid_constant__ ForwardOperands o) {
  const uint32_t n = blockIdx.x * kWarpsPerBlock + warp();
  if (n >= o.M) return;
  const bool with_positions = o.position_weight.data != nullptr;
  const int64_t id = o.ids.at(n), position = with_positions ? o.position_ids.at(n) : 0;
  const bool valid = id >= 0 && id < o.V && (!with_positions || (position >= 0 && position < o.P));
  const RowPointer row = o.weight.row(valid ? static_cast<uint32_t>(id) : 0);
  const RowPointer position_row = o.position_weight.row(valid ? static_cast<uint32_t>(position) : 0);
  const RowPointer out = o.out.row(n);
  for (int strip = 0; strip * kStrip < out.C; ++strip) {
    const Columns columns(strip, kWarpSize, lane(), o.apart);
    float value[kEight], addend[kEight];
    load_floats(row, columns, 0.0f, value);
    load_floats(position_row, columns, 0.0f, addend);
#pragma unroll
    for (int j = 0; j < kEight; ++j) value[j] = valid ? value[j] + addend[j] : __uint_as_float(0x7fffffffu);
    store_floats(out, columns, value);
  }
}

struct BackwardOperands {
  RowSet grad, grad_weight;
  const void* sorted_ids;  // or nullptr
  const int64_t* order;
  bool wide;
  uint32_t M, T;
  uint32_t V;
  bool apart;
};

// How many of the sorted ids are below v.
template <class Id>
__device__ __forceinline__ uint32_t count_below(const Id* sorted, uint32_t count, int64_t v) {
  uint32_t low = 0, high = count;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (sorted[middle] < v) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ uint32_t first_of(const BackwardOperands& o, int64_t v) {
  return o.wide ? count_below(static_cast<const int64_t*>(o.sorted_ids), o.M, v)
                : count_below(static_cast<const int32_t*>(o.sorted_ids), o.M, v);
}

__global__ void __launch_bounds__(kWarpsPerBlock * kWarpSize)
    embedding_backward_kernel(const __grid_constant__ BackwardOperands o) {
  const uint32_t v = blockIdx.x * kWarpsPerBlock + warp();
  const Columns columns(static_cast<int>(blockIdx.y), kWarpSize, lane(), o.apart);
  if (v >= o.V) return;
  const bool sorted = o.sorted_ids != nullptr;
  const uint32_t begin = sorted ? first_of(o, v) : 0;
  const uint32_t end = sorted ? first_of(o, int64_t{v} + 1) : v < o.T ? o.M / o.T : 0;
  float sum[kEight] = {};
  for (uint32_t i = begin; i < end; i += kInFlight) {
    Eight raw[kInFlight];
#pragma unroll
    for (uint32_t u = 0; u < kInFlight; ++u) {
      raw[u] = {};
      if (i + u >= end) continue;
      const uint32_t n = sorted ? static_cast<uint32_t>(o.order[i + u]) : (i + u) * o.T + v;
      raw[u] = load_eight<true>(o.grad.row(n), columns);
    }
#pragma unroll
    for (uint32_t u = 0; u < kInFlight; ++u) {
      float addend[kEight];
      widen(raw[u], o.grad.dtype, addend);
#pragma unroll
      for (int j = 0; j < kEight; ++j) sum[j] += addend[j];
    }
  }
  store_floats(o.grad_weight.row(v), columns, sum);
}

}  // namespace

void embedding_forward_sm80(const EmbeddingParams& p, const Stream& stream) {
  const RowSet out(p.out);
  const ForwardOperands o{Ids(p.ids, p.ids),
                          Ids(p.position_ids, p.ids),
                          RowSet(p.weight),
                          RowSet(p.position_weight),
                          out,
                          static_cast<uint32_t>(out.rows.count),
                          p.weight.shape[0],
                          p.position_weight.shape[0],
                          any_float32({&p.weight, &p.position_weight, &p.out})};
  const Grid grid{(o.M + kWarpsPerBlock - 1) / kWarpsPerBlock};
  launch(stream, grid, kWarpsPerBlock * kWarpSize, 0, embedding_forward_kernel, o);
}

void embedding_backward_sm80(const EmbeddingBackwardParams& p, const Stream& stream) {
  const RowSet grad(p.grad), grad_weight(p.grad_weight);
  const BackwardOperands o{grad,
                           grad_weight,
                           p.sorted_ids.data,
                           p.order.as<int64_t>(),
                           p.sorted_ids.dtype == DType::i64,
                           static_cast<uint32_t>(grad.rows.count),
                           p.ids.defined ? 1 : static_cast<uint32_t>(p.grad.shape[p.grad.ndim - 2]),
                           static_cast<uint32_t>(p.grad_weight.shape[0]),
                           any_float32({&p.grad, &p.grad_weight})};
  const Grid grid{(o.V + kWarpsPerBlock - 1) / kWarpsPerBlock,
                  static_cast<unsigned>((grad_weight.C + kStrip - 1) / kStrip)};
  launch(stream, grid, kWarpsPerBlock * kWarpSize, 0, embedding_backward_kernel, o);
}

}  // namespace llmfast::cuda
