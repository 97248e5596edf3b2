// Brute-force checks of the index arithmetic that the CUDA kernels share with the host: swizzles, fragment maps, tile
// order, depth parts, bands and packed tiles. Prints nothing and returns 0 if all hold.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <tuple>
#include <vector>

#include "attention/cuda/decode_parts.h"
#include "attention/cuda/forward_order.h"
#include "attention/cuda/mask_classes.h"
#include "attention/cuda/one_pass.h"
#include "attention/cuda/tiles.h"
#include "gemm/cuda/hopper_schedule.h"
#include "gemm/cuda/schedule.h"
#include "gemm/cuda/shared_tile.h"
#include "norm/norm_cuda.h"

using namespace llmfast;
using namespace llmfast::cuda;

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) {                                              \
      std::printf("line %d: %s\n", __LINE__, #condition);            \
      std::exit(1);                                                  \
    }                                                                \
  } while (false)

// Every chunk has its own place, inside the tile; eight neighbouring rows of one chunk column, and the chunks that a
// quarter of a warp copies, lie in eight different bank groups of 16 bytes.
template <int kCols>
void check_swizzle() {
  constexpr int kRows = 64, kChunks = kCols / kChunk;
  std::set<int> places;
  for (int row = 0; row < kRows; ++row)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int at = chunk_offset<kCols>(row, chunk);
      CHECK(at % 16 == 0 && at >= 0 && at < kRows * kCols * 2);
      CHECK(places.insert(at).second);
    }
  for (int row = 0; row < kRows; row += 8)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      std::set<int> groups;
      for (int i = 0; i < 8; ++i) groups.insert(chunk_offset<kCols>(row + i, chunk) / 16 % 8);
      CHECK(groups.size() == 8);
    }
  for (int first = 0; first < kRows * kChunks; first += 8) {
    std::set<int> groups;
    for (int i = first; i < first + 8; ++i) groups.insert(chunk_offset<kCols>(i / kChunks, i % kChunks) / 16 % 8);
    CHECK(groups.size() == 8);
  }
}

// ldmatrix and mma as PTX defines them, on a tile whose element (r, c) is 256 r + c.
void check_fragments() {
  const auto element = [](int row, int col) { return 256 * row + col; };
  for (const Major major : {Major::k, Major::mn})
    for (const bool is_a : {true, false}) {
      // r[matrix][half] of a lane: the elements that its registers hold
      for (int lane = 0; lane < 32; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix)
          for (int half = 0; half < 2; ++half) {
            const bool transposed = major == Major::mn;
            const int in_row = transposed ? 2 * (lane % 4) + half : lane / 4;
            const int in_col = transposed ? lane / 4 : 2 * (lane % 4) + half;
            const int named_by = 8 * matrix + in_row;
            const LaneRow at = is_a ? lane_row_a(major, named_by) : lane_row_b(major, named_by);
            const int got = element(at.row, at.chunk * 8 + in_col);
            // what mma wants there, as (mn, k)
            const int k = 2 * (lane % 4) + half + 8 * (is_a ? matrix / 2 : matrix % 2);
            const int mn = lane / 4 + 8 * (is_a ? matrix % 2 : matrix / 2);
            CHECK(got == (major == Major::k ? element(mn, k) : element(k, mn)));
          }
    }
  std::set<std::tuple<int, int>> covered;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) covered.insert({accumulator_row(lane, i), accumulator_col(lane, i)});
  CHECK(covered.size() == 16 * 8);
  // Two accumulators, side by side, are the A fragment of their 16 columns: register r holds elements 2 (r % 2) and the
  // next of accumulator r / 2.
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * (r % 2) + half;
        CHECK(accumulator_row(lane, i) == lane / 4 + 8 * (r % 2));
        CHECK(accumulator_col(lane, i) + 8 * (r / 2) == 2 * (lane % 4) + half + 8 * (r / 2));
      }
}

