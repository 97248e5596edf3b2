// The loops around the micro-kernel; the idea is told in gemm.h.
#include "gemm/few_deep.h"
#include "gemm/few_rows.h"
#include "gemm/few_rows_across.h"
#include "gemm/product.h"
#include "gemm/read_ahead.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

// How deep to pack at a time. A source that is contiguous across panels is packed a little of all panels after the other,
// so that its rows are read in sequence; measured 1.23x as fast for the product of a weight gradient.
inline int64_t packing_depth(int64_t across_stride, int64_t depth) {
  constexpr int64_t kFewRows = round_up(32, Kernel::kDepth);
  return across_stride == 1 && depth > kFewRows ? kFewRows : depth;
}

inline int64_t panel_width(int64_t cols) { return cols < Kernel::kCols ? cols : Kernel::kCols; }

// Packs column panels [first, last) of B[K,N]; panel j starts at dst + j * kCols * padded_depth(K).
inline void pack_b_panels(Kernel::Packed* dst, MatrixRef b, int64_t N, int64_t K, int64_t first, int64_t last) {
  const auto pack = [&](int64_t panel, int64_t k, int64_t depth) {
    const int64_t n = panel * Kernel::kCols, now = K - k < depth ? K - k : depth;
    Kernel::pack_b(dst + n * padded_depth(K) + k * Kernel::kCols, b.offset(k, n), panel_width(N - n), now);
  };
  const int64_t step = packing_depth(b.col_stride, K);
  if (step < K) {
    for (int64_t k = 0; k < K; k += step)
      for (int64_t panel = first; panel < last; ++panel) pack(panel, k, step);
    return;
  }
  constexpr int64_t kDepth = round_up(128, Kernel::kDepth);
  for (int64_t panel = first; panel < last; ++panel) {
    ReadAhead ahead;
    const int64_t n = (panel + 1) * Kernel::kCols;
    if (panel + 1 < last && b.row_stride == 1) ahead = ReadAhead(b.offset(0, n), panel_width(N - n), K);
    const int64_t share = ahead.left() * kDepth / K + 1;
    for (int64_t k = 0; k < K; k += kDepth) {
      ahead.step(share);
      pack(panel, k, kDepth);
    }
  }
}

// Packs A[rows,depth] into row panels that lie one after the other.
inline void pack_a_panels(Kernel::Packed* dst, MatrixRef a, int64_t rows, int64_t depth) {
  const int64_t step = packing_depth(a.row_stride, depth);
  for (int64_t k = 0; k < depth; k += step)
    for (int64_t m = 0; m < rows; m += Kernel::kRows)
      Kernel::pack_a(dst + m * padded_depth(depth) + k * Kernel::kRows, a.offset(m, k),
                     rows - m < Kernel::kRows ? rows - m : Kernel::kRows, depth - k < step ? depth - k : step);
}

// A finished tile whose epilogue is still to run, and lines to read ahead: the kernel of the next tile does both between its
// own steps.
class PendingTile {
 public:
  struct Tile {
    const EpilogueRef* epilogue;
    const float* values;
    int64_t m, n, cols, rows;
  };
  ReadAhead ahead;
  int64_t lines_a_step = 0;

  void take(Tile tile) { tile_ = tile, next_ = 0; }
  int64_t left() const { return tile_.rows - next_; }
  // The next `rows` rows, or what is left, and a step's lines.
  void step(int64_t rows) {
    ahead.step(lines_a_step);
    run(rows < left() ? rows : left());
  }
  void finish() { run(left()); }

 private:
  void run(int64_t rows) {
    if (rows <= 0) return;
    (*tile_.epilogue)(tile_.values + next_ * Kernel::kCols, tile_.m + next_, tile_.n, rows, tile_.cols);
    next_ += rows;
  }

  Tile tile_ = {};
  int64_t next_ = 0;
};

struct Blocking {
  int64_t rows;        // mc: rows of A packed at a time
  int64_t depth;       // kb: depth of A packed at a time; less than K only where K is large
  int64_t sub_depth;   // kc
};

constexpr int64_t kMinRowsOfBlock = 8 * Kernel::kRows;
constexpr int64_t kBlockElementsOfA = Kernel::kBlockBytes / static_cast<int64_t>(sizeof(Kernel::Packed));

inline int64_t even_split(int64_t total, int64_t most, int64_t multiple) {
  const int64_t parts = (total + most - 1) / most;
  return round_up((total + parts - 1) / parts, multiple);
}

// Whether a product of little depth mostly writes a C beyond the caches: best row by row, as memory likes it. Measured (2-core
// Zen 3, float32): depth 1 to 20, C of 10 to 50 MB, 1.3 to 2.3 times as fast as panels of columns.
inline bool mostly_writes(int64_t M, int64_t N, int64_t K) { return K <= 24 && M * N >= int64_t{1} << 19; }

