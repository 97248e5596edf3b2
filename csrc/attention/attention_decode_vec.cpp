// Attention for few query rows a head group (decoding with a KV cache), forward only; see attention.h for the formula.
// K and V are read once for all rows of the group, straight from the tensors, lanes along the head dim:
// bandwidth-bound.
//
// A thread owns an item: some keys of one head group. For each block of kBlock keys:
//   scores[row][key] = q k^T, fetching v ahead: its columns are walked a few registers at a time, which no hardware
//     prefetcher follows; softcap, mask, band; running maximum and sum, scores -> weights
//   acc[row][Dv] = acc * 2^(old maximum - new) + weights v
// A head group whose keys were cut into several items is merged afterwards, in the order of its keys.
//
// Memory: kDecodeRows x kBlock scores; kDecodeRows x (Dv + 2) partial results an item.
// Limits: Tq * Hq / Hkv <= kDecodeRows.
#include "attention/few_rows.h"
#include "attention/schedule.h"
#include "core/workspace.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kFewKeys = 16;     // whose values are fetched while their scores are computed
constexpr int64_t kLeastKeys = 256;  // fewer are not worth an item of their own
// One item's results: rows of acc (Dv padded to registers), their maxima and sums.
struct Partial {
  float *acc, *highest, *sum;
  int64_t stride;

  Partial(float* storage, int64_t Dv)
      : acc(storage + 2 * kDecodeRows),
        highest(storage),
        sum(storage + kDecodeRows),
        stride(rounded_up(Dv, Vec::kLanes)) {}
  static int64_t elements(int64_t Dv) { return kDecodeRows * (2 + rounded_up(Dv, Vec::kLanes)); }
};

template <class T>
class DecodeItem {
 public:
  DecodeItem(const HeadGroup& group, KeyRange keys, Partial partial)
      : g_(group), p_(group.params), keys_(keys), scale_(p_), partial_(partial) {
    queries_ = workspace<float>(Slot::attention_q, g_.rows * p_.D);
    scores_ = workspace<float>(Slot::attention_score, kDecodeRows * kBlock);
  }

  void run() {
    for (int64_t r = 0; r < g_.rows; ++r) {
      const T* q = g_.row<const T>(p_.q, r);
      for (int64_t d = 0; d < p_.D; ++d) queries_[r * p_.D + d] = to_float(q[d]) * scale_.of_q;
      partial_.highest[r] = kLowest;
      partial_.sum[r] = 0.0f;
      for (int64_t d = 0; d < partial_.stride; ++d) partial_.acc[r * partial_.stride + d] = 0.0f;
    }
    for (int64_t key = keys_.begin; key < keys_.end; key += kBlock) visit(intersect({key, key + kBlock}, keys_));
  }

 private:
  void visit(KeyRange block) {
    const T* keys = g_.key_row<const T>(p_.k, block.begin);
    const T* values = g_.key_row<const T>(p_.v, block.begin);
    for (int64_t j = 0; j < block.count(); j += kFewKeys) {
      const int64_t few = block.count() - j < kFewKeys ? block.count() - j : kFewKeys;
      prefetch_rows(values + j * p_.v.token_stride, p_.v.token_stride, few);
      for_row_blocks(g_.rows, [&](int64_t r, auto count) {
        dot_columns<decltype(count)::value>(queries_ + r * p_.D, keys + j * p_.k.token_stride, p_.k.token_stride, p_.D,
                                            few, scores_ + r * kBlock + j, kBlock);
      });
    }
    float keep[kDecodeRows];
    for (int64_t r = 0; r < g_.rows; ++r) {
      float* scores = scores_ + r * kBlock;
      if (scale_.of_tanh != 0.0f) cap(scores, block.count(), scale_.of_tanh);
      hide(scores, g_, r, block);
      keep[r] = soften(scores, block.count(), r);
    }
    add_weighed(scores_, scores_, keep, keys_seen(g_, block, scores_), values, p_.v.token_stride, g_.rows, p_.Dv,
                partial_.acc, partial_.stride);
  }

