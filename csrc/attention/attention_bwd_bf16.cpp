// Masked attention, backward, in bf16 blocks, for AMX and AVX512_BF16; see attention.h for the formula.
//
// A thread owns an item: a part of one head group's query rows, in chunks of whole blocks of kRows rows, against all
// the group's keys. Chunks are dealt out back and forth, so that the parts of a causal group weigh the same.
//   for each chunk: pack Q and grad_out, both as columns (Q^T) and as rows, in panels of kWidth rows; delta
//     for each tile of kKeys keys that some row sees:
//       pack K and V as rows and K as columns
//       for each block of rows:
//         for each square of kBlock keys x one panel:
//           S^T = K Q^T, dP^T = V grad_out^T                                     [keys][lanes]
//           P^T = 2^(S^T - lse), dS^T = P^T * (dP^T - delta)                      hidden entries are 0; rounded to bf16
//         grad_v[keys][Dv] += P^T grad_out,  grad_k[keys][D] += dS^T Q           summed over the group's heads, too
//         grad_q^T[D][lanes] += K^T dS^T
//     grad_q of the chunk: scaled, transposed back, stored
//   grad_k and grad_v: scaled and stored by the item, or, if the group has several, added up part by part afterwards
// The squares of a tile run as a pipeline: while one's P^T and dS^T are computed, which is vector work, AMX's tile unit
// does S^T and dP^T of the next square and a share of the sums of the previous block. The order of all sums depends on
// the number of threads alone.
//
// Memory: a tile's operands and sums and two blocks' P^T and dS^T stay in L1 or close; a chunk's operands and its
// grad_q (12 bytes a row and dim) in L2; an item sums Tk x (D + Dv) floats.
// Limits: bf16; head dims up to 256 (kMostBlockHeadDim), padded to multiples of 32 with zeros.
#include "attention/differentiation_bf16.h"
#include "attention/key_gradients.h"
#include "core/workspace.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kChunkRows = 512;
constexpr int64_t kChunkBytes = 768 << 10;
static_assert(kChunkRows % kRows == 0);

// Sums of grad_k (unscaled) and grad_v of one head group, blocks [key block][d block][key][d].
struct KeyGradients {
  float *k, *v;

  KeyGradients(float* storage, int64_t Tk, int64_t D)
      : k(storage), v(storage + blocks_of(Tk) * blocks_of(D) * kBlockElements) {}
  static int64_t elements(int64_t Tk, int64_t D, int64_t Dv) {
    return blocks_of(Tk) * (blocks_of(D) + blocks_of(Dv)) * kBlockElements;
  }
};

// The sums of a block, which wait to be done between the vector work of the next block.
class PendingSums {
 public:
  void add(float* sum, Blocks a, Blocks b, int64_t depth) { products_[count_++] = {sum, a, b, depth}; }

  // How many to do now so that `turns` times as many are all there were.
  int64_t share(int64_t turns) const { return (count_ + turns - 1) / turns; }

  template <class Work>
  __attribute__((always_inline)) void run(int64_t count, Work& work, int64_t share) {
    for (; count > 0 && next_ < count_; --count, ++next_) {
      const Product& product = products_[next_];
      multiply_blocks<Sum::continued>(product.sum, product.a, product.b, product.depth, work, share);
    }
  }
  void finish() {
    NoWork none;
    run(count_, none, 0);
    next_ = count_ = 0;
  }

 private:
  struct Product {
    float* sum;
    Blocks a, b;
    int64_t depth;
  };
  int64_t next_ = 0, count_ = 0;
  Product products_[(2 * kKeyBlocks + kPanels) * blocks_of(kMostBlockHeadDim)];
};

struct Square {
  int64_t panel = -1, key_block = 0;  // panel of the chunk, block of the tile
  bool banded = false;
  const float* mask = nullptr;  // MaskTile::bias
  int slot = 0;  // of the two buffers of products and of mask values