inline Blocking choose_blocking(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kElements = kBlockElementsOfA;
  Blocking blocking;
  blocking.depth = even_split(padded_depth(K), round_up(kElements / kMinRowsOfBlock, Kernel::kDepth), Kernel::kDepth);
  blocking.sub_depth = even_split(blocking.depth, Kernel::kDepthInL1, Kernel::kDepth);
  const int64_t most_rows = kElements / blocking.depth / Kernel::kRows * Kernel::kRows;
  // With all of B in L2 small blocks cost nothing, and C is written a few rows at a time. Measured (2-core Zen 5, one thread, bf16,
  // a weight gradient of 3072 x 768): 1.38 times as fast with depth 16, 1.10 with 64, 1.02 with 128.
  const bool b_in_l2 = round_up(N, Kernel::kCols) * padded_depth(K) <= kElements;
  if (mostly_writes(M, N, K)) blocking.rows = Kernel::kRows;
  else blocking.rows = even_split(M, most_rows > kMinRowsOfBlock && !b_in_l2 ? most_rows : kMinRowsOfBlock, Kernel::kRows);
  return blocking;
}

// A in so few blocks of rows that each may pack the panels of B anew, one when it is needed: few rows, deep as they may be, in
// one block for each part of the depth; or more, in one block or two, in L2 or not far beyond it.
constexpr int64_t kMostElementsOfBlock = 2 * kBlockElementsOfA;
inline int64_t blocks_of_rows(int64_t M, int64_t K) {
  return (round_up(M, Kernel::kRows) * padded_depth(K) + kMostElementsOfBlock - 1) / kMostElementsOfBlock;
}
inline bool in_few_blocks(int64_t M, int64_t K) { return M < Kernel::kFewRowsOfBlock || blocks_of_rows(M, K) <= 2; }
inline Blocking blocking_of_few_blocks(int64_t M, int64_t K) {
  const int64_t blocks = blocks_of_rows(M, K);
  Blocking blocking;
  if (M < Kernel::kFewRowsOfBlock) {
    blocking.rows = round_up(M, Kernel::kRows);
    blocking.depth = even_split(padded_depth(K), kBlockElementsOfA / blocking.rows, Kernel::kDepth);
  } else {
    blocking.rows = even_split(M, (M + blocks - 1) / blocks, Kernel::kRows);
    blocking.depth = padded_depth(K);
  }
  blocking.sub_depth = even_split(blocking.depth, Kernel::kDepthInL1, Kernel::kDepth);
  return blocking;
}

// Panels of B: packed already, or packed into a buffer, as deep as a block, when they are asked for.
struct RightPanels {
  const Kernel::Packed* packed;
  MatrixRef b;  // if `buffer`
  Kernel::Packed* buffer;

  // The panel of columns n on, from depth k on: `depth` of it or, where B ends, less.
  const Kernel::Packed* at(int64_t n, int64_t cols, int64_t k, int64_t depth, int64_t K) const {
    if (!buffer) return packed + n * padded_depth(K) + k * Kernel::kCols;
    Kernel::pack_b(buffer, b.offset(k, n), cols, K - k < depth ? K - k : depth);
    return buffer;
  }
  // The panel after that at n, if it is still to be packed.
  ReadAhead after(int64_t n, int64_t end, int64_t k, int64_t depth, int64_t K) const {
    const int64_t next = n + Kernel::kCols;
    if (!buffer || next >= end) return ReadAhead();
    return ReadAhead(b.offset(k, next), panel_width(end - next), K - k < depth ? K - k : depth);
  }
};