  void prefetch_rows(const T* rows, int64_t stride, int64_t count) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t d = 0; d < p_.Dv; d += kLine) __builtin_prefetch(rows + j * stride + d);
  }

  // scores -> 2^(score - maximum), 0 where hidden; returns the factor for what was summed before.
  float soften(float* scores, int64_t count, int64_t row) {
    const Vec hidden = Vec::set(-kInfinity);
    const float before = partial_.highest[row];
    Vec top = Vec::set(before);
    for (int64_t j = 0; j < count; j += Vec::kLanes) top = max(Vec::load(scores + j), top);
    const float now = reduce_max(top);
    Vec total = Vec::zero();
    for (int64_t j = 0; j < count; j += Vec::kLanes) {
      const Vec s = Vec::load(scores + j);
      const Vec weight = select(eq(s, hidden), Vec::zero(), exp2_of_gap(s - Vec::set(now)));
      weight.store(scores + j);
      total = total + weight;
    }
    float keep[Vec::kLanes];
    exp2_of_gap(Vec::set(before - now)).store(keep);
    partial_.highest[row] = now;
    partial_.sum[row] = partial_.sum[row] * keep[0] + reduce_add(total);
    return keep[0];
  }

  const HeadGroup& g_;
  const AttentionParams& p_;
  const KeyRange keys_;
  const ScoreScale scale_;
  const Partial partial_;
  float *queries_, *scores_;
};

// out and lse of one head group from the partial results of its items, which lie one after another.
template <class T>
void merge(const HeadGroup& g, float* storage, int64_t items) {
  const AttentionParams& p = g.params;
  const int64_t elements = Partial::elements(p.Dv);
  for (int64_t r = 0; r < g.rows; ++r) {
    Partial merged(storage, p.Dv);
    float* acc = merged.acc + r * merged.stride;
    float highest = merged.highest[r], sum = merged.sum[r];
    for (int64_t i = 1; i < items; ++i) {
      const Partial next(storage + i * elements, p.Dv);
      const float now = next.highest[r] > highest ? next.highest[r] : highest;
      float keep[Vec::kLanes], weight[Vec::kLanes];
      exp2_of_gap(Vec::set(highest - now)).store(keep);
      exp2_of_gap(Vec::set(next.highest[r] - now)).store(weight);
      for (int64_t d = 0; d < merged.stride; ++d) acc[d] = acc[d] * keep[0] + next.acc[r * next.stride + d] * weight[0];
      sum = sum * keep[0] + next.sum[r] * weight[0];
      highest = now;
    }
    const Vec factor = Vec::set(sum == 0.0f ? 0.0f : 1.0f / sum);
    T* out = g.row<T>(p.out, r);
    for_each_vec(p.Dv, [&](int64_t d, auto lanes) { lanes.store(Vec::load(acc + d) * factor, out + d); });
    *g.row<float>(p.lse, r) = natural_lse(highest, sum);
  }
}

template <class T>
void decode(const AttentionParams& p) {
  int64_t all_keys = 0;
  for (int64_t s = 0; s < p.B; ++s) all_keys += HeadGroup(p, s, 0).Tk;
  const int threads = threads_for(all_keys * p.Hkv * (p.D + p.Dv), 1 << 16);
  const ItemList items(p, workspace<int64_t>(Slot::reduction, p.B + 1), [&](int64_t s) {
    const int64_t Tk = HeadGroup(p, s, 0).Tk;
    return parts_of(Tk, all_keys * p.Hkv, threads, Tk / kLeastKeys);
  });
  const int64_t elements = Partial::elements(p.Dv);
  float* partials = workspace<float>(Slot::attention_acc, items.count() * elements);
  for_each_item(items.count(), threads, [&](int64_t index) {
    const Item item = items[index];
    const HeadGroup group(p, item.sequence, item.kv_head);
    const KeyRange seen = group.rows ? group.keys_of_any(0, group.rows - 1) : KeyRange{0, 0};
    const Range part = slice(seen.empty() ? 0 : seen.count(), item.chunk, item.chunks, Vec::kLanes);
    float* partial = partials + index * elements;
    DecodeItem<T>(group, {seen.begin + part.begin, seen.begin + part.end}, Partial(partial, p.Dv)).run();
    if (item.chunks == 1) merge<T>(group, partial, 1);
  });
  if (items.count() == p.B * p.Hkv) return;
  for_each_item(p.B * p.Hkv, threads, [&](int64_t index) {
    const int64_t s = index / p.Hkv, kv_head = index % p.Hkv;
    if (items.chunks(s) > 1)
      merge<T>(HeadGroup(p, s, kv_head), partials + items.first(s, kv_head) * elements, items.chunks(s));
  });
}

}  // namespace

void attention_decode(const AttentionParams& p) {
  visit_float(p.q.dtype, [&](auto type) { decode<decltype(type)>(p); });
}

}  // namespace llmfast::LLMFAST_TARGET
