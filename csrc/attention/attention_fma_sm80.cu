// Masked attention in float32, forward and backward, by fused multiply-adds; see attention.h for the formula.
//
// The same shape as the tensor-core kernels, for accuracy instead of speed: a block owns kSide rows (queries, or keys
// for grad_k and grad_v) and walks over tiles of kSide columns; 256 threads as 16 x 16, thread (y, x) computes rows y,
// y + 16 by columns x, x + 16 of a score tile, and of its rows' sums the elements 4x..4x + 3 of every 64. Weights pass
// through shared memory among the 16 threads of a row, half a warp. A weight of 0 is skipped, so what a hidden row
// holds never matters. Sums run in the order of the tiles: deterministic.
//
// Memory: 3 or 4 tiles of kSide x (kD + 4) floats: at most 76 KB. D, Dv <= 256.
#include "attention/attention_cuda.h"
#include "attention/cuda/gradients.h"

namespace llmfast::cuda {
namespace {

template <int kD_>
struct FmaTile {
  static constexpr int kD = kD_, kSide = kD <= 128 ? 32 : 16, kMicro = kSide / 16, kThreads = 256;
  static constexpr int kRow = kD + 4;         // floats: rows that neighbouring threads read lie in different banks
  static constexpr int kQuads = kD / 64;      // of a row, a thread
  static constexpr int kTile = kSide * kRow;  // floats
  static constexpr int kWeightRow = kSide + 1, kWeights = kSide * kWeightRow;
  static constexpr int bytes(int tiles, int weights) { return (tiles * kTile + weights * kWeights) * 4; }
};

__device__ inline int thread_x() { return thread() % 16; }
__device__ inline int thread_y() { return thread() / 16; }

// `rows` of the tile's rows exist, with D elements; the rest becomes 0.
template <class Tile>
__device__ void fill(float* tile, const float* from, int64_t stride, int rows, int D) {
  for (int i = thread(); i < Tile::kSide * Tile::kD; i += Tile::kThreads) {
    const int row = i / Tile::kD, d = i % Tile::kD;
    tile[row * Tile::kRow + d] = row < rows && d < D ? from[row * stride + d] : 0.0f;
  }
}

template <class Tile>
__device__ void dot_tiles(float (&s)[Tile::kMicro][Tile::kMicro], const float* rows, const float* columns) {
#pragma unroll
  for (int i = 0; i < Tile::kMicro; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kMicro; ++j) s[i][j] = 0.0f;
#pragma unroll 4
  for (int d = 0; d < Tile::kD; d += 4) {
    float4 a[Tile::kMicro], b[Tile::kMicro];
#pragma unroll
    for (int i = 0; i < Tile::kMicro; ++i) {
      a[i] = load<float4>(rows + (thread_y() + 16 * i) * Tile::kRow + d);
      b[i] = load<float4>(columns + (thread_x() + 16 * i) * Tile::kRow + d);
    }
#pragma unroll
    for (int i = 0; i < Tile::kMicro; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kMicro; ++j)
        s[i][j] = fmaf(a[i].w, b[j].w, fmaf(a[i].z, b[j].z, fmaf(a[i].y, b[j].y, fmaf(a[i].x, b[j].x, s[i][j]))));
  }
}

template <class Tile>
struct Sums {
  float4 at[Tile::kMicro][Tile::kQuads];

