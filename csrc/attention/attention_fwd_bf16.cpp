// Masked attention, forward, in bf16 blocks, for AMX and AVX512_BF16; see attention.h for the formula.
//
// A thread owns an item: up to kItemRows query rows of one head group, in panels of kWidth rows, one row a lane.
//   pack Q^T of all panels                                                       VNNI form, unscaled
//   for each segment of kSegment keys that some row sees:
//     pack K and V^T                                                             shared by all panels, so by all heads
//     for each panel, for each step of up to kKeys keys:
//       S^T[keys][lanes] = K Q^T
//       scale, softcap, mask, band; running maximum; P^T = 2^(S^T - maximum)     everything vertical: a lane is a query
//       O^T[Dv][lanes] += V^T P^T                                                P^T in VNNI form, bf16
//   out = O^T / sum, transposed back; lse
// The steps of a segment run as a pipeline: while one step's scores are exponentiated, which is vector work, AMX's tile
// unit does S^T of the next step and V^T P^T of the previous one. A lane's maximum is raised only where it would grow
// by more than kSlack, so sums are rarely rescaled. A lane's result depends on no other lane, nor on the item's extent.
//
// Memory: S^T and P^T of two steps, a panel's Q^T and O^T stay in L1 (36 KiB at D = 64); a segment's K and V^T and the
// item's panels in L2. Nothing grows with Tq or Tk.
// Limits: bf16; head dims up to 256 (kMostBlockHeadDim), padded to multiples of 32 with zeros.
#include "attention/product_bf16.h"
#include "attention/schedule.h"
#include "core/workspace.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kKeys = 64;
constexpr int64_t kSegment = 512;
constexpr int64_t kItemRows = 512;
constexpr int64_t kItemBytes = 512 << 10;  // of Q^T and O^T: with the segment they share L2
constexpr float kSlack = 6.0f;             // bits
static_assert(kSegment % kKeys == 0 && kKeys % kBlock == 0 && kKeys <= kMostMaskKeys);

// One step's S^T -> P^T, two keys a unit.
template <bool kHides>
class Exponentiation {
 public:
  // scores * factor - highest is the exponent; adds to sum.
  Exponentiation(const float* scores, bf16* weights, int64_t keys, float factor, const float* highest)
      : scores_(scores), weights_(weights), pairs_(keys / 2), factor_(Vec::set(factor)) {
#pragma GCC unroll 2
    for (int v = 0; v < kWidthVecs; ++v) {
      offset_[v] = Vec::zero() - Vec::load(highest + v * Vec::kLanes);
      sum_[v] = Vec::zero();
    }
  }

  int64_t units() const { return pairs_; }

  __attribute__((always_inline)) void step(int64_t count) {
    const int64_t end = pair_ + count < pairs_ ? pair_ + count : pairs_;
    for (; pair_ < end; ++pair_) {
      const float* at = scores_ + 2 * pair_ * kWidth;
      Vec even[kWidthVecs], odd[kWidthVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kWidthVecs; ++v) {
        even[v] = weight(Vec::load(at + v * Vec::kLanes), offset_[v]);
        odd[v] = weight(Vec::load(at + kWidth + v * Vec::kLanes), offset_[v]);
        sum_[v] = sum_[v] + (even[v] + odd[v]);
      }
      store_pair(weights_ + pair_offset(pair_), even, odd);
    }
  }

  void add_sums(float* sum) const {
#pragma GCC unroll 2
    for (int v = 0; v < kWidthVecs; ++v) (Vec::load(sum + v * Vec::kLanes) + sum_[v]).store(sum + v * Vec::kLanes);
  }

 private:
  __attribute__((always_inline)) Vec weight(Vec score, Vec offset) const {
    const Vec p = coarse_exp2(fma(score, factor_, offset));
    return kHides ? select(eq(score, Vec::set(-kInfinity)), Vec::zero(), p) : p;
  }

  const float* scores_;
  bf16* weights_;
  int64_t pair_ = 0, pairs_;
  Vec factor_, offset_[kWidthVecs], sum_[kWidthVecs];
};

// Running maximum (log2 domain) and sum of a panel, and by what the last raise of the maximum shrinks the sums.
struct LazySoftmax {
  float highest[kWidth], sum[kWidth], keep[kWidth];