void check_schedule() {
  for (const int64_t tiles_m : {1, 2, 7, 8, 9, 16, 19})
    for (const int64_t tiles_n : {1, 3, 8, 11}) {
      std::set<std::tuple<int64_t, int64_t>> seen;
      for (int64_t i = 0; i < tiles_m * tiles_n; ++i) {
        const TileIndex tile = tile_of(i, tiles_m, tiles_n);
        CHECK(tile.m >= 0 && tile.m < tiles_m && tile.n >= 0 && tile.n < tiles_n);
        CHECK(seen.insert({tile.m, tile.n}).second);
      }
    }
  for (const int64_t M : {1, 64, 700, 4096})
    for (const int64_t N : {1, 65, 3072})
      for (const int64_t K : {0, 1, 512, 1023, 1024, 16384}) {
        const GemmShape shape{M, N, K};
        const int64_t parts = gemm_plan(shape, true).parts, depth = part_depth(K, parts);
        CHECK(parts >= 1 && parts * depth >= K && depth % 64 == 0);
        CHECK(parts == 1 || K / parts >= kLeastDepth / 2);
        CHECK(gemm_plan(shape, false).parts == 1);
        CHECK(parts_workspace(shape) == (parts > 1 ? parts * M * N : 0));
      }
}

// Persistent blocks: every tile once in each part, all of the depth in the parts.
void check_hopper_schedule() {
  for (const int64_t M : {1, 128, 1500})
    for (const int64_t N : {1, 300, 2000})
      for (const int64_t K : {8, 64, 1000, 9000})
        for (const int raster : {1, 3, 8, 16})
          for (const int64_t count : {1, 2, 5}) {
            if (count > 1 && K < count * 512) continue;
            const Schedule schedule({M, N, K}, {count, part_depth(K, count)}, 128, 256, raster);
            std::set<std::tuple<int, int, int>> seen;
            int64_t steps = 0;
            for (int item = 0; item < schedule.items(); ++item) {
              const Work work = schedule.at(item);
              CHECK(work.tile_m >= 0 && work.tile_m < ceil_div(M, 128) && work.tile_n >= 0);
              CHECK(work.tile_n < ceil_div(N, 256) && work.steps > 0 && work.first_k % 64 == 0);
              CHECK(seen.insert({work.tile_m, work.tile_n, work.first_k}).second);
              steps += work.steps;
            }
            CHECK(steps == ceil_div(M, 128) * ceil_div(N, 256) * ceil_div(K, 64));
          }
  for (const int64_t M : {1, 700, 4096, 65536})
    for (const int64_t N : {1, 768, 3072})
      for (const int64_t K : {1, 512, 1100, 16384, 65536}) {
        const HopperPlan plan = hopper_plan({M, N, K}, true);
        const int64_t depth = part_depth(K, plan.parts);
        CHECK(plan.parts >= 1 && plan.parts * depth >= K && (plan.parts - 1) * depth < K);
        CHECK(hopper_plan({M, N, K}, false).parts == 1);
      }
  // Narrow tiles where asked for, of few rows, in one part, and only where they are no dearer than the others.
  for (const int64_t M : {1, 8, 64, 65, 128, 4096})
    for (const int64_t N : {1, 32, 768, 1024, 3072, 4096, 11008, 50257})
      for (const int64_t K : {8, 64, 768, 4096, 11008}) {
        const HopperPlan plan = hopper_plan({M, N, K}, true, true), others = hopper_plan({M, N, K}, true);
        CHECK(others.tile != HopperTileSize::narrow && plan.clocks <= others.clocks);
        if (plan.tile == HopperTileSize::narrow) CHECK(M <= 64 && plan.parts == 1 && plan.clocks < others.clocks);
        else CHECK(plan.tile == others.tile && plan.parts == others.parts);
      }
  for (const int64_t N : {768, 3072, 4096}) CHECK(hopper_plan({64, N, 768}, true, true).tile == HopperTileSize::narrow);
  CHECK(hopper_plan({64, 4096, 4096}, true, true).tile == HopperTileSize::narrow);
  CHECK(hopper_plan({8, 1024, 4096}, true, true).parts > 1);  // 32 narrow tiles would leave 100 multiprocessors idle
}