  __device__ void clear() {
    for (auto& row : at)
      for (float4& quad : row) quad = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  __device__ void scale_row(int i, float factor) {
#pragma unroll
    for (int q = 0; q < Tile::kQuads; ++q) {
      float4& s = at[i][q];
      s = make_float4(s.x * factor, s.y * factor, s.z * factor, s.w * factor);
    }
  }
  // += weights[rows][kSide] tile[kSide][kD], without the weights that are 0.
  __device__ void add(const float* weights, const float* tile) {
    for (int token = 0; token < Tile::kSide; ++token)
#pragma unroll
      for (int i = 0; i < Tile::kMicro; ++i) {
        const float w = weights[(thread_y() + 16 * i) * Tile::kWeightRow + token];
        if (w == 0.0f) continue;
#pragma unroll
        for (int q = 0; q < Tile::kQuads; ++q) {
          const float4 x = load<float4>(tile + token * Tile::kRow + thread_x() * 4 + 64 * q);
          float4& s = at[i][q];
          s = make_float4(fmaf(w, x.x, s.x), fmaf(w, x.y, s.y), fmaf(w, x.z, s.z), fmaf(w, x.w, s.w));
        }
      }
  }
  __device__ void store_row(int i, float* to, int D, float factor) const {
#pragma unroll
    for (int q = 0; q < Tile::kQuads; ++q) {
      const float x[4] = {at[i][q].x, at[i][q].y, at[i][q].z, at[i][q].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int d = thread_x() * 4 + 64 * q + e;
        if (d < D) to[d] = x[e] * factor;
      }
    }
  }
};

// The weights of this thread's scores, for the other threads of its rows: the 16 lanes of half a warp.
template <class Tile>
__device__ void share(float* weights, const float (&s)[Tile::kMicro][Tile::kMicro]) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Tile::kMicro; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kMicro; ++j)
      weights[(thread_y() + 16 * i) * Tile::kWeightRow + thread_x() + 16 * j] = s[i][j];
  __syncwarp();
}

// A finished log2-domain score with what the mask says about it; -inf where it is hidden.
__device__ inline float masked(const AttentionParams& p, int64_t sequence, int64_t head, int query, int key,
                               float score) {
  const char* const at = mask_element(p, sequence, head, query, key);
  const float bias = p.mask.dtype == DType::boolean ? mask_value_at<uint8_t>(at)
                     : p.mask.dtype == DType::bf16  ? mask_value_at<bf16>(at)
                     : p.mask.dtype == DType::f16   ? mask_value_at<fp16>(at)
                                                    : mask_value_at<float>(at);
  return bias == -infinity() ? bias : score + bias;
}

__device__ inline ScoreScale finishing_scale(const AttentionParams& p) {
  ScoreScale scale(p);
  scale.finished = true;
  return scale;
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_forward_fma_kernel(const AttentionParams p, const int64_t query_tiles) {
  constexpr int kSide = Tile::kSide, kMicro = Tile::kMicro;
  const int64_t head = blockIdx.x / query_tiles, kv_head = head / (p.Hq / p.Hkv);
  const TokenTile place = token_tile(blockIdx.x % query_tiles, p.B, p.Tq, p.first_q, kSide);
  const Sequence sequence = sequence_of(p, place.sequence);
  if (place.first >= sequence.Tq) return;
  const int end = place.first + kSide < sequence.Tq ? place.first + kSide : sequence.Tq;
  const Band band{sequence.Tq, sequence.Tk, p.left, p.right};
  const Span seen = band.seen_by_any(place.first, end);
  const ScoreScale scale = finishing_scale(p);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);

  float* const queries = dynamic_shared<float>();
  float *const keys = queries + Tile::kTile, *const values = keys + Tile::kTile, *const weights = values + Tile::kTile;
  fill<Tile>(queries, row_of<const float>(p.q, place.sequence, head, sequence.first_q + place.first),
             p.q.token_stride, end - place.first, D);
  Sums<Tile> out;
  out.clear();
  float highest[kMicro], sum[kMicro];
  for (int i = 0; i < kMicro; ++i) highest[i] = kLowest, sum[i] = 0.0f;
  for (int first = seen.begin; first < seen.end; first += kSide) {
    __syncthreads();
    fill<Tile>(keys, row_of<const float>(p.k, place.sequence, kv_head, sequence.first_k + first), p.k.token_stride,
               seen.end - first, D);
    fill<Tile>(values, row_of<const float>(p.v, place.sequence, kv_head, sequence.first_k + first), p.v.token_stride,
               seen.end - first, Dv);
    __syncthreads();
    float s[kMicro][kMicro];
    dot_tiles<Tile>(s, queries, keys);
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
      const int query = place.first + thread_y() + 16 * i;
      const Span visible = query < end ? band.keys_of(query) : Span{0, 0};
      float top = highest[i];
#pragma unroll
      for (int j = 0; j < kMicro; ++j) {
        const int key = first + thread_x() + 16 * j;
        float none = 0.0f;
        scale_pair(s[i][j], none, 0.0f, scale);
        if (!visible.has(key)) s[i][j] = -infinity();
        else if (p.mask.data) s[i][j] = masked(p, place.sequence, head, query, key, s[i][j]);
        top = fmaxf(top, s[i][j]);
      }
      top = group_max<16>(top);
      const float keep = exp2f(highest[i] - top);
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kMicro; ++j) {
        s[i][j] = exp2f(s[i][j] - top);
        total += s[i][j];
      }
      highest[i] = top;
      sum[i] = fmaf(sum[i], keep, total);
      out.scale_row(i, keep);
    }
    share<Tile>(weights, s);
    out.add(weights, values);
  }
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    const int query = place.first + thread_y() + 16 * i;
    const float total = group_sum<16>(sum[i]);
    if (query >= end) continue;
    out.store_row(i, row_of<float>(p.out, place.sequence, head, sequence.first_q + query), Dv,
                  total == 0.0f ? 0.0f : 1.0f / total);
    if (thread_x() == 0)
      *row_of<float>(p.lse, place.sequence, head, sequence.first_q + query) = natural_lse(highest[i], total);
  }
}