  void reset() {
    for (int lane = 0; lane < kWidth; ++lane) {
      highest[lane] = kLowest;  // not -inf: the gap between two of them is 0, and -inf - kLowest is still -inf
      sum[lane] = 0.0f;
    }
  }

  // Looks at scores * factor. True: some lane's maximum was raised, and what was summed before must be scaled by keep.
  bool raise(const float* scores, int64_t keys, float factor) {
    constexpr int kL = Vec::kLanes;
    bool raised = false;
    for (int v = 0; v < kWidthVecs; ++v) {
      const float* column = scores + v * kL;
      Vec top[4];
      for (Vec& t : top) t = Vec::set(-kInfinity);
      for (int64_t j = 0; j < keys; j += 4)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) top[u] = max(Vec::load(column + (j + u) * kWidth), top[u]);
      const Vec now = max(max(top[0], top[1]), max(top[2], top[3])) * Vec::set(factor);
      const Vec before = Vec::load(highest + v * kL);
      const Mask grew = gt(now, before + Vec::set(kSlack));
      if (!any(grew)) {
        Vec::set(1.0f).store(keep + v * kL);
        continue;
      }
      raised = true;
      const Vec shrink = select(grew, exp2_of_gap(before - now), Vec::set(1.0f));
      select(grew, now, before).store(highest + v * kL);
      shrink.store(keep + v * kL);
      (Vec::load(sum + v * kL) * shrink).store(sum + v * kL);
    }
    return raised;
  }

  // 1 / sum, 0 for rows that saw nothing.
  void inverse(float* factor) const {
    for (int v = 0; v < kWidth; v += Vec::kLanes) {
      const Vec total = Vec::load(sum + v);
      select(eq(total, Vec::zero()), Vec::zero(), Vec::set(1.0f) / total).store(factor + v);
    }
  }
};

struct Step {
  int64_t panel = -1;
  KeyRange keys = {0, 0};  // whole blocks
  bool banded = false;
  const float* mask = nullptr;  // MaskTile::bias
  int slot = 0;  // of the two buffers of scores and of weights

  bool exists() const { return panel >= 0; }
  int64_t blocks() const { return keys.count() / kBlock; }
};

class ForwardItem {
 public:
  ForwardItem(const HeadGroup& group, int64_t first_row, int64_t panels)
      : g_(group),
        p_(group.params),
        D_blocks_(blocks_of(p_.D)),
        Dv_blocks_(blocks_of(p_.Dv)),
        first_row_(first_row),
        scale_(p_),
        plain_(scale_.of_tanh == 0.0f && scale_.of_q > 0.0f) {
    const int64_t panels_left = (g_.rows - first_row + kWidth - 1) / kWidth;
    panels_ = panels < panels_left ? panels : panels_left;
    queries_ = workspace<bf16>(Slot::attention_q, (panels + 1) * D_blocks_ * kBlockElements);
    outputs_ = workspace<float>(Slot::attention_acc, panels * Dv_blocks_ * kBlockElements);
    packed_keys_ = workspace<bf16>(Slot::attention_k, kSegment * D_blocks_ * kBlock);
    packed_values_ = workspace<bf16>(Slot::attention_v, kSegment * Dv_blocks_ * kBlock);
    scores_ = workspace<float>(Slot::attention_score, 4 * kKeys * kWidth);
    mask_buffer_ = scores_ + 2 * kKeys * kWidth;
    weights_ = reinterpret_cast<bf16*>(scores_ + 3 * kKeys * kWidth);
  }

  void run() {
    load_queries();
    for (int64_t i = 0; i < panels_; ++i) softmax_[i].reset();
    for (int64_t i = 0; i < panels_ * Dv_blocks_ * kBlockElements; ++i) outputs_[i] = 0.0f;
    const KeyRange seen = g_.keys_of_any(first_row_, last_row(panels_ - 1));
    for (int64_t key = seen.begin / kSegment * kSegment; key < seen.end; key += kSegment)
      visit_segment(whole_blocks(intersect({key, key + kSegment}, seen)));
    for (int64_t i = 0; i < panels_; ++i) store_panel(i);
  }