void check_band(int Tq, int Tk, int64_t left, int64_t right) {
  const Band band{Tq, Tk, left, right}, transposed = band.transposed();
  const auto sees = [&](int query, int key) {
    const int64_t diagonal = int64_t{query} + Tk - Tq;
    return key >= diagonal - left && key <= diagonal + right;
  };
  for (int query = 0; query < Tq; ++query)
    for (int key = 0; key < Tk; ++key) {
      CHECK(band.keys_of(query).has(key) == sees(query, key));
      CHECK(transposed.keys_of(key).has(query) == sees(query, key));
    }
  for (int first = 0; first < Tq; first += 3)
    for (int end = first + 1; end <= Tq; end += 4) {
      const Span any = band.seen_by_any(first, end), all = band.seen_by_all(first, end);
      for (int key = 0; key < Tk; ++key) {
        bool some = false, every = true;
        for (int query = first; query < end; ++query) {
          some |= sees(query, key);
          every &= sees(query, key);
        }
        CHECK(!some || any.has(key));
        CHECK(all.has(key) == every);
      }
    }
}

// Parts of decoding: they cover the keys without an empty one; more keys never make fewer, so that a workspace for all
// of them holds for those in a window; no part is small, and there are never more blocks than a device holds at once.
void check_key_parts() {
  for (const int width : {64, 128, 256})
    for (const int64_t items : {1, 2, 7, 64, 65, 96, 128, 129, 256, 5000}) {
      int64_t before = 1;
      for (int keys = 0; keys < 70000; keys += keys < 3000 ? 13 : 611) {
        const int64_t most = most_parts(items, keys, width);
        CHECK(most >= before && most <= kMostKeyParts && (most == 1 || most * items <= kMostKeyParts));
        CHECK(most == 1 || (keys / most * width * 4 >= 64 << 10 && keys * width * 4 >= 256 << 10));
        before = most;
        const KeyParts parts = key_parts(items, {5, 5 + keys}, width);
        CHECK(parts.begin == 5 && parts.end == 5 + keys && parts.count >= 1 && parts.count <= most);
        CHECK(int64_t{parts.count} * parts.length >= keys && (keys == 0 || (parts.count - 1) * parts.length < keys));
      }
    }
  CHECK(most_parts(64, 4096, 128) == 4 && most_parts(8, 16384, 128) == 32 && most_parts(96, 1024, 64) == 1);
}

// Packed tiles: each token of each sequence in exactly one tile, whatever the lengths.
void check_packed(const std::vector<int64_t>& lengths, int rows) {
  std::vector<int64_t> first = {0};
  for (const int64_t length : lengths) first.push_back(first.back() + length);
  const int64_t B = static_cast<int64_t>(lengths.size()), total = first.back();
  std::vector<int> covered(total, 0);
  for (int64_t i = 0; i < tile_count(B, total, true, rows); ++i) {
    const TokenTile tile = token_tile(i, B, total, first.data(), rows);
    CHECK(tile.sequence >= 0 && tile.sequence < B && tile.first >= 0);
    for (int64_t t = tile.first; t < tile.first + rows && t < lengths[tile.sequence]; ++t)
      ++covered[first[tile.sequence] + t];
  }
  for (const int count : covered) CHECK(count == 1);
}

