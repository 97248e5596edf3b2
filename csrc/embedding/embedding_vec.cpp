// Embedding lookup and its gradient; see embedding.h for the formulas.
//
// Forward: one pass; a thread owns a slice of n. The ids were checked before (embedding_dispatch.cpp).
// Backward:
//   1. One thread sorts the n by id (counting sort, stable): V + N integers of workspace, whatever the thread count.
//   2. A thread owns a range of ids, cut so that ids + occurrences are shared evenly (small ids are frequent in most
//      vocabularies), and writes every row of its range once: the sum of the row's gradients, or zeros.
// The sum over an id runs in the order of n, so the result is bitwise the same for any number of threads.
// Limit: an id that makes up most of the input is summed by one thread.
#include "embedding/embedding.h"

#include "core/parallel.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "simd/stream.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

// ids[n] of either integer type; for an undefined tensor the index along T.
struct Ids {
  const void* data;
  bool wide;
  Rows elements;
  int64_t T;

  Ids(const TensorView& ids, int64_t T)
      : data(ids.data), wide(ids.dtype == DType::i64), elements(ids, ids.ndim), T(T) {}
  int64_t operator[](int64_t n) const {
    if (!data) return n % T;
    const int64_t offset = elements.offset(n);
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

template <class W, class O>
void look_up(const EmbeddingParams& p) {
  const int64_t C = p.weight.shape[1];
  const int64_t T = p.ids.ndim ? p.ids.shape[p.ids.ndim - 1] : 1;
  const Ids ids(p.ids, T), positions(p.position_ids, T);
  const W *weight = p.weight.as<const W>(), *position_weight = p.position_weight.as<const W>();
  const int64_t stride = p.weight.stride[0], position_stride = p.position_weight.stride[0];
  O* out = p.out.as<O>();
  parallel_for(ids.elements.count, 1 + (int64_t{1} << 14) / C, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const W* row = weight + ids[n] * stride;
      const W* position_row = position_weight ? position_weight + positions[n] * position_stride : nullptr;
      for_each_vec(C, [&](int64_t c, auto lanes) {
        Vec value = lanes.load(row + c);
        if (position_row) value = value + lanes.load(position_row + c);
        lanes.store(value, out + n * C + c);
      });
    }
  });
}

// The n sorted by id: those of id v are order[start[v] .. start[v + 1]), as element offsets of grad's rows.
struct SortedRows {
  const int64_t *start, *order;
};

SortedRows sort_by_id(const Ids& ids, const Rows& grad_rows, int64_t V) {
  const int64_t N = grad_rows.count;
  int64_t* start = workspace<int64_t>(Slot::embedding_order, V + 2 + N);
  int64_t* order = start + V + 2;
  for (int64_t v = 0; v < V + 2; ++v) start[v] = 0;
  for (int64_t n = 0; n < N; ++n) ++start[ids[n] + 2];
  for (int64_t v = 0; v < V; ++v) start[v + 2] += start[v + 1];
  for (int64_t n = 0; n < N; ++n) order[start[ids[n] + 1]++] = grad_rows.offset(n);  // moves start[v + 1] to v's end
  return {start, order};
}

// The first id of the `part`-th of `parts` shares of V ids and their occurrences.
int64_t first_id(const int64_t* start, int64_t V, int64_t part, int64_t parts) {
  const int64_t target = (V + start[V]) * part / parts;
  int64_t low = 0, high = V;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (middle + start[middle] < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// out[C] = sum of the rows of grad that begin at `offsets`, kept in registers, a few columns at a time.
template <class G, class W>
void sum_rows(const G* grad, const int64_t* offsets, int64_t count, W* out, int64_t C, bool stream) {
  constexpr int64_t kBlock = 4 * Vec::kLanes;
  int64_t c = 0;
  for (; c + kBlock <= C; c += kBlock) {
    Vec sum[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    for (int64_t e = 0; e < count; ++e)
      for (int u = 0; u < 4; ++u) sum[u] = sum[u] + Vec::load(grad + offsets[e] + c + u * Vec::kLanes);
    for (int u = 0; u < 4; ++u) put(sum[u], out + c + u * Vec::kLanes, AllLanes{}, stream);
  }
  for_each_vec(C - c, [&](int64_t i, auto lanes) {
    Vec sum = Vec::zero();
    for (int64_t e = 0; e < count; ++e) sum = sum + lanes.load(grad + offsets[e] + c + i);
    put(sum, out + c + i, lanes, stream);
  });
}

template <class G, class W>
void scatter(const EmbeddingBackwardParams& p) {
  const int64_t V = p.grad_weight.shape[0], C = p.grad_weight.shape[1];
  const int64_t T = p.grad.ndim > 1 ? p.grad.shape[p.grad.ndim - 2] : 1;
  const SortedRows rows = sort_by_id(Ids(p.ids, T), Rows(p.grad, p.grad.ndim - 1), V);
  const G* grad = p.grad.as<const G>();
  W* grad_weight = p.grad_weight.as<W>();
  const bool stream = V * C * size_of(p.grad_weight.dtype) > kStreamBytes && streamable(p.grad_weight, C);
  const int shares = threads_for(V + rows.start[V], 1 + (int64_t{1} << 14) / C);
  parallel_for(shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = first_id(rows.start, V, end, shares);
    for (int64_t v = first_id(rows.start, V, begin, shares); v < last; ++v)
      sum_rows(grad, rows.order + rows.start[v], rows.start[v + 1] - rows.start[v], grad_weight + v * C, C, stream);
    if (stream) streamed_stores_done();
  });
}

}  // namespace

void embedding_forward(const EmbeddingParams& p) {
  visit_float(p.weight.dtype, [&](auto weight_type) {
    visit_float(p.out.dtype, [&](auto out_type) { look_up<decltype(weight_type), decltype(out_type)>(p); });
  });
}

void embedding_backward(const EmbeddingBackwardParams& p) {
  visit_float(p.grad.dtype, [&](auto grad_type) {
    visit_float(p.grad_weight.dtype, [&](auto type) { scatter<decltype(grad_type), decltype(type)>(p); });
  });
}

}  // namespace llmfast::LLMFAST_TARGET