  bool exists() const { return panel >= 0; }
  int64_t block() const { return panel / kPanels; }
};

class BackwardItem {
 public:
  BackwardItem(const HeadGroup& group, const AttentionBackwardParams& params, KeyGradients sums, int64_t chunk_rows)
      : g_(group),
        p_(params),
        D_blocks_(blocks_of(p_.D)),
        Dv_blocks_(blocks_of(p_.Dv)),
        chunk_rows_(chunk_rows),
        scale_(p_),
        sums_(sums) {
    const int64_t chunk = chunk_rows / kBlock * kBlockElements;
    bf16* operands = workspace<bf16>(Slot::attention_q, (2 * chunk + kBlockElements) * (D_blocks_ + Dv_blocks_));
    q_columns_ = operands;
    q_rows_ = q_columns_ + chunk * D_blocks_;
    grad_columns_ = q_rows_ + chunk * D_blocks_;
    grad_rows_ = grad_columns_ + chunk * Dv_blocks_;
    panel_copy_ = grad_rows_ + chunk * Dv_blocks_;
    grad_q_ = workspace<float>(Slot::tile, chunk * D_blocks_);
    k_rows_ = workspace<bf16>(Slot::attention_k, 2 * kKeys * kBlock * D_blocks_);
    k_columns_ = k_rows_ + kKeys * kBlock * D_blocks_;
    v_rows_ = workspace<bf16>(Slot::attention_v, kKeys * kBlock * Dv_blocks_);
    float* squares = workspace<float>(Slot::attention_score, 6 * kBlockElements + Weights::kElements);
    scores_ = squares;
    grads_ = scores_ + 2 * kBlockElements;
    mask_buffers_ = grads_ + 2 * kBlockElements;
    bf16* weights = reinterpret_cast<bf16*>(mask_buffers_ + 2 * kBlockElements);
    weights_ = Weights(weights);
    previous_weights_ = Weights(weights + Weights::kElements);
  }

  void run(int64_t part, int64_t parts) {
    for (int64_t i = 0; i < KeyGradients::elements(g_.Tk, p_.D, p_.Dv); ++i) sums_.k[i] = 0.0f;
    for (int64_t turn = 0; turn * parts * chunk_rows_ < g_.rows; ++turn) {
      const int64_t chunk = turn * parts + (turn % 2 ? parts - 1 - part : part);
      if (chunk * chunk_rows_ < g_.rows) visit_chunk(chunk * chunk_rows_);
    }
  }

 private:
  int64_t row_of(int64_t panel) const { return first_row_ + panel * kWidth; }
  int64_t last_row(int64_t panel) const { return (row_of(panel + 1) < g_.rows ? row_of(panel + 1) : g_.rows) - 1; }
  float* scores_of(const Square& square) const { return scores_ + square.slot * kBlockElements; }
  float* grads_of(const Square& square) const { return grads_ + square.slot * kBlockElements; }
  float* mask_buffer_of(const Square& square) const { return mask_buffers_ + square.slot * kBlockElements; }
  int64_t first_key_of(const Square& square) const { return tile_.begin + square.key_block * kBlock; }

  void visit_chunk(int64_t first_row) {
    first_row_ = first_row;
    const int64_t rows = g_.rows - first_row < chunk_rows_ ? g_.rows - first_row : chunk_rows_;
    panels_ = (rows + kWidth - 1) / kWidth;
    for (int64_t i = 0; i < panels_; ++i) load_panel(i);
    for (int64_t i = 0; i < panels_ * D_blocks_ * kBlockElements; ++i) grad_q_[i] = 0.0f;
    const KeyRange seen = g_.keys_of_any(first_row_, last_row(panels_ - 1));
    for (int64_t key = seen.begin / kKeys * kKeys; key < seen.end; key += kKeys) {
      const KeyRange whole = whole_blocks(seen);
      visit_tile({key, key + kKeys < whole.end ? key + kKeys : whole.end});
    }
    float factor[kWidth];
    for (float& f : factor) f = p_.scale;
    for (int64_t i = 0; i < panels_; ++i)
      store_lanes<bf16>(g_, p_.grad_q, row_of(i), grad_q_ + i * D_blocks_ * kBlockElements, p_.D, factor);
  }