// Blocks of `block` keys that add to tiles of `queries` queries, taken descending, with a turn at turn_tiles of them: the
// blocks of a tile, and of a turn, follow one another without a gap, whoever is waited for has a smaller place, and with
// any number of blocks at a time all finish. Each kv head serves `group` heads of queries.
void check_turns(const Band& band, int queries, int block, int heads, int group, int turn_tiles) {
  const int tiles = (band.Tq + queries - 1) / queries, blocks = (band.Tk + block - 1) / block;
  std::vector<Span> of_block(blocks);
  for (int n = 0; n < blocks; ++n)
    of_block[n] = tiles_of_block(band.transposed(), n * block, std::min((n + 1) * block, band.Tk), queries);
  const int turn_queries = turn_tiles * queries;
  for (int tile = 0; tile < tiles; ++tile) {
    int earlier = 0;
    for (int n = 0; n < blocks; ++n)
      if (of_block[n].has(tile)) CHECK(n - first_block_of_tile(band, tile * queries, queries, block) == earlier++);
  }
  for (int turn = 0; turn * turn_tiles < tiles; ++turn) {
    int earlier = 0;
    for (int n = 0; n < blocks; ++n) {
      bool adds = false;
      for (int tile = turn * turn_tiles; tile < (turn + 1) * turn_tiles; ++tile) adds = adds || of_block[n].has(tile);
      if (adds) CHECK(n - first_block_of_tile(band, turn * turn_queries, turn_queries, block) == earlier++);
    }
  }
  for (int query = 0; query < band.Tq; ++query)
    for (int key = 0; key < band.Tk; ++key)
      if (band.keys_of(query).has(key)) CHECK(of_block[key / block].has(query / queries));
  for (const int section : {1, 2, heads}) {
    std::vector<int> before(heads, 0);  // blocks of a head: ascending
    for (int index = 0; index < blocks * heads; ++index) {
      const BlockPlace place = block_place(index, blocks, heads, section);
      CHECK(place.head >= 0 && place.head < heads && place.tile == before[place.head]++);
    }
    for (const int resident : {1, 2, 5, blocks * heads}) {
      struct Running {
        BlockPlace place;
        int member, tile;
      };
      std::vector<Running> running;
      std::vector<int> turns(heads * group * tiles, 0);
      int next = 0;
      for (bool progress = true; progress;) {
        progress = false;
        while (static_cast<int>(running.size()) < resident && next < blocks * heads) {
          const BlockPlace place = block_place(next++, blocks, heads, section);
          running.push_back({place, 0, of_block[place.tile].end - 1});
        }
        for (size_t i = running.size(); i-- > 0;) {  // the last first: the one that waits longest
          Running& r = running[i];
          const Span own = of_block[r.place.tile];
          if (own.empty() || r.member == group) {
            running.erase(running.begin() + static_cast<int64_t>(i));
            progress = true;
            continue;
          }
          const int at = r.tile / turn_tiles;
          int& turn = turns[(r.place.head * group + r.member) * tiles + at];
          if (turn != r.place.tile - first_block_of_tile(band, at * turn_queries, turn_queries, block)) continue;
          const bool ends = r.tile == own.begin || (r.tile - 1) / turn_tiles != at;
          turn += ends;
          progress = true;
          if (--r.tile < own.begin) ++r.member, r.tile = own.end - 1;
        }
      }
      CHECK(running.empty() && next == blocks * heads);
    }
  }
}

// Long sequences go in one pass, short ones and narrow windows do not.
void check_way() {
  constexpr BackwardWay kernels = BackwardWay::kernels, in_turns = BackwardWay::in_turns;
  constexpr BackwardWay any_order = BackwardWay::any_order;
  const auto way = [](AttentionParams p, int64_t T, bool free) {
    p.Tq = p.Tk = T, p.any_order = free;
    return backward_way(p);
  };
  AttentionParams causal = {};
  causal.B = 8, causal.Hq = causal.Hkv = 16, causal.D = causal.Dv = 128, causal.left = kUnbounded;
  AttentionParams full = causal, narrow = causal, grouped = causal, window = causal, capped = causal, small = causal;
  full.right = kUnbounded, narrow.D = narrow.Dv = 64, grouped.Hkv = 4, window.left = 255, capped.softcap = 2.0f;
  small.B = 1, small.Hq = small.Hkv = 1;
  causal.Tq = causal.Tk = 8192;
  CHECK(std::abs(mean_queries_of_key(causal) - 4096.5) < 1);
  for (const bool free : {false, true}) {
    const BackwardWay best = free ? any_order : in_turns;
    CHECK(way(causal, 1000, free) == kernels && way(causal, 2048, free) == (free ? any_order : kernels));
    CHECK(way(causal, 4096, free) == best && way(causal, 16384, free) == best);
    CHECK(way(narrow, 1024, free) == kernels && way(narrow, 4096, free) == best && way(narrow, 16384, free) == best);
    CHECK(way(grouped, 4096, free) == best && way(grouped, 1024, free) == kernels);
    CHECK(way(full, 2048, free) == kernels && way(full, 4096, free) == in_turns && way(full, 8192, free) == in_turns);
    CHECK(way(window, 8192, free) == kernels && way(capped, 8192, free) == kernels);
    CHECK(way(small, 8192, free) == kernels && way(small, 16384, free) == best);
    for (AttentionParams few : {full, causal}) {  // queries, all of which see nearly all keys
      few.Tq = 256, few.Tk = 16384, few.any_order = free;
      CHECK(backward_way(few) == kernels);
    }
  }
  causal.first_q = &causal.B;
  CHECK(way(causal, 8192, true) == kernels);
}

