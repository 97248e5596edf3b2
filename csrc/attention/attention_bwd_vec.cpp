// Masked attention, backward, on vector registers; see attention.h for the formula.
//
// A thread owns an item: every n-th block of kRows query rows of one head group (n parts, so that causal ones weigh the
// same), against all the group's keys.
//   for each block: Q and grad_out as rows and, transposed, as panels with one row a lane; delta
//     for each tile of kKeys keys that some row sees:
//       for each panel:  S^T = K Q^T, dP^T = V grad_out^T                        [keys][lanes]
//                        P^T = 2^(S^T - lse), dS^T = P^T * (dP^T - delta)         hidden entries are 0
//                        grad_q^T[D][lanes] += K^T dS^T
//       grad_v[keys][Dv] += P^T grad_out,  grad_k[keys][D] += dS^T Q              summed over the group's heads, too
//     grad_q is done: scaled, transposed back, stored
//   grad_k and grad_v: scaled and stored by the item, or, if the group has several, added up part by part afterwards.
// The order of all sums depends on the number of threads alone.
//
// Memory: a block's operands and P^T, dS^T (kKeys x kRows) stay in L2; an item sums Tk x (D + Dv) floats.
#include "attention/key_gradients.h"
#include "attention/operands.h"
#include "attention/softmax.h"
#include "core/workspace.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kKeys = 64;
constexpr int64_t kRows = 64;
constexpr int64_t kPanels = kRows / kWidth;
static_assert(kRows % kWidth == 0 && kKeys <= kMostMaskKeys);

// Sums of grad_k (unscaled) and grad_v of one head group: rows padded to kWidth.
struct KeyGradients {
  float *k, *v;
  int64_t k_stride, v_stride;

  KeyGradients(float* storage, int64_t Tk, int64_t D, int64_t Dv)
      : k(storage),
        v(storage + Tk * rounded_up(D, kWidth)),
        k_stride(rounded_up(D, kWidth)),
        v_stride(rounded_up(Dv, kWidth)) {}
  static int64_t elements(int64_t Tk, int64_t D, int64_t Dv) {
    return Tk * (rounded_up(D, kWidth) + rounded_up(Dv, kWidth));
  }
};

class BackwardItem {
 public:
  BackwardItem(const HeadGroup& group, const AttentionBackwardParams& params, KeyGradients sums)
      : g_(group), p_(params), D_(p_.D), Dv_(p_.Dv), scale_(p_), sums_(sums) {
    float* space = workspace<float>(Slot::attention_q, kRows * (2 * D_ + Dv_ + sums_.k_stride + sums_.v_stride));
    const auto take = [&](int64_t elements) {
      float* taken = space;
      space += elements;
      return taken;
    };
    query_rows_ = take(kRows * sums_.k_stride);
    grad_rows_ = take(kRows * sums_.v_stride);
    query_panels_ = take(kRows * D_);
    grad_panels_ = take(kRows * Dv_);
    grad_query_panels_ = take(kRows * D_);
    weights_ = workspace<float>(Slot::attention_score, kKeys * (2 * kRows + kWidth));
    score_gradients_ = weights_ + kKeys * kRows;
    mask_buffer_ = score_gradients_ + kKeys * kRows;
    key_buffer_ = workspace<float>(Slot::attention_k, 2 * kKeys * rounded_up(D_, Vec::kLanes));
    clean_keys_ = key_buffer_ + kKeys * rounded_up(D_, Vec::kLanes);
    value_buffer_ = workspace<float>(Slot::attention_v, kKeys * rounded_up(Dv_, Vec::kLanes));
    for (int lane = 0; lane < kWidth; ++lane) ones_[lane] = 1.0f;
  }

  void run(int64_t part, int64_t parts) {
    for (int64_t i = 0; i < KeyGradients::elements(g_.Tk, D_, Dv_); ++i) sums_.k[i] = 0.0f;
    for (int64_t row = part * kRows; row < g_.rows; row += parts * kRows) visit_block(row);
  }