  // Rows that saw nothing, or nothing above kNoGradient, take part as zeros.
  void load_panel(int64_t panel) {
    bool absent[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t row = row_of(panel) + i, at = panel * kWidth + i;
      const float lse = row < g_.rows ? *g_.row<const float>(p_.lse, row) : -kInfinity;
      absent[i] = lse < kNoGradient;
      lse_[at] = absent[i] ? 0.0f : lse * kLog2E;
      delta_[at] = absent[i] ? 0.0f : dot(g_.row<const bf16>(p_.out, row), g_.row<const bf16>(p_.grad_out, row));
    }
    const auto pack = [&](const HeadTensor& t, int64_t D, bf16* columns, bf16* rows) {
      const int64_t blocks = blocks_of(D);
      copy_panel(panel_copy_, g_, t, row_of(panel), D, [&](int64_t row) { return absent[row - row_of(panel)]; });
      for (int64_t d = 0; d < blocks; ++d) {
        const int64_t block = (panel * blocks + d) * kBlockElements;
        b_block_from_columns(columns + block, panel_copy_ + d * kBlock, blocks * kBlock, kBlock, kBlock);
        b_block_from_rows(rows + block, panel_copy_ + d * kBlock, blocks * kBlock, kBlock, kBlock);
      }
    };
    pack(p_.q, p_.D, q_columns_, q_rows_);
    pack(p_.grad_out, p_.Dv, grad_columns_, grad_rows_);
  }

  float dot(const bf16* a, const bf16* b) const {
    Vec sum = Vec::zero();
    for_each_vec(p_.Dv, [&](int64_t d, auto lanes) { sum = fma(lanes.load(a + d), lanes.load(b + d), sum); });
    return reduce_add(sum);
  }

  // tile: whole blocks.
  void visit_tile(KeyRange tile) {
    tile_ = tile;
    next_panel_ = next_key_block_ = 0;
    Square current = next_square();
    if (!current.exists()) return;
    pack_key_rows(k_rows_, g_, p_.k, tile_, p_.D);
    pack_key_rows(v_rows_, g_, p_.v, tile_, p_.Dv);
    pack_key_columns(k_columns_, g_, p_.k, tile_, p_.D);
    bad_keys_.find_and_clear(k_columns_, g_, p_.k, tile_, p_.D);

    NoWork none;
    compute_products(current, none, 0);
    while (current.exists()) {
      const Square next = next_square();
      if (current.banded || current.mask || scale_.of_tanh != 0.0f) advance<false>(current, next);
      else advance<true>(current, next);
      if (!next.exists() || next.block() != current.block()) finish_block(current.block());
      current = next;
    }
    pending_.finish();
  }

  // The next square in which something is visible, block by block.
  Square next_square() {
    const int64_t key_blocks = tile_.count() / kBlock;
    for (; next_panel_ < panels_; ++next_panel_, next_key_block_ = 0) {
      const int64_t first = row_of(next_panel_), last = last_row(next_panel_);
      const KeyRange seen = g_.keys_of_any(first, last);
      while (next_key_block_ < key_blocks) {
        Square square;
        square.panel = next_panel_;
        square.key_block = next_key_block_++;
        const int64_t key = first_key_of(square);
        const KeyRange keys = {key, key + kBlock};
        if (intersect(keys, seen).empty()) continue;
        square.slot = slot_ ^ 1;
        const MaskTile mask = load_mask_tile(mask_buffer_of(square), g_, first, intersect(keys, {0, g_.Tk}), kBlock);
        if (mask.keys.empty()) continue;
        square.mask = mask.bias;
        square.banded = !contains(g_.keys_of_all(first, last), keys);
        slot_ = square.slot;
        return square;
      }
    }
    return {};
  }

