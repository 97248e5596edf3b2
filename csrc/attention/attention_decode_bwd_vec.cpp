// Attention for few query rows a head group (pooling by a query or two, short sequences), backward; see attention.h for the
// formula. As in attention_decode_vec.cpp, lanes lie along the head dim, and no lane waits for rows that are not there.
//
// A thread owns an item: some keys of one head group. For each block of kBlock keys:
//   scores[row][key] = q k^T, gradients[row][key] = grad_out v^T; softcap, mask, band
//   scores -> weights P, gradients -> dS                         0 where hidden
//   grad_q[row][D] += dS k
//   grad_k[key] = sum over rows of dS q, grad_v[key] = sum over rows of P grad_out      stored: no other item has the key
// grad_q of a head group whose keys were cut into several items is added up afterwards, in the order of its keys.
//
// Memory: 3 x kDecodeRows x kBlock scores; kDecodeRows x D sums an item.
// Limits: Tq * Hq / Hkv <= kDecodeRows.
#include "attention/few_rows.h"
#include "attention/schedule.h"
#include "core/workspace.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kLeastKeys = 128;  // fewer are not worth an item of their own

template <class T>
class DecodeBackwardItem {
 public:
  // grad_q: sums [rows][stride], unscaled.
  DecodeBackwardItem(const HeadGroup& group, const AttentionBackwardParams& params, float* grad_q, int64_t stride)
      : g_(group), p_(params), scale_(p_), grad_q_(grad_q), stride_(stride) {
    scaled_queries_ = workspace<float>(Slot::attention_q, g_.rows * (2 * p_.D + p_.Dv) + Vec::kLanes);
    queries_ = scaled_queries_ + g_.rows * p_.D;
    grad_rows_ = queries_ + g_.rows * p_.D;
    scores_ = workspace<float>(Slot::attention_score, 3 * kDecodeRows * kBlock);
    gradients_ = scores_ + kDecodeRows * kBlock;
    slopes_ = gradients_ + kDecodeRows * kBlock;
  }

  void run(KeyRange keys) {
    for (int64_t i = 0; i < g_.rows * stride_; ++i) grad_q_[i] = 0.0f;
    for (int64_t r = 0; r < g_.rows; ++r) load_row(r);
    const KeyRange seen = g_.rows ? intersect(g_.keys_of_any(0, g_.rows - 1), keys) : KeyRange{keys.begin, keys.begin};
    clear({keys.begin, seen.empty() ? keys.end : seen.begin});
    for (int64_t key = seen.begin; key < seen.end; key += kBlock) visit(intersect({key, key + kBlock}, seen));
    if (!seen.empty()) clear({seen.end, keys.end});
  }

 private:
  // Rows that saw nothing, or nothing above kNoGradient, are absent: all is hidden from them.
  void load_row(int64_t r) {
    const float lse = *g_.row<const float>(p_.lse, r);
    absent_[r] = lse < kNoGradient;
    lse_[r] = lse * kLog2E;
    const T *q = g_.row<const T>(p_.q, r), *out = g_.row<const T>(p_.out, r), *grad_out = g_.row<const T>(p_.grad_out, r);
    for_each_vec(p_.D, [&](int64_t d, auto lanes) {
      const Vec x = absent_[r] ? Vec::zero() : lanes.load(q + d);
      lanes.store(x, queries_ + r * p_.D + d);
      lanes.store(x * Vec::set(scale_.of_q), scaled_queries_ + r * p_.D + d);
    });
    Vec delta = Vec::zero();
    for_each_vec(p_.Dv, [&](int64_t d, auto lanes) {
      const Vec x = absent_[r] ? Vec::zero() : lanes.load(grad_out + d);
      lanes.store(x, grad_rows_ + r * p_.Dv + d);
      delta = fma(x, absent_[r] ? Vec::zero() : lanes.load(out + d), delta);
    });
    delta_[r] = reduce_add(delta);
  }

  void visit(KeyRange block) {
    const T* keys = g_.key_row<const T>(p_.k, block.begin);
    const T* values = g_.key_row<const T>(p_.v, block.begin);
    for_row_blocks(g_.rows, [&](int64_t r, auto count) {
      constexpr int kRows = decltype(count)::value;
      dot_columns<kRows>(scaled_queries_ + r * p_.D, keys, p_.k.token_stride, p_.D, block.count(), scores_ + r * kBlock, kBlock);
      dot_columns<kRows>(grad_rows_ + r * p_.Dv, values, p_.v.token_stride, p_.Dv, block.count(), gradients_ + r * kBlock,
                         kBlock);
    });
    for (int64_t r = 0; r < g_.rows; ++r) differentiate(r, block);
    float keep[kDecodeRows];
    for (float& factor : keep) factor = 1.0f;
    add_weighed(scores_, gradients_, keep, keys_seen(g_, block, scores_), keys, p_.k.token_stride, g_.rows, p_.D, grad_q_,
                stride_);
    with_count<kDecodeRows>(g_.rows, [&](auto count) {
      store_sums<decltype(count)::value>(p_.grad_k, block, gradients_, queries_, p_.D, p_.scale);
      store_sums<decltype(count)::value>(p_.grad_v, block, scores_, grad_rows_, p_.Dv, 1.0f);
    });
  }

  // scores -> weights, dP -> dS.
  void differentiate(int64_t row, KeyRange block) {
    float *scores = scores_ + row * kBlock, *gradients = gradients_ + row * kBlock, *slopes = slopes_ + row * kBlock;
    const bool capped = scale_.of_tanh != 0.0f;
    if (capped) cap(scores, block.count(), scale_.of_tanh, slopes);
    hide(scores, g_, row, block);
    const Vec zero = Vec::zero(), hidden = Vec::set(-kInfinity), lse = Vec::set(lse_[row]), delta = Vec::set(delta_[row]);
    for (int64_t j = 0; j < block.count(); j += Vec::kLanes) {
      const Vec s = Vec::load(scores + j);
      const Mask is_hidden = eq(s, hidden);
      const Vec p = exp2_of_gap(s - lse);
      Vec ds = p * (Vec::load(gradients + j) - delta);
      if (capped) ds = ds * Vec::load(slopes + j);
      (absent_[row] ? zero : select(is_hidden, zero, p)).store(scores + j);
      (absent_[row] ? zero : select(is_hidden, zero, ds)).store(gradients + j);
    }
  }

  // t's rows of `block` = scale * sum over kRows rows of factors[row][key] * x[row].
  template <int kRows>
  void store_sums(const HeadTensor& t, KeyRange block, const float* factors, const float* x, int64_t D, float scale) const {
    for (int64_t j = 0; j < block.count(); ++j) {
      T* out = g_.key_row<T>(t, block.begin + j);
      Vec factor[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) factor[r] = Vec::set(factors[r * kBlock + j] * scale);
      for_each_vec(D, [&](int64_t d, auto lanes) {
        Vec sum = factor[0] * Vec::load(x + d);
#pragma GCC unroll 8
        for (int r = 1; r < kRows; ++r) sum = fma(factor[r], Vec::load(x + r * D + d), sum);
        lanes.store(sum, out + d);
      });
    }
  }

  // Gradients of keys that no row sees.
  void clear(KeyRange keys) const {
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      T *grad_k = g_.key_row<T>(p_.grad_k, key), *grad_v = g_.key_row<T>(p_.grad_v, key);
      for_each_vec(p_.D, [&](int64_t d, auto lanes) { lanes.store(Vec::zero(), grad_k + d); });
      for_each_vec(p_.Dv, [&](int64_t d, auto lanes) { lanes.store(Vec::zero(), grad_v + d); });
    }
  }

  const HeadGroup& g_;
  const AttentionBackwardParams& p_;
  const ScoreScale scale_;
  float* const grad_q_;
  const int64_t stride_;
  float *scaled_queries_, *queries_, *grad_rows_, *scores_, *gradients_, *slopes_;
  float lse_[kDecodeRows], delta_[kDecodeRows];
  bool absent_[kDecodeRows];
};

// grad_q of one head group from the sums of its items, which lie `elements` apart.
template <class T>
void store_grad_q(const HeadGroup& g, const AttentionBackwardParams& p, const float* sums, int64_t stride, int64_t elements,
                  int64_t items) {
  for (int64_t r = 0; r < g.rows; ++r) {
    T* out = g.row<T>(p.grad_q, r);
    for_each_vec(p.D, [&](int64_t d, auto lanes) {
      Vec sum = Vec::load(sums + r * stride + d);
      for (int64_t i = 1; i < items; ++i) sum = sum + Vec::load(sums + i * elements + r * stride + d);
      lanes.store(sum * Vec::set(p.scale), out + d);
    });
  }
}

template <class T>
void decode_backward(const AttentionBackwardParams& p) {
  const int64_t work = estimated_work(p);
  const int threads = threads_for(work, 1 << 16);
  const ItemList items(p, workspace<int64_t>(Slot::reduction, p.B + 1), [&](int64_t s) {
    const HeadGroup g(p, s, 0);
    return parts_of(g.rows * g.Tk * (p.D + p.Dv), work, threads, g.Tk / kLeastKeys);
  });
  const int64_t stride = rounded_up(p.D, Vec::kLanes), elements = kDecodeRows * stride;
  float* sums = workspace<float>(Slot::attention_acc, items.count() * elements);
  for_each_item(items.count(), threads, [&](int64_t index) {
    const Item item = items[index];
    const HeadGroup g(p, item.sequence, item.kv_head);
    const Range keys = slice(g.Tk, item.chunk, item.chunks, Vec::kLanes);
    DecodeBackwardItem<T>(g, p, sums + index * elements, stride).run({keys.begin, keys.end});
    if (item.chunks == 1) store_grad_q<T>(g, p, sums + index * elements, stride, elements, 1);
  });
  if (items.count() == p.B * p.Hkv) return;
  for_each_item(p.B * p.Hkv, threads, [&](int64_t index) {
    const int64_t s = index / p.Hkv, kv_head = index % p.Hkv;
    if (items.chunks(s) > 1)
      store_grad_q<T>(HeadGroup(p, s, kv_head), p, sums + items.first(s, kv_head) * elements, stride, elements,
                      items.chunks(s));
  });
}

}  // namespace

void attention_decode_backward(const AttentionBackwardParams& p) {
  visit_float(p.q.dtype, [&](auto type) { decode_backward<decltype(type)>(p); });
}

}  // namespace llmfast::LLMFAST_TARGET