// kOfQueries: rows are queries, grad_q; otherwise rows are keys, grad_k and grad_v.
template <class Tile, bool kOfQueries>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_backward_fma_kernel(const AttentionBackwardParams p, const int64_t row_tiles) {
  constexpr int kSide = Tile::kSide, kMicro = Tile::kMicro;
  const int64_t group = p.Hq / p.Hkv, row_head = blockIdx.x / row_tiles;
  const int64_t kv_head = kOfQueries ? row_head / group : row_head;
  const TokenTile place = token_tile(blockIdx.x % row_tiles, p.B, kOfQueries ? p.Tq : p.Tk,
                                     kOfQueries ? p.first_q : p.first_k, kSide);
  const Sequence sequence = sequence_of(p, place.sequence);
  const int tokens = kOfQueries ? sequence.Tq : sequence.Tk;
  if (place.first >= tokens) return;
  const int end = place.first + kSide < tokens ? place.first + kSide : tokens;
  const Band straight{sequence.Tq, sequence.Tk, p.left, p.right}, band = kOfQueries ? straight : straight.transposed();
  const Span seen = band.seen_by_any(place.first, end);
  const ScoreScale scale = finishing_scale(p);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int64_t first_row = kOfQueries ? sequence.first_q : sequence.first_k;
  const int64_t first_column = kOfQueries ? sequence.first_k : sequence.first_q;

  // left: q or k; right: grad_out or v; own rows, and those that stream by
  float* const own_left = dynamic_shared<float>();
  float *const own_right = own_left + Tile::kTile, *const left = own_right + Tile::kTile;
  float* const right = left + Tile::kTile;
  float *const weights = right + Tile::kTile, *const weight_gradients = weights + Tile::kWeights;
  const HeadTensor &row_left = kOfQueries ? p.q : p.k, &row_right = kOfQueries ? p.grad_out : p.v;
  const HeadTensor &column_left = kOfQueries ? p.k : p.q, &column_right = kOfQueries ? p.v : p.grad_out;
  fill<Tile>(own_left, row_of<const float>(row_left, place.sequence, row_head, first_row + place.first),
             row_left.token_stride, end - place.first, D);
  fill<Tile>(own_right, row_of<const float>(row_right, place.sequence, row_head, first_row + place.first),
             row_right.token_stride, end - place.first, Dv);
  Sums<Tile> of_left, of_right;
  of_left.clear();
  of_right.clear();
  for (int64_t in_group = 0; in_group < (kOfQueries ? 1 : group); ++in_group) {
    const int64_t head = kOfQueries ? row_head : kv_head * group + in_group, column_head = kOfQueries ? kv_head : head;
    const RowStatistics* const statistics = statistics_of(p, head, sequence);
    for (int first = seen.begin; first < seen.end; first += kSide) {
      __syncthreads();
      fill<Tile>(left, row_of<const float>(column_left, place.sequence, column_head, first_column + first),
                 column_left.token_stride, seen.end - first, D);
      fill<Tile>(right, row_of<const float>(column_right, place.sequence, column_head, first_column + first),
                 column_right.token_stride, seen.end - first, Dv);
      __syncthreads();
      float s[kMicro][kMicro], g[kMicro][kMicro];
      dot_tiles<Tile>(s, own_left, left);
      dot_tiles<Tile>(g, own_right, right);
#pragma unroll
      for (int i = 0; i < kMicro; ++i) {
        const int row = place.first + thread_y() + 16 * i;
        const Span visible = row < end ? band.keys_of(row) : Span{0, 0};
#pragma unroll
        for (int j = 0; j < kMicro; ++j) {
          const int column = first + thread_x() + 16 * j, query = kOfQueries ? row : column;
          float weight = 0.0f, gradient = 0.0f;
          if (visible.has(column)) {
            const RowStatistics of_row = statistics[query];
            scale_pair(s[i][j], g[i][j], of_row.delta, scale);
            if (p.mask.data)
              s[i][j] = masked(p, place.sequence, head, query, kOfQueries ? column : row, s[i][j]);
            if (s[i][j] != -infinity() && of_row.lse != infinity()) {
              weight = exp2f(s[i][j] - of_row.lse);
              gradient = weight * g[i][j];
            }
          }
          s[i][j] = weight;
          g[i][j] = gradient;
        }
      }
      share<Tile>(weight_gradients, g);
      of_left.add(weight_gradients, left);
      if (!kOfQueries) {
        share<Tile>(weights, s);
        of_right.add(weights, right);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    const int row = place.first + thread_y() + 16 * i;
    if (row >= end) continue;
    const auto to = [&](const HeadTensor& t) { return row_of<float>(t, place.sequence, row_head, first_row + row); };
    of_left.store_row(i, to(kOfQueries ? p.grad_q : p.grad_k), D, p.scale);
    if (!kOfQueries) of_right.store_row(i, to(p.grad_v), Dv, 1.0f);
  }
}

template <class Body>
void visit_head_dim(const AttentionParams& p, const Body& body) {
  const int64_t D = p.D > p.Dv ? p.D : p.Dv;
  if (D <= 64) body(FmaTile<64>{});
  else if (D <= 128) body(FmaTile<128>{});
  else body(FmaTile<256>{});
}

}  // namespace

void attention_forward_fma_sm80(const AttentionParams& p, const Stream& stream) {
  visit_head_dim(p, [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t tiles = tile_count(p.B, p.Tq, p.first_q != nullptr, Tile::kSide);
    launch(stream, {static_cast<unsigned>(tiles * p.Hq)}, Tile::kThreads, size_t{Tile::bytes(3, 1)},
           attention_forward_fma_kernel<Tile>, p, tiles);
  });
}

void attention_backward_fma_sm80(const AttentionBackwardParams& p, const Stream& stream) {
  launch_row_statistics<float>(p, stream);
  visit_head_dim(p, [&](auto tile) {
    using Tile = decltype(tile);
    const auto run = [&](auto kernel, int64_t tokens, int64_t heads) {
      const int64_t tiles = tile_count(p.B, tokens, p.first_q != nullptr, Tile::kSide);
      if (tiles * heads > 0)
        launch(stream, {static_cast<unsigned>(tiles * heads)}, Tile::kThreads, size_t{Tile::bytes(4, 2)}, kernel, p,
               tiles);
    };
    run(attention_backward_fma_kernel<Tile, true>, p.Tq, p.Hq);
    run(attention_backward_fma_kernel<Tile, false>, p.Tk, p.Hkv);
  });
}

}  // namespace llmfast::cuda
