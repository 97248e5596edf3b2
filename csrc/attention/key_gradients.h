// The order of work in the backward pass, which is the same for all kernels. An item is one part of the query rows of a
// head group; it sums grad_k and grad_v over them. A group in one part stores its sums at once, those of a group that is
// cut are added up, part by part in order, when all items are done.
#pragma once
#include "attention/schedule.h"
#include "core/workspace.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

// KeyGradients::elements(Tk, D, Dv): floats of one group's sums.
// compute(g, sums, item) fills `sums` from the item's rows; store(g, sums, parts, keys) writes the gradients of `keys`
// from `parts` sums that lie one after the other. Groups are cut at multiples of row_tile, keys at those of key_tile.
template <class KeyGradients, class Compute, class Store>
void differentiate_groups(const AttentionBackwardParams& p, int64_t work_a_thread, int64_t row_tile, int64_t key_tile,
                          const Compute& compute, const Store& store) {
  const int64_t work = estimated_work(p);
  const int threads = threads_for(work, work_a_thread);
  int64_t* storage = workspace<int64_t>(Slot::reduction, 2 * p.B + 1);
  const ItemList items(p, storage, [&](int64_t s) {
    const HeadGroup g(p, s, 0);
    return parts_of(g.rows * g.Tk * (p.D + p.Dv), work, threads, (g.rows + row_tile - 1) / row_tile);
  });
  int64_t* first_sum = storage + p.B + 1;  // of each sequence that is cut: head by head, part by part
  int64_t shared_elements = 0;
  for (int64_t s = 0; s < p.B; ++s) {
    first_sum[s] = shared_elements;
    if (items.chunks(s) == 1) continue;
    shared_elements += p.Hkv * items.chunks(s) * KeyGradients::elements(HeadGroup(p, s, 0).Tk, p.D, p.Dv);
  }
  float* shared = workspace<float>(Slot::staging, shared_elements);
  const auto sums_of = [&](const HeadGroup& g, int64_t part) {
    const int64_t elements = KeyGradients::elements(g.Tk, p.D, p.Dv), parts = items.chunks(g.sequence);
    return parts > 1 ? shared + first_sum[g.sequence] + (g.kv_head * parts + part) * elements
                     : workspace<float>(Slot::attention_acc, elements);
  };
  for_each_item(items.count(), threads, [&](int64_t index) {
    const Item item = items[index];
    const HeadGroup g(p, item.sequence, item.kv_head);
    float* sums = sums_of(g, item.chunk);
    compute(g, sums, item);
    if (item.chunks == 1) store(g, sums, 1, KeyRange{0, g.Tk});
  });
  if (items.count() == p.B * p.Hkv) return;
  for (int64_t s = 0; s < p.B; ++s) {
    if (items.chunks(s) == 1) continue;
    const int64_t tiles = (HeadGroup(p, s, 0).Tk + key_tile - 1) / key_tile;
    for_each_item(p.Hkv * tiles, threads, [&](int64_t index) {
      const HeadGroup g(p, s, index / tiles);
      const int64_t key = index % tiles * key_tile;
      store(g, sums_of(g, 0), items.chunks(s), intersect({key, key + key_tile}, {0, g.Tk}));
    });
  }
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET
