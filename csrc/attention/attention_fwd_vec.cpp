// Masked attention, forward, on vector registers; see attention.h for the formula.
//
// A thread owns an item: up to kItemRows query rows of one head group, in panels of kWidth rows, one row a lane.
//   for each tile of kKeys keys that some row sees:
//     widen the tile's K and V rows, unless they are float32 already             shared by all panels, so by all heads
//     for each panel:
//       S^T[keys][lanes] = K Q^T                                                 Q^T carries the softmax scale
//       softcap, mask, band; running maximum and sum, S^T -> P^T                 everything vertical: a lane is a query
//       O^T[Dv][lanes] = O^T * 2^(old maximum - new) + V^T P^T                   the rescale rides on the accumulation
//   out = O^T / sum, transposed back; lse
// Keys outside a panel's band are not touched; only tiles that cross its edge, or lie under a mask, pay for hiding.
//
// Memory: a panel's S^T (kKeys x kWidth floats), Q^T and O^T stay in L1 while a tile is multiplied; the item's panels
// and the tile's K and V stay in L2. Nothing grows with Tq or Tk.
#include "attention/operands.h"
#include "attention/schedule.h"
#include "attention/softmax.h"
#include "core/workspace.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kKeys = 64;
static_assert(kKeys <= kMostMaskKeys);
constexpr int64_t kItemRows = 128;
constexpr int64_t kItemBytes = 192 << 10;  // of Q^T and O^T: with K and V tiles they share L2

class ForwardItem {
 public:
  ForwardItem(const HeadGroup& group, int64_t first_row, int64_t panels)
      : g_(group), p_(group.params), D_(p_.D), Dv_(p_.Dv), first_row_(first_row), scale_(p_) {
    const int64_t rows_left = (g_.rows - first_row + kWidth - 1) / kWidth;
    panels_ = panels < rows_left ? panels : rows_left;
    queries_ = workspace<float>(Slot::attention_q, panels * kWidth * (D_ + rounded_up(D_, Vec::kLanes)));
    outputs_ = workspace<float>(Slot::attention_acc, panels * kWidth * Dv_);
    scores_ = workspace<float>(Slot::attention_score, 2 * kKeys * kWidth);
    mask_buffer_ = scores_ + kKeys * kWidth;
    key_buffer_ = workspace<float>(Slot::attention_k, kKeys * rounded_up(D_, Vec::kLanes));
    value_buffer_ = workspace<float>(Slot::attention_v, 2 * kKeys * rounded_up(Dv_, Vec::kLanes));
    clean_values_ = value_buffer_ + kKeys * rounded_up(Dv_, Vec::kLanes);
  }

  void run() {
    load_queries();
    for (int64_t i = 0; i < panels_; ++i) {
      softmax_[i].reset();
      fresh_[i] = true;
    }
    const KeyRange seen = g_.keys_of_any(first_row_, last_row(panels_ - 1));
    for (int64_t key = seen.begin / kKeys * kKeys; key < seen.end; key += kKeys)
      visit_tile(intersect({key, key + kKeys}, seen));
    for (int64_t i = 0; i < panels_; ++i) store_panel(i);
  }

 private:
  int64_t row_of(int64_t panel) const { return first_row_ + panel * kWidth; }
  int64_t last_row(int64_t panel) const { return (row_of(panel + 1) < g_.rows ? row_of(panel + 1) : g_.rows) - 1; }
  float* query_panel(int64_t panel) const { return queries_ + panel * kWidth * D_; }
  float* output_panel(int64_t panel) const { return outputs_ + panel * kWidth * Dv_; }

  void load_queries() {
    const int64_t stride = rounded_up(D_, Vec::kLanes);
    float* rows = queries_ + panels_ * kWidth * D_;
    visit_float(p_.q.dtype, [&](auto type) {
      for (int64_t i = 0; i < panels_; ++i) {
        load_rows<decltype(type)>(rows, stride, g_, p_.q, row_of(i), kWidth, D_, [](int64_t) { return false; });
        transpose_rows(query_panel(i), rows, stride, D_, scale_.of_q);
      }
    });
  }

  void visit_tile(KeyRange tile) {
    tile_ = tile;
    loaded_ = checked_ = false;
    for (int64_t i = 0; i < panels_; ++i) {
      const KeyRange keys = intersect(tile, g_.keys_of_any(row_of(i), last_row(i)));
      if (!keys.empty()) visit_panel(i, keys);
    }
  }

  void visit_panel(int64_t panel, KeyRange in_band) {
    const MaskTile mask = load_mask_tile(mask_buffer_, g_, row_of(panel), in_band);
    const KeyRange keys = mask.keys;
    if (keys.empty()) return;
    const bool banded = !contains(g_.keys_of_all(row_of(panel), last_row(panel)), keys);
    if (!loaded_) load_tile();

    product_by_rows(keys_tile_.from(keys.begin - tile_.begin).data, keys_tile_.stride, {query_panel(panel), kWidth},
                    keys.count(), D_, {scores_, kWidth});
    if (banded) {
      const LaneBand band[] = {{g_, row_of(panel), keys.begin}, {g_, row_of(panel) + Vec::kLanes, keys.begin}};
      soften(panel, keys, {band, mask.bias});
    } else {
      soften(panel, keys, {nullptr, mask.bias});
    }
  }

  void soften(int64_t panel, KeyRange keys, const Hiding& hiding) {
    OnlineSoftmax& softmax = softmax_[panel];
    if (hiding.any() || scale_.of_tanh != 0.0f) finish_scores(scores_, keys.count(), scale_.of_tanh, hiding);
    if (hiding.any()) {
      softmax.update<true>(scores_, keys.count());
      if (!checked_) bad_values_.find(values_tile_, tile_.count(), Dv_, clean_values_);
      checked_ = true;
      add_values(panel, keys, bad_values_.clean);
      if (bad_values_.count > 0)
        bad_values_.add(values_tile_, {keys.begin - tile_.begin, keys.end - tile_.begin}, scores_, kWidth, Dv_,
                        output_panel(panel));
    } else {
      softmax.update<false>(scores_, keys.count());
      add_values(panel, keys, values_tile_);
    }
  }

  void add_values(int64_t panel, KeyRange keys, RowTile values) {
    product_by_depth(values.from(keys.begin - tile_.begin).data, values.stride, {scores_, kWidth}, Dv_, keys.count(),
                     {output_panel(panel), kWidth}, fresh_[panel] ? nullptr : softmax_[panel].keep);
    fresh_[panel] = false;
  }

  void load_tile() {
    keys_tile_ = load_keys(g_, p_.k, tile_, D_, key_buffer_);
    values_tile_ = load_keys(g_, p_.v, tile_, Dv_, value_buffer_);
    loaded_ = true;
  }

  void store_panel(int64_t panel) {
    float factor[kWidth];
    softmax_[panel].inverse(factor);
    if (fresh_[panel])
      for (int64_t i = 0; i < Dv_ * kWidth; ++i) output_panel(panel)[i] = 0.0f;
    visit_float(p_.out.dtype, [&](auto type) {
      store_lanes<decltype(type)>(g_, p_.out, row_of(panel), output_panel(panel), Dv_, factor);
    });
    for (int64_t row = row_of(panel); row <= last_row(panel); ++row)
      *g_.row<float>(p_.lse, row) = softmax_[panel].lse(static_cast<int>(row - row_of(panel)));
  }

  const HeadGroup& g_;
  const AttentionParams& p_;
  const int64_t D_, Dv_, first_row_;
  const ScoreScale scale_;
  int64_t panels_;
  float *queries_, *outputs_, *scores_, *mask_buffer_, *key_buffer_, *value_buffer_, *clean_values_;
  KeyRange tile_;
  RowTile keys_tile_, values_tile_;
  bool loaded_, checked_;
  BadKeys<kKeys> bad_values_;
  OnlineSoftmax softmax_[kItemRows / kWidth];
  bool fresh_[kItemRows / kWidth];
};

}  // namespace

void attention_forward(const AttentionParams& p) {
  const int threads = threads_for(estimated_work(p), 1 << 18);
  const int64_t in_l2 = kItemBytes / (kWidth * (p.D + p.Dv) * static_cast<int64_t>(sizeof(float)));
  const int64_t most = in_l2 < kItemRows / kWidth ? in_l2 : kItemRows / kWidth;
  const int64_t panels = panels_an_item(p, kWidth, most, threads), item_rows = panels * kWidth;
  const ItemList items(p, workspace<int64_t>(Slot::reduction, p.B + 1), [&](int64_t s) {
    return (HeadGroup(p, s, 0).rows + item_rows - 1) / item_rows;
  });
  for_each_item(items.count(), threads, [&](int64_t index) {
    const Item item = items[index];
    const HeadGroup group(p, item.sequence, item.kv_head);
    // The last rows of a causal group see the most keys: they go first.
    ForwardItem(group, (item.chunks - 1 - item.chunk) * item_rows, panels).run();
  });
}

}  // namespace llmfast::LLMFAST_TARGET
