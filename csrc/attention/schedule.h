// Cutting a batch into work items and handing them to threads. Items differ in length (causal, packed sequences), so
// threads take the next one when they are free; every item writes its own results, so who runs it makes no difference.
#pragma once
#include "attention/tiles.h"
#include "core/parallel.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

struct Item {
  int64_t sequence, kv_head, chunk, chunks;  // chunk of the `chunks` of its head group
};

// Head groups of sequence s are cut into chunks(s) items each; items are numbered sequence by sequence, head by head.
class ItemList {
 public:
  // storage: B + 1 elements, which the caller keeps.
  template <class Chunks>
  ItemList(const AttentionParams& p, int64_t* storage, const Chunks& chunks) : B_(p.B), Hkv_(p.Hkv), first_(storage) {
    first_[0] = 0;
    for (int64_t s = 0; s < B_; ++s) first_[s + 1] = first_[s] + Hkv_ * chunks(s);
  }

  int64_t count() const { return first_[B_]; }
  int64_t chunks(int64_t sequence) const { return (first_[sequence + 1] - first_[sequence]) / Hkv_; }
  int64_t first(int64_t sequence, int64_t kv_head) const { return first_[sequence] + kv_head * chunks(sequence); }

  Item operator[](int64_t index) const {
    int64_t low = 0, high = B_;  // first_[low] <= index < first_[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_[middle] <= index ? low : high) = middle;
    }
    const int64_t cut = chunks(low), offset = index - first_[low];
    return {low, offset / cut, offset % cut, cut};
  }

 private:
  int64_t B_, Hkv_;
  int64_t* first_;
};

// Multiply-adds of one product over everything visible: what decides how many threads are worth waking.
inline int64_t estimated_work(const AttentionParams& p) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < p.B; ++s) {
    const HeadGroup g(p, s, 0);
    pairs += g.Tq * g.Tk;
  }
  return pairs * p.Hq * (p.D + p.Dv);
}

// Into how many parts to cut a head group that is `share` of the batch's `total`, so that there are about four items a
// thread: few enough to merge cheaply, enough to leave no thread idle for long.
inline int64_t parts_of(int64_t share, int64_t total, int threads, int64_t most) {
  if (threads == 1 || total == 0) return 1;
  const int64_t parts = static_cast<int64_t>(4.0 * threads * static_cast<double>(share) / static_cast<double>(total));
  return parts > most ? (most > 1 ? most : 1) : parts > 1 ? parts : 1;
}

// How many panels of `width` rows an item holds: up to `most`, fewer when there would not be two items a thread.
inline int64_t panels_an_item(const AttentionParams& p, int64_t width, int64_t most, int threads) {
  const int64_t total = p.B * p.Hkv * ((p.Tq * (p.Hq / p.Hkv) + width - 1) / width), share = total / (2 * threads);
  const int64_t panels = share < most ? share : most;
  return panels < 1 ? 1 : panels;
}

template <class Body>
inline void for_each_item(int64_t count, int threads, const Body& body) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