 private:
  int64_t row_of(int64_t panel) const { return first_row_ + panel * kWidth; }
  int64_t last_row(int64_t panel) const { return (row_of(panel + 1) < g_.rows ? row_of(panel + 1) : g_.rows) - 1; }
  bf16* query_panel(int64_t panel) const { return queries_ + panel * D_blocks_ * kBlockElements; }
  float* output_panel(int64_t panel) const { return outputs_ + panel * Dv_blocks_ * kBlockElements; }
  float* scores_of(const Step& step) const { return scores_ + step.slot * kKeys * kWidth; }
  bf16* weights_of(const Step& step) const { return weights_ + step.slot * kKeys * kWidth; }

  void load_queries() {
    bf16* rows = query_panel(panels_);
    for (int64_t i = 0; i < panels_; ++i) {
      copy_panel(rows, g_, p_.q, row_of(i), p_.D, [](int64_t) { return false; });
      bf16* panel = query_panel(i);
      for (int64_t d = 0; d < D_blocks_; ++d)
        b_block_from_columns(panel + d * kBlockElements, rows + d * kBlock, D_blocks_ * kBlock, kBlock, kBlock);
    }
  }

  void visit_segment(KeyRange segment) {
    segment_ = segment;
    next_panel_ = -1;
    next_key_ = panel_keys_.end = 0;
    Step current = next_step(), previous;
    if (!current.exists()) return;
    pack_key_rows(packed_keys_, g_, p_.k, segment_, p_.D);
    pack_key_columns(packed_values_, g_, p_.v, segment_, p_.Dv);
    bad_values_.find_and_clear(packed_values_, g_, p_.v, segment_, p_.Dv);

    NoWork none;
    compute_scores(current, none, 0);
    while (current.exists()) {
      const bool hides = current.banded || current.mask, finished = hides || !plain_;
      if (finished) finish_scores(current);
      const float factor = finished ? 1.0f : scale_.of_q;
      LazySoftmax& softmax = softmax_[current.panel];
      const bool raised = softmax.raise(scores_of(current), current.keys.count(), factor);
      const Step next = next_step();
      if (hides) advance<true>(current, factor, previous, next);
      else advance<false>(current, factor, previous, next);
      if (raised) rescale_output(current.panel);
      previous = current;
      current = next;
    }
    add_values(previous, none, 0);
  }

  // The next step in which something is visible, panel by panel. Overwrites the mask of the step before.
  Step next_step() {
    for (;;) {
      while (next_key_ >= panel_keys_.end) {
        if (++next_panel_ >= panels_) return {};
        const int64_t first = row_of(next_panel_), last = last_row(next_panel_);
        panel_keys_ = intersect(segment_, g_.keys_of_any(first, last));
        if (!panel_keys_.empty()) panel_keys_ = whole_blocks(panel_keys_);
        keys_of_all_ = g_.keys_of_all(first, last);
        next_key_ = panel_keys_.begin;
      }
      Step step;
      step.panel = next_panel_;
      step.keys = intersect({next_key_, next_key_ + kKeys}, panel_keys_);
      next_key_ = step.keys.end;
      const MaskTile mask =
          load_mask_tile(mask_buffer_, g_, row_of(step.panel), intersect(step.keys, {0, g_.Tk}), kBlock);
      if (mask.keys.empty()) continue;
      step.keys = whole_blocks(mask.keys);
      step.mask = mask.bias;
      step.banded = !contains(keys_of_all_, step.keys);
      step.slot = slot_ ^= 1;
      return step;
    }
  }

  // S^T, unscaled.
  template <class Work>
  __attribute__((always_inline)) void compute_scores(const Step& step, Work& work, int64_t share) {
    const bf16* keys = packed_keys_ + (step.keys.begin - segment_.begin) * D_blocks_ * kBlock;
    for (int64_t block = 0; block < step.blocks(); ++block)
      multiply_blocks<Sum::fresh>(scores_of(step) + block * kBlockElements,
                                  {keys + block * D_blocks_ * kBlockElements, kBlockElements},
                                  {query_panel(step.panel), kBlockElements}, D_blocks_, work, share);
  }

  void finish_scores(const Step& step) {
    const int64_t row = row_of(step.panel);
    const LaneBand band[] = {{g_, row, step.keys.begin}, {g_, row + Vec::kLanes, step.keys.begin}};
    finish_products(scores_of(step), step.keys.count(), scale_,
                    {step.banded ? band : nullptr, step.mask});
  }