  // S^T and dP^T, unscaled.
  template <class Work>
  __attribute__((always_inline)) void compute_products(const Square& square, Work& work, int64_t share) {
    const auto multiply = [&](float* c, const bf16* key_rows, const bf16* columns, int64_t blocks)
                              __attribute__((always_inline)) {
      const int64_t block_row = blocks * kBlockElements;
      multiply_blocks<Sum::fresh>(c, {key_rows + square.key_block * block_row, kBlockElements},
                                  {columns + square.panel * block_row, kBlockElements}, blocks, work, share);
    };
    multiply(scores_of(square), k_rows_, q_columns_, D_blocks_);
    multiply(grads_of(square), v_rows_, grad_columns_, Dv_blocks_);
  }

  // P^T and dS^T of the current square; meanwhile the products of the next one and sums of the previous block.
  template <bool kPlain>
  __attribute__((noinline)) void advance(const Square& current, const Square& next) {
    const int64_t row = row_of(current.panel), at = current.panel * kWidth;
    const LaneBand band[] = {{g_, row, first_key_of(current)}, {g_, row + Vec::kLanes, first_key_of(current)}};
    const Hiding hiding = {current.banded ? band : nullptr, current.mask};
    using Work = Differentiation<kPlain>;
    Work work(scores_of(current), grads_of(current), weights_.at(current.key_block, current.panel % kPanels), lse_ + at,
              delta_ + at, scale_, hiding);
    const int64_t sums = pending_.share(kKeyBlocks * kPanels);
    const int64_t products = (next.exists() ? D_blocks_ + Dv_blocks_ : 0) + kPanels * sums;
    const int64_t share = products > 0 ? (Work::kUnits + products - 1) / products : 0;
    if (next.exists()) compute_products(next, work, share);
    pending_.run(sums, work, share);
    work.step(Work::kUnits);
    filled_[current.key_block][current.panel % kPanels] = true;
  }

  // Leaves the block's sums pending; what the block before left must be done by now.
  void finish_block(int64_t block) {
    pending_.finish();
    for (int64_t key_block = 0; key_block < kKeyBlocks; ++key_block)
      for (int64_t panel = 0; panel < kPanels; ++panel) {
        if (!filled_[key_block][panel]) weights_.at(key_block, panel).clear();
        filled_[key_block][panel] = false;
      }
    const int64_t first = block * kPanels, panels = panels_ - first < kPanels ? panels_ - first : kPanels;
    sum_over_rows(sums_.v, weights_.p, grad_rows_, Dv_blocks_, first, panels);
    sum_over_rows(sums_.k, weights_.ds, q_rows_, D_blocks_, first, panels);
    for (int64_t panel = 0; panel < panels; ++panel)
      sum_over_keys(first + panel, weights_.ds_pairs + Weights::pairs_offset(0, panel));
    const Weights free = previous_weights_;
    previous_weights_ = weights_;
    weights_ = free;
  }

  // grad_v += P^T grad_out, grad_k += dS^T Q
  void sum_over_rows(float* sums, const bf16* weights, const bf16* rows, int64_t blocks, int64_t first_panel,
                     int64_t panels) {
    for (int64_t key_block = 0; key_block < tile_.count() / kBlock; ++key_block)
      for (int64_t d = 0; d < blocks; ++d)
        pending_.add(sums + ((tile_.begin / kBlock + key_block) * blocks + d) * kBlockElements,
                     {weights + Weights::offset(key_block, 0), kBlockElements},
                     {rows + (first_panel * blocks + d) * kBlockElements, blocks * kBlockElements}, panels);
  }