// The rows that a norm's backward copies ahead fit what devices have, beside the 1,024 bytes that ptxas reports.
void check_norm_stages() {
  constexpr int kDevices[][2] = {{166912, 167936}, {101376, 102400}, {232448, 233472}};  // 8.0; 8.6, 8.9, 12.0; 9.0
  for (const auto& [block, multiprocessor] : kDevices)
    for (int threads = 32; threads <= 512; threads += 32)
      for (int pieces = 2; pieces <= 12; ++pieces) {
        const int bytes = pieces * threads * 16, stages = norm_backward_stages(threads, bytes, block, multiprocessor);
        CHECK(stages == 0 || stages * bytes + 1024 <= block);
        CHECK(512 / threads * (stages * bytes + 2048) <= multiprocessor);
      }
  CHECK(norm_backward_stages(352, 352 * 6 * 16, 101376, 102400) == 2);  // three are 99 KB, all that a block may have
  CHECK(norm_backward_stages(96, 96 * 5 * 16, 232448, 233472) == 3);
}

// What is noted of a tile is found again from its keys and from its queries, whatever dimensions the mask lacks; no two
// tiles share a place.
void check_mask_classes() {
  for (int strides = 0; strides < 8; ++strides) {
    AttentionParams p = {};
    p.B = 2, p.Hq = 3, p.Tq = 300, p.Tk = 129;
    p.mask.sequence_stride = strides & 1, p.mask.head_stride = strides & 2, p.mask.query_stride = strides & 4;
    const MaskClasses c(p);
    std::vector<uint8_t> all(2 * c.tiles() + 1, 0xff);
    CHECK(c.tiles() == (strides & 1 ? 2 : 1) * (strides & 2 ? 3 : 1) * (strides & 4 ? 3 : 1) * 2 &&
          c.floats() * 4 >= 2 * c.tiles());
    const auto value = [&](int plane, int query_tile, int key_tile) {
      return static_cast<uint8_t>((plane * c.query_tiles + query_tile) * c.key_tiles + key_tile);
    };
    for (int plane = 0; plane < c.sequences * c.heads; ++plane)
      for (int i = 0; i < c.query_tiles; ++i)
        for (int j = 0; j < c.key_tiles; ++j) c.note(all.data(), plane, i, j, value(plane, i, j));
    for (int sequence = 0; sequence < 2; ++sequence)
      for (int head = 0; head < 3; ++head)
        for (int query = 0; query < 300; query += 64)
          for (int key = 0; key < 129; key += 64) {
            const int plane = c.plane(sequence, head), i = strides & 4 ? query / kClassRows : 0, j = key / kClassRows;
            CHECK(plane == (strides & 1 ? sequence : 0) * c.heads + (strides & 2 ? head : 0));
            CHECK(c.of_keys(all.data(), plane, j).of_token(query) == value(plane, i, j));
            CHECK(c.of_queries(all.data(), plane, query / kClassRows).of_token(key) == value(plane, i, j));
          }
    CHECK(all.back() == 0xff);
  }
  CHECK((Classes{nullptr, 0}).of_token(1000) == kShows);
}

// Offsets that make no sense must lead to no token outside the tensors.
void check_wrong_offsets() {
  AttentionParams p = {};
  p.Tq = 10, p.Tk = 20, p.B = 4;
  const int64_t q[] = {-5, 7, 3, 1000, int64_t{1} << 60}, k[] = {0, 50, -50, 20, 10};
  p.first_q = q;
  p.first_k = k;
  for (int64_t s = 0; s < 4; ++s) {
    const Sequence sequence = sequence_of(p, s);
    CHECK(sequence.Tq >= 0 && sequence.first_q >= 0 && sequence.first_q + sequence.Tq <= p.Tq);
    CHECK(sequence.Tk >= 0 && sequence.first_k >= 0 && sequence.first_k + sequence.Tk <= p.Tk);
  }
  for (int64_t i = 0; i < tile_count(p.B, p.Tq, true, 4); ++i) {
    const TokenTile tile = token_tile(i, p.B, p.Tq, q, 4);
    CHECK(tile.sequence >= 0 && tile.sequence < p.B);
  }
}