void multiply_rectangle(MatrixRef a, const RightPanels& right, int64_t K, Range rows, Range cols,
                        const Blocking& blocking, EpilogueRef epilogue) {
  constexpr int64_t R = Kernel::kRows, N = Kernel::kCols, kTile = R * N;
  const bool whole_depth = blocking.depth >= K;
  const int64_t panels = blocking.rows / R;  // row panels per block
  const int64_t waiting = whole_depth ? 1 : (cols.end - cols.begin + N - 1) / N;  // column panels that wait for more depth
  auto* packed_a = workspace<Kernel::Packed>(Slot::packed_a, panels * R * round_up(blocking.depth, Kernel::kDepth) + 64);
  float* tiles = workspace<float>(Slot::tile, (panels * waiting + 2) * kTile);
  float* scratch[2] = {tiles, tiles + kTile};
  tiles += 2 * kTile;
  int flip = 0;
  PendingTile pending;
  const PlainOutput plain = epilogue.plain();
  // An A that few column panels read is not worth packing where the kernel can do without.
  constexpr int64_t kFewPanels = 32, kFewPanelsOfColumns = 4;
  const bool as_columns = cols.end - cols.begin <= kFewPanelsOfColumns * N && Kernel::takes_columns(a);
  const bool in_place = as_columns || (cols.end - cols.begin <= kFewPanels * N && Kernel::takes_rows(a));
  const int64_t lda = as_columns ? a.col_stride : a.row_stride;

  for (int64_t m0 = rows.begin; m0 < rows.end; m0 += blocking.rows) {
    const int64_t m_count = rows.end - m0 < blocking.rows ? rows.end - m0 : blocking.rows;
    const int64_t m_panels = (m_count + R - 1) / R;
    for (int64_t k0 = 0; k0 < K; k0 += blocking.depth) {
      const int64_t depth = padded_depth(K - k0 < blocking.depth ? K - k0 : blocking.depth);
      for (int64_t p = 0; p < depth; p += blocking.sub_depth) {
        const int64_t sub = depth - p < blocking.sub_depth ? depth - p : blocking.sub_depth;
        const int64_t from = in_place ? m_count / R * R : 0;  // rows that the kernel takes as they are
        pack_a_panels(packed_a + (p * m_panels * R + from * sub), a.offset(m0 + from, k0 + p), m_count - from,
                      K - k0 - p < sub ? K - k0 - p : sub);
      }
      for (int64_t n = cols.begin; n < cols.end; n += N) {
        const int64_t n_count = cols.end - n < N ? cols.end - n : N;
        const Kernel::Packed* const panel = right.at(n, n_count, k0, depth, K);
        pending.ahead = right.after(n, cols.end, k0, depth, K);
        const int64_t tiles_a_panel = m_panels * ((depth + blocking.sub_depth - 1) / blocking.sub_depth);
        const int64_t lines_a_tile = pending.ahead.left() / tiles_a_panel + 1;
        pending.lines_a_step = lines_a_tile * Kernel::kDepth / blocking.sub_depth + 1;
        float* column_tiles = tiles + (whole_depth ? 0 : (n - cols.begin) / N * panels * kTile);
        for (int64_t p = 0; p < depth; p += blocking.sub_depth) {
          const int64_t sub = depth - p < blocking.sub_depth ? depth - p : blocking.sub_depth;
          const bool first = k0 + p == 0, last = k0 + p + sub >= K;
          const Kernel::Packed* b = panel + p * N;
          const Kernel::Packed* next_b = p + sub < depth                     ? b + sub * N
                                         : n + N < cols.end && right.packed ? panel + padded_depth(K) * N
                                                                            : b;
          const int64_t next_share = right.buffer ? 0 : (sub * N + m_panels - 1) / m_panels;
          for (int64_t i = 0; i < m_panels; ++i) {
            float* tile = column_tiles + i * kTile;
            const int64_t valid_rows = m_count - i * R < R ? m_count - i * R : R;
            const bool plain_tile = plain.c && valid_rows == R && n_count == N;
            const bool into_c = plain_tile && last;
            TileSums sums = {tile, N, last ? scratch[flip] : tile, N};
            if (first) sums.from = nullptr;
            if (first && plain_tile && plain.bias) sums.from = plain.bias + n, sums.from_stride = 0;
            if (into_c) sums.to = plain.c + (m0 + i * R) * plain.ldc + n, sums.to_stride = plain.ldc;
            Kernel::LeftPanel left = {packed_a + p * m_panels * R + i * R * sub, nullptr, 0, false};
            if (in_place && valid_rows == R)
              left = {nullptr, static_cast<const float*>(a.offset(m0 + i * R, k0 + p).data), lda, as_columns};
            const int64_t lines_left = pending.ahead.left() - lines_a_tile;
            Kernel::multiply(left, valid_rows, b, sub, sums, next_b + i * next_share, next_share, pending);
            pending.ahead.step(pending.ahead.left() - lines_left);  // what the kernel has not read between its steps
            if (last && !into_c) {
              pending.take({&epilogue, sums.to, m0 + i * R, n, n_count, valid_rows});
              flip ^= 1;
            }
          }
        }
      }
    }
  }
  pending.finish();
}

// What a product with K = 0 is.
void rectangle_of_zeros(Range rows, Range cols, EpilogueRef epilogue) {
  const float zeros[Kernel::kCols] = {};
  for (int64_t m = rows.begin; m < rows.end; ++m)
    for (int64_t n = cols.begin; n < cols.end; n += Kernel::kCols)
      epilogue(zeros, m, n, 1, cols.end - n < Kernel::kCols ? cols.end - n : Kernel::kCols);
}

}  // namespace

void gemm_rectangle(MatrixRef a, const Kernel::Packed* packed_b, int64_t K, Range rows, Range cols,
                    EpilogueRef epilogue) {
  if (rows.begin >= rows.end || cols.begin >= cols.end) return;
  if (K == 0) return rectangle_of_zeros(rows, cols, epilogue);
  multiply_rectangle(a, {packed_b, {}, nullptr}, K, rows, cols, choose_blocking(rows.end - rows.begin, cols.end - cols.begin, K), epilogue);
}