 private:
  int64_t row_of(int64_t panel) const { return first_row_ + panel * kWidth; }
  int64_t last_row(int64_t panel) const { return (row_of(panel + 1) < g_.rows ? row_of(panel + 1) : g_.rows) - 1; }

  void visit_block(int64_t first_row) {
    first_row_ = first_row;
    panels_ = (g_.rows - first_row + kWidth - 1) / kWidth;
    if (panels_ > kPanels) panels_ = kPanels;
    visit_float(p_.q.dtype, [&](auto type) { load_block<decltype(type)>(); });
    for (int64_t i = 0; i < panels_; ++i) fresh_[i] = true;
    const KeyRange seen = g_.keys_of_any(first_row_, last_row(panels_ - 1));
    for (int64_t key = seen.begin / kKeys * kKeys; key < seen.end; key += kKeys)
      visit_tile(intersect({key, key + kKeys}, seen));
    visit_float(p_.q.dtype, [&](auto type) { store_grad_q<decltype(type)>(); });
  }

  // Rows that saw nothing, or nothing above kNoGradient, take part as zeros.
  template <class T>
  void load_block() {
    bool absent[kRows];
    for (int64_t i = 0; i < panels_ * kWidth; ++i) {
      const int64_t row = first_row_ + i;
      const float lse = row < g_.rows ? *g_.row<const float>(p_.lse, row) : -kInfinity;
      absent[i] = lse < kNoGradient;
      lse_[i] = absent[i] ? 0.0f : lse * kLog2E;
      delta_[i] = absent[i] ? 0.0f : dot(g_.row<const T>(p_.out, row), g_.row<const T>(p_.grad_out, row));
    }
    const auto is_absent = [&](int64_t i) { return absent[i]; };
    load_rows<T>(query_rows_, sums_.k_stride, g_, p_.q, first_row_, panels_ * kWidth, D_, is_absent);
    load_rows<T>(grad_rows_, sums_.v_stride, g_, p_.grad_out, first_row_, panels_ * kWidth, Dv_, is_absent);
    for (int64_t i = 0; i < panels_; ++i) {
      transpose_rows(query_panels_ + i * kWidth * D_, query_rows_ + i * kWidth * sums_.k_stride, sums_.k_stride, D_,
                     scale_.of_q);
      transpose_rows(grad_panels_ + i * kWidth * Dv_, grad_rows_ + i * kWidth * sums_.v_stride, sums_.v_stride, Dv_,
                     1.0f);
    }
  }

  template <class T>
  float dot(const T* a, const T* b) const {
    Vec sum = Vec::zero();
    for_each_vec(Dv_, [&](int64_t d, auto lanes) { sum = fma(lanes.load(a + d), lanes.load(b + d), sum); });
    return reduce_add(sum);
  }

  void visit_tile(KeyRange tile) {
    tile_ = tile;
    loaded_ = checked_ = false;
    bool visited[kPanels] = {};
    for (int64_t i = 0; i < panels_; ++i) {
      const KeyRange keys = intersect(tile, g_.keys_of_any(row_of(i), last_row(i)));
      visited[i] = !keys.empty() && visit_panel(i, keys);
    }
    if (!loaded_) return;
    for (int64_t i = 0; i < panels_; ++i)
      if (!visited[i]) clear_weights(i, {tile.begin, tile.end});
    add_key_gradients(weights_, grad_rows_, sums_.v, sums_.v_stride, Dv_);
    add_key_gradients(score_gradients_, query_rows_, sums_.k, sums_.k_stride, D_);
  }