// Each tile of each head once, blocks' shares too; with a causal mask no block does much more than the mean.
void check_forward_order(int64_t units, int64_t group, int64_t tiles, bool differ, int blocks) {
  const int sections = forward_sections(units, group, tiles, differ, tiles % 2 == 1, blocks);
  CHECK(sections >= 1 && sections <= units);
  const ForwardOrder order{static_cast<int>(units), static_cast<int>(group), static_cast<int>(tiles), sections};
  CHECK(order.count() == units * group * tiles);
  std::set<std::tuple<int, int, int>> seen;
  std::vector<int64_t> sums(blocks, 0);
  int64_t sum = 0;
  for (int round = 0; round * blocks < order.count(); ++round)
    for (int block = 0; block < blocks; ++block) {
      const int index = ForwardOrder::share(round, block, blocks);
      CHECK(index >= round * blocks && index < (round + 1) * blocks);
      if (index >= order.count()) continue;
      const ForwardOrder::Piece piece = order.at(index);
      CHECK(piece.unit >= 0 && piece.unit < units && piece.head >= 0 && piece.head < group);
      CHECK(piece.tile >= 0 && piece.tile < tiles && seen.insert({piece.unit, piece.head, piece.tile}).second);
      sums[block] += piece.tile + 1;
      sum += piece.tile + 1;
    }
  CHECK(static_cast<int>(seen.size()) == order.count());
  CHECK(order.count() == 0 || order.at(order.count() - 1).tile == 0);
  if (!differ || order.count() < 8 * blocks) return;
  for (const int64_t s : sums) CHECK(s * blocks <= sum + sum / 20 + blocks * (tiles / 16 + 1));
}

int main() {
  check_swizzle<32>();
  check_swizzle<64>();
  check_swizzle<128>();
  check_swizzle<256>();
  check_fragments();
  check_schedule();
  check_hopper_schedule();
  check_key_parts();
  const int64_t distances[] = {-40, -3, 0, 2, 9, kUnbounded};
  for (const int Tq : {1, 13, 20})
    for (const int Tk : {1, 13, 30})
      for (const int64_t left : distances)
        for (const int64_t right : distances) {
          check_band(Tq, Tk, left, right);
          check_turns({Tq, Tk, left, right}, 2, 4, 3, 2, 2);
          check_turns({Tq, Tk, left, right}, 4, 4, 2, 1, 1);
          check_turns({Tq, Tk, left, right}, 3, 2, 4, 1, 2);
        }
  check_way();
  check_norm_stages();
  check_mask_classes();
  for (const int rows : {4, 16, 64}) {
    check_packed({5, 0, 70, 1}, rows);
    check_packed({0, 0, 3}, rows);
    check_packed({64, 64, 1, 63, 128}, rows);
    check_packed({1, 1, 1, 1, 1, 1, 1, 1}, rows);
  }
  std::set<std::tuple<int64_t, int>> dense;  // dense tiles: each once, the last of a sequence first
  for (int64_t i = 0; i < tile_count(3, 70, false, 16); ++i) {
    const TokenTile tile = token_tile(i, 3, 70, nullptr, 16);
    CHECK(dense.insert({tile.sequence, tile.first}).second && tile.first < 70 && tile.first % 16 == 0);
  }
  CHECK(dense.size() == 15 && token_tile(0, 3, 70, nullptr, 16).first == 64);
  check_wrong_offsets();
  for (const int64_t units : {1, 3, 8, 30, 64})
    for (const int64_t group : {1, 3, 4})
      for (const int64_t tiles : {1, 5, 32, 128})
        for (const bool differ : {false, true})
          for (const int blocks : {1, 7, 132}) check_forward_order(units, group, tiles, differ, blocks);
}