  // grad_q^T += K^T dS^T
  void sum_over_keys(int64_t panel, const bf16* weights) {
    float* sums = grad_q_ + panel * D_blocks_ * kBlockElements;
    for (int64_t d = 0; d < D_blocks_; ++d)
      pending_.add(sums + d * kBlockElements, {k_columns_ + d * kBlockElements, D_blocks_ * kBlockElements},
                   {weights, kBlockElements}, tile_.count() / kBlock);
    bad_keys_.add(sums, weights, g_, p_.k, tile_, p_.D);
  }

  const HeadGroup& g_;
  const AttentionBackwardParams& p_;
  const int64_t D_blocks_, Dv_blocks_, chunk_rows_;
  const ScoreScale scale_;
  const KeyGradients sums_;
  bf16 *q_columns_, *q_rows_, *grad_columns_, *grad_rows_, *panel_copy_, *k_rows_, *k_columns_, *v_rows_;
  float *grad_q_, *scores_, *grads_, *mask_buffers_;
  float lse_[kChunkRows], delta_[kChunkRows];  // lse in the log2 domain
  Weights weights_, previous_weights_;         // of the block at hand, and of the one whose sums are pending
  bool filled_[kKeyBlocks][kPanels] = {};      // squares of the block at hand; others count as zeros
  PendingSums pending_;
  int64_t first_row_, panels_;
  KeyRange tile_;
  int64_t next_panel_, next_key_block_;
  int slot_ = 0;
  BadColumns<kKeys> bad_keys_;
};

// grad_k and grad_v of some whole blocks of keys: the sum of `parts` KeyGradients that lie one after another.
void store_key_gradients(const HeadGroup& g, const AttentionBackwardParams& p, const float* storage, int64_t parts,
                         KeyRange keys) {
  const int64_t elements = KeyGradients::elements(g.Tk, p.D, p.Dv);
  const auto store = [&](const float* sums, const HeadTensor& t, int64_t D, float scale) {
    for (int64_t key = keys.begin; key < keys.end && key < g.Tk; ++key) {
      bf16* out = g.key_row<bf16>(t, key);
      for_each_vec(D, [&](int64_t d, auto lanes) {
        const float* block = sums + (key / kBlock * blocks_of(D) + d / kBlock) * kBlockElements;
        const float* at = block + key % kBlock * kBlock + d % kBlock;
        Vec sum = Vec::load(at);
        for (int64_t i = 1; i < parts; ++i) sum = sum + Vec::load(at + i * elements);
        lanes.store(sum * Vec::set(scale), out + d);
      });
    }
  };
  store(storage, p.grad_k, p.D, p.scale);
  store(storage + blocks_of(g.Tk) * blocks_of(p.D) * kBlockElements, p.grad_v, p.Dv, 1.0f);
}

// Rows of a chunk: as many as L2 likes, but at least two chunks for each of the parts, so that these can be balanced.
int64_t rows_of_chunk(const AttentionParams& p, int64_t rows, int64_t parts) {
  int64_t chunk = kChunkBytes / (kBlock * (8 * blocks_of(p.D) + 4 * blocks_of(p.Dv))) / kRows * kRows;
  if (chunk > kChunkRows) chunk = kChunkRows;
  const int64_t share = parts > 1 ? rounded_up((rows + 2 * parts - 1) / (2 * parts), kRows) : chunk;
  return share < chunk ? share : chunk;
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
  differentiate_groups<KeyGradients>(
      p, 1 << 19, kRows, kKeys,
      [&](const HeadGroup& g, float* sums, const Item& item) {
        const BlockState state;
        (void)state;
        const int64_t chunk_rows = rows_of_chunk(p, g.rows, item.chunks);
        BackwardItem(g, p, KeyGradients(sums, g.Tk, p.D), chunk_rows).run(item.chunk, item.chunks);
      },
      [&](const HeadGroup& g, float* sums, int64_t parts, KeyRange keys) {
        store_key_gradients(g, p, sums, parts, keys);
      });
}

}  // namespace llmfast::LLMFAST_TARGET