  // false: nothing in it is visible.
  bool visit_panel(int64_t panel, KeyRange in_band) {
    const MaskTile mask = load_mask_tile(mask_buffer_, g_, row_of(panel), in_band);
    const KeyRange keys = mask.keys;
    if (keys.empty()) return false;
    const bool banded = !contains(g_.keys_of_all(row_of(panel), last_row(panel)), keys);
    if (!loaded_) load_tile();

    float* weights = weights_at(weights_, panel, keys.begin);
    float* gradients = weights_at(score_gradients_, panel, keys.begin);
    product_by_rows(keys_tile_.from(keys.begin - tile_.begin).data, keys_tile_.stride,
                    {query_panels_ + panel * kWidth * D_, kWidth}, keys.count(), D_, {weights, kRows});
    product_by_rows(values_tile_.from(keys.begin - tile_.begin).data, values_tile_.stride,
                    {grad_panels_ + panel * kWidth * Dv_, kWidth}, keys.count(), Dv_, {gradients, kRows});
    clear_weights(panel, {tile_.begin, keys.begin});
    clear_weights(panel, {keys.end, tile_.end});
    if (banded) {
      const LaneBand band[] = {{g_, row_of(panel), keys.begin}, {g_, row_of(panel) + Vec::kLanes, keys.begin}};
      differentiate(panel, keys, {band, mask.bias});
    } else {
      differentiate(panel, keys, {nullptr, mask.bias});
    }
    return true;
  }

  void differentiate(int64_t panel, KeyRange keys, const Hiding& hiding) {
    float* weights = weights_at(weights_, panel, keys.begin);
    float* gradients = weights_at(score_gradients_, panel, keys.begin);
    const float *lse = lse_ + panel * kWidth, *delta = delta_ + panel * kWidth;
    const bool plain = !hiding.any() && scale_.of_tanh == 0.0f;
    if (plain) score_gradients<true>(weights, gradients, keys.count(), lse, delta, hiding);
    else score_gradients<false>(weights, gradients, keys.count(), lse, delta, hiding);

    RowTile operand = keys_tile_;
    if (hiding.any()) {
      if (!checked_) bad_keys_.find(keys_tile_, tile_.count(), D_, clean_keys_);
      checked_ = true;
      operand = bad_keys_.clean;
    }
    float* grad_query = grad_query_panels_ + panel * kWidth * D_;
    product_by_depth(operand.from(keys.begin - tile_.begin).data, operand.stride, {gradients, kRows}, D_, keys.count(),
                     {grad_query, kWidth}, fresh_[panel] ? nullptr : ones_);
    fresh_[panel] = false;
    if (hiding.any() && bad_keys_.count > 0)
      bad_keys_.add(keys_tile_, {keys.begin - tile_.begin, keys.end - tile_.begin}, gradients, kRows, D_, grad_query);
  }

  // In place: scores -> weights P, dP -> dS.
  template <bool kPlain>
  void score_gradients(float* weights, float* gradients, int64_t keys, const float* lse, const float* delta,
                       const Hiding& hiding) const {
    const Vec zero = Vec::zero(), one = Vec::set(1.0f), hidden = Vec::set(-kInfinity);
    const Vec of_tanh = Vec::set(scale_.of_tanh);
    const bool capped = !kPlain && scale_.of_tanh != 0.0f;
    const float* mask_tile = kPlain ? nullptr : hiding.mask_tile;
    const LaneBand* band = kPlain ? nullptr : hiding.band;
    for (int v = 0; v < kWidthVecs; ++v) {
      const Vec log_sum = Vec::load(lse + v * Vec::kLanes), mean = Vec::load(delta + v * Vec::kLanes);
      for (int64_t j = 0; j < keys; ++j) {
        float* weight = weights + j * kRows + v * Vec::kLanes;
        float* gradient = gradients + j * kRows + v * Vec::kLanes;
        Vec s = Vec::load(weight), bias = zero, slope = one;
        if (capped) {
          const Vec t = tanh_of(s);
          s = t * of_tanh;
          slope = fnma(t, t, one);
        }
        if (mask_tile) bias = Vec::load(mask_tile + j * kWidth + v * Vec::kLanes);
        Vec p = exp2_of_gap(mask_tile ? s + bias - log_sum : s - log_sum);
        Vec ds = p * (Vec::load(gradient) - mean);
        if (capped) ds = ds * slope;
        if (mask_tile) {
          p = select(eq(bias, hidden), zero, p);
          ds = select(eq(bias, hidden), zero, ds);
        }
        if (band) {
          p = select(band[v].sees(j), p, zero);
          ds = select(band[v].sees(j), ds, zero);
        }
        p.store(weight);
        ds.store(gradient);
      }
    }
  }