// How many threads share the rows; the rest of the factor shares the columns.
static int row_parts(GemmSize size, int threads) {
  if (size.M >= threads * Kernel::kRows && mostly_writes(size.M / threads, size.N, size.K)) return threads;
  for (int parts = threads; parts > 1; --parts)
    if (threads % parts == 0 && size.M >= parts * Kernel::rows_worth_a_thread(size.K)) return parts;
  return 1;
}

// The same for few rows, which threads share only where panels of columns are so few that they would wait for each other.
static int parts_of_few_rows(GemmSize size, int threads) {
  const auto share = [](int64_t size, int64_t panel, int parts) { return ((size + panel - 1) / panel + parts - 1) / parts; };
  const auto tiles = [&](int parts) {  // of the thread that has most
    return share(size.M, Kernel::kRows, parts) * share(size.N, Kernel::kCols, threads / parts);
  };
  int best = 1;
  for (int parts = 2; parts <= threads; ++parts)
    if (threads % parts == 0 && 5 * tiles(parts) < 4 * tiles(best)) best = parts;
  return best;
}

void gemm_packed(MatrixRef a, const Kernel::Packed* packed_b, GemmSize size, EpilogueRef epilogue) {
  const int threads = threads_for(size.M * size.N * size.K, 1 << 17);
  const int m_parts = row_parts(size, threads), n_parts = threads / m_parts;
  for_each_part(threads, [&](int part) {
    Kernel::ThreadState state;
    (void)state;
    gemm_rectangle(a, packed_b, size.K, slice(size.M, part / n_parts, m_parts, Kernel::kRows),
                   slice(size.N, part % n_parts, n_parts, Kernel::kCols), epilogue);
  });
}

// The same for an A in few blocks of rows: each thread packs its own panels of B, one at a time, and what it packed never
// leaves its L2.
static void gemm_unpacked(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  const int threads = threads_for(size.M * size.N * size.K, 1 << 17);
  const int m_parts = parts_of_few_rows(size, threads), n_parts = threads / m_parts;
  for_each_part(threads, [&](int part) {
    Kernel::ThreadState state;
    (void)state;
    const Range rows = slice(size.M, part / n_parts, m_parts, Kernel::kRows);
    const Range cols = slice(size.N, part % n_parts, n_parts, Kernel::kCols);
    if (rows.begin < rows.end && cols.begin < cols.end) {
      const Blocking blocking = blocking_of_few_blocks(size.M, size.K);  // of all rows: depth must not depend on threads
      auto* panel = workspace<Kernel::Packed>(Slot::packed_b, blocking.depth * Kernel::kCols + 64);
      multiply_rectangle(a, {nullptr, b, panel}, size.K, rows, cols, blocking, epilogue);
    }
  });
}

void pack_b(Kernel::Packed* dst, MatrixRef b, int64_t N, int64_t K) {
  if (K == 0) return;
  const int64_t panels = (N + Kernel::kCols - 1) / Kernel::kCols;
  parallel_for(panels, 1 + (int64_t{1} << 14) / (Kernel::kCols * K + 1),
               [&](int64_t first, int64_t last) { pack_b_panels(dst, b, N, K, first, last); });
}

void gemm(MatrixRef a, MatrixRef b, GemmSize size, EpilogueRef epilogue) {
  if (size.M == 0 || size.N == 0) return;
  if (size.K == 0) return rectangle_of_zeros({0, size.M}, {0, size.N}, epilogue);
  if (size.M <= Kernel::kFewRows && b.row_stride == 1) return gemm_few_rows(a, b, size, epilogue);
  if (size.M <= kAcrossRows && b.col_stride == 1) return gemm_few_rows_across(a, b, size, epilogue);
  if (size.K <= kFewDeep && b.col_stride == 1) return gemm_few_deep(a, b, size, epilogue);
  const int threads = threads_for(size.M * size.N * size.K, 1 << 17);
  const bool few_blocks = in_few_blocks(size.M, size.K) && !mostly_writes(size.M, size.N, size.K);
  if ((b.row_stride == 1 || b.col_stride == 1) && row_parts(size, threads) == 1 && few_blocks) {
    if (Kernel::kFewRowsInBlock && b.row_stride == 1 && blocks_of_rows(size.M, size.K) == 1)
      return gemm_few_rows(a, b, size, epilogue);
    return gemm_unpacked(a, b, size, epilogue);
  }
  auto* packed = workspace<Kernel::Packed>(Slot::packed_b, packed_b_elements(size.N, size.K) + 64);
  pack_b(packed, b, size.N, size.K);
  gemm_packed(a, packed, size, epilogue);
}

}  // namespace llmfast::LLMFAST_TARGET