  // P^T of the current step; meanwhile S^T of the next one and V^T P^T of the previous one.
  template <bool kHides>
  __attribute__((noinline)) void advance(const Step& current, float factor, const Step& previous, const Step& next) {
    LazySoftmax& softmax = softmax_[current.panel];
    Exponentiation<kHides> work(scores_of(current), weights_of(current), current.keys.count(), factor, softmax.highest);
    const int64_t products = next.blocks() * D_blocks_ + previous.blocks() * Dv_blocks_;
    const int64_t share = products > 0 ? (work.units() + products - 1) / products : 0;
    if (next.exists()) compute_scores(next, work, share);
    if (previous.exists()) add_values(previous, work, share);
    work.step(work.units());
    work.add_sums(softmax.sum);
  }

  // O^T += V^T P^T
  template <class Work>
  __attribute__((always_inline)) void add_values(const Step& step, Work& work, int64_t share) {
    const bf16* values = packed_values_ + (step.keys.begin - segment_.begin) * Dv_blocks_ * kBlock;
    float* output = output_panel(step.panel);
    for (int64_t d = 0; d < Dv_blocks_; ++d)
      multiply_blocks<Sum::continued>(output + d * kBlockElements,
                                      {values + d * kBlockElements, Dv_blocks_ * kBlockElements},
                                      {weights_of(step), kBlockElements}, step.blocks(), work, share);
    bad_values_.add(output, weights_of(step), g_, p_.v, step.keys, p_.Dv);
  }

  void rescale_output(int64_t panel) {
    const float* keep = softmax_[panel].keep;
    const Vec keep0 = Vec::load(keep), keep1 = Vec::load(keep + Vec::kLanes);
    float* row = output_panel(panel);
    for (int64_t d = 0; d < Dv_blocks_ * kBlock; ++d, row += kWidth) {
      (Vec::load(row) * keep0).store(row);
      (Vec::load(row + Vec::kLanes) * keep1).store(row + Vec::kLanes);
    }
  }

  void store_panel(int64_t panel) {
    const LazySoftmax& softmax = softmax_[panel];
    float factor[kWidth];
    softmax.inverse(factor);
    store_lanes<bf16>(g_, p_.out, row_of(panel), output_panel(panel), p_.Dv, factor);
    for (int64_t row = row_of(panel); row <= last_row(panel); ++row) {
      const int64_t lane = row - row_of(panel);
      *g_.row<float>(p_.lse, row) = natural_lse(softmax.highest[lane], softmax.sum[lane]);
    }
  }

  const HeadGroup& g_;
  const AttentionParams& p_;
  const int64_t D_blocks_, Dv_blocks_, first_row_;
  const ScoreScale scale_;
  const bool plain_;  // scores are products times a positive factor
  int64_t panels_;
  bf16 *queries_, *packed_keys_, *packed_values_, *weights_;
  float *outputs_, *scores_, *mask_buffer_;
  KeyRange segment_, panel_keys_, keys_of_all_;
  int64_t next_panel_, next_key_;
  int slot_ = 0;
  BadColumns<kSegment> bad_values_;
  LazySoftmax softmax_[kItemRows / kWidth];
};

}  // namespace

void attention_forward(const AttentionParams& p) {
  const int threads = threads_for(estimated_work(p), 1 << 20);
  const int64_t in_l2 = kItemBytes / (kWidth * kBlock * (blocks_of(p.D) * 2 + blocks_of(p.Dv) * 4));
  const int64_t most = in_l2 < kItemRows / kWidth ? in_l2 : kItemRows / kWidth;
  const int64_t panels = panels_an_item(p, kWidth, most, threads), item_rows = panels * kWidth;
  const ItemList items(p, workspace<int64_t>(Slot::reduction, p.B + 1), [&](int64_t s) {
    return (HeadGroup(p, s, 0).rows + item_rows - 1) / item_rows;
  });
  for_each_item(items.count(), threads, [&](int64_t index) {
    const BlockState state;
    (void)state;
    const Item item = items[index];
    const HeadGroup group(p, item.sequence, item.kv_head);
    // The last rows of a causal group see the most keys: they go first.
    ForwardItem(group, (item.chunks - 1 - item.chunk) * item_rows, panels).run();
  });
}

}  // namespace llmfast::LLMFAST_TARGET