  float* weights_at(float* tile, int64_t panel, int64_t key) const {
    return tile + (key - tile_.begin) * kRows + panel * kWidth;
  }

  void clear_weights(int64_t panel, KeyRange keys) {
    for (int64_t key = keys.begin; key < keys.end; ++key)
      for (int v = 0; v < kWidth; v += Vec::kLanes) {
        Vec::zero().store(weights_at(weights_, panel, key) + v);
        Vec::zero().store(weights_at(score_gradients_, panel, key) + v);
      }
  }

  // sums[tile's keys][..] += factors[keys][rows] * rows[rows][..]
  void add_key_gradients(const float* factors, float* rows, float* sums, int64_t stride, int64_t D) {
    for (int64_t d = 0; d < D; d += kWidth)
      product_by_rows(factors, kRows, {rows + d, stride}, tile_.count(), panels_ * kWidth,
                      {sums + tile_.begin * stride + d, stride}, ones_);
  }

  void load_tile() {
    keys_tile_ = load_keys(g_, p_.k, tile_, D_, key_buffer_);
    values_tile_ = load_keys(g_, p_.v, tile_, Dv_, value_buffer_);
    loaded_ = true;
  }

  template <class T>
  void store_grad_q() {
    float factor[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) factor[lane] = p_.scale;
    for (int64_t i = 0; i < panels_; ++i) {
      float* panel = grad_query_panels_ + i * kWidth * D_;
      if (fresh_[i])
        for (int64_t d = 0; d < kWidth * D_; ++d) panel[d] = 0.0f;
      store_lanes<T>(g_, p_.grad_q, row_of(i), panel, D_, factor);
    }
  }

  const HeadGroup& g_;
  const AttentionBackwardParams& p_;
  const int64_t D_, Dv_;
  const ScoreScale scale_;
  const KeyGradients sums_;
  int64_t first_row_, panels_;
  float *query_rows_, *grad_rows_, *query_panels_, *grad_panels_, *grad_query_panels_;
  float *weights_, *score_gradients_, *mask_buffer_, *key_buffer_, *clean_keys_, *value_buffer_;
  float lse_[kRows], delta_[kRows], ones_[kWidth];
  KeyRange tile_;
  RowTile keys_tile_, values_tile_;
  bool loaded_, checked_, fresh_[kPanels];
  BadKeys<kKeys> bad_keys_;
};

// grad_k and grad_v of some keys: the sum of `parts` KeyGradients that lie one after another, added into the first.
template <class T>
void store_key_gradients(const HeadGroup& g, const AttentionBackwardParams& p, float* storage, int64_t parts,
                         KeyRange keys) {
  const int64_t elements = KeyGradients::elements(g.Tk, p.D, p.Dv);
  const auto store = [&](const float* sums, int64_t stride, const HeadTensor& t, int64_t D, float scale) {
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      T* out = g.key_row<T>(t, key);
      for_each_vec(D, [&](int64_t d, auto lanes) {
        Vec sum = Vec::load(sums + key * stride + d);
        for (int64_t i = 1; i < parts; ++i) sum = sum + Vec::load(sums + i * elements + key * stride + d);
        lanes.store(sum * Vec::set(scale), out + d);
      });
    }
  };
  const KeyGradients first(storage, g.Tk, p.D, p.Dv);
  store(first.k, first.k_stride, p.grad_k, p.D, p.scale);
  store(first.v, first.v_stride, p.grad_v, p.Dv, 1.0f);
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
  differentiate_groups<KeyGradients>(
      p, 1 << 17, kRows, kKeys,
      [&](const HeadGroup& g, float* sums, const Item& item) {
        BackwardItem(g, p, KeyGradients(sums, g.Tk, p.D, p.Dv)).run(item.chunk, item.chunks);
      },
      [&](const HeadGroup& g, float* sums, int64_t parts, KeyRange keys) {
        visit_float(p.q.dtype, [&](auto type) { store_key_gradients<decltype(type)>(g, p, sums, parts, keys); });
      });
}

}  // namespace llmfast::LLMFAST_TARGET
