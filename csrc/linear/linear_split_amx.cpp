// linear on float32 matrices through products of bfloat16, on request (set_float32_products_split): each value is the sum
// of two bfloat16, x = high + low, about 16 bits of its mantissa, and of the four products of halves all but low * low,
// which is below 2^-16 of the whole, are summed in float32:
//
//   a b  ~  [high a | low a | high a] [high b | high b | low b]^T,   one bfloat16 product of three times the depth.
//
// Matrices are split a block at a time, in the direction in which they lie in memory; 12 bytes written and read per value
// of a block against 2 * kBlockLanes products of each. Where a value is infinite or NaN, only the first of its three parts
// has it, so that it meets no zero and no part of the other sign. Beyond 3.39e38 bfloat16 has infinity; subnormals count
// as zero, as everywhere on AMX.
#include "gemm/product.h"
#include "gemm/vectors.h"
#include "linear/linear.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

constexpr int64_t kParts = 3;
constexpr int64_t kBlockLanes = 2048, kBlockDepth = 2048;  // rows or columns, and depth, that are split at a time

enum class Side { left, right };

// The parts of `count` values, `part_stride` elements from one another.
void write_parts(bf16* dst, const float* src, int64_t count, int64_t part_stride, Side side) {
  const Vec infinity = Vec::set(__builtin_inff());
  bf16* low_part = dst + (side == Side::left ? 1 : 2) * part_stride;
  bf16* again = dst + (side == Side::left ? 2 : 1) * part_stride;
  for_each_vec(count, [&](int64_t i, auto lanes) {
    const Vec x = lanes.load(src + i);
    const Vec high = {Vec::widen_bf16(Vec::narrow_bf16(x.v))};
    const Mask finite = lt(abs(high), infinity);
    lanes.store(high, dst + i);
    lanes.store(select(finite, x - high, Vec::zero()), low_part + i);
    lanes.store(select(finite, high, Vec::zero()), again + i);
  });
}

// m[lanes][depth] as [lanes][kParts * depth] in dst.
MatrixRef split(bf16* dst, MatrixRef m, int64_t lanes, int64_t depth, Side side) {
  const auto* data = static_cast<const float*>(m.data);
  const bool by_depth = m.col_stride != 1 && m.row_stride == 1;
  const int64_t lines = by_depth ? depth : lanes, length = by_depth ? lanes : depth;
  const int64_t line_stride = by_depth ? m.col_stride : m.row_stride, stride = by_depth ? m.row_stride : m.col_stride;
  parallel_for(lines, 1 + (int64_t{1} << 14) / length, [&](int64_t first, int64_t last) {
    for (int64_t line = first; line < last; ++line) {
      const float* src = data + line * line_stride;
      bf16* out = dst + line * length * (by_depth ? 1 : kParts);
      const int64_t part_stride = by_depth ? depth * lanes : depth;
      if (stride == 1) {
        write_parts(out, src, length, part_stride, side);
        continue;
      }
      for (int64_t i = 0; i < length; i += Vec::kLanes) {
        float values[Vec::kLanes];
        const int64_t count = length - i < Vec::kLanes ? length - i : Vec::kLanes;
        for (int64_t j = 0; j < count; ++j) values[j] = src[(i + j) * stride];
        write_parts(out + i, values, count, part_stride, side);
      }
    }
  });
  return by_depth ? MatrixRef{dst, DType::bf16, 1, lanes} : MatrixRef{dst, DType::bf16, kParts * depth, 1};
}

void split_product(MatrixRef a, MatrixRef b, GemmSize size, const TensorView& out, const float* bias) {
  const auto at_most = [](int64_t left, int64_t most) { return left < most ? left : most; };
  const int64_t depth = at_most(size.K, kBlockDepth);
  const int64_t rows = at_most(size.M, kBlockLanes), cols = at_most(size.N, kBlockLanes);
  auto* left = workspace<bf16>(Slot::hidden, kParts * depth * (rows + cols) + 64);
  bf16* right = left + round_up(kParts * depth * rows, 32);
  float* c = out.as<float>();
  const int64_t ldc = out.stride[0];
  for (int64_t n = 0; n < size.N; n += cols)
    for (int64_t k = 0; k < size.K; k += depth) {
      const int64_t n_count = at_most(size.N - n, cols), k_count = at_most(size.K - k, depth);
      const MatrixRef halves = split(right, b.offset(k, n).transposed(), n_count, k_count, Side::right).transposed();
      for (int64_t m = 0; m < size.M; m += rows) {
        const int64_t m_count = at_most(size.M - m, rows);
        const GemmSize part{m_count, n_count, kParts * k_count};
        const MatrixRef other = split(left, a.offset(m, k), m_count, k_count, Side::left);
        float* tile = c + m * ldc + n;
        if (k == 0) gemm(other, halves, part, StoreEpilogue<float>{tile, ldc, bias ? bias + n : nullptr});
        else gemm(other, halves, part, AccumulateEpilogue{tile, ldc});
      }
    }
}

}  // namespace

void linear_forward_split(const LinearParams& p) {
  const GemmSize size{p.x.shape[0], p.weight.shape[0], p.x.shape[1]};
  const float* bias = as_float(p.bias, workspace<float>(Slot::staging, size.N + Vec::kLanes));
  split_product(matrix(p.x), matrix(p.weight).transposed(), size, p.out, bias);
}

void linear_backward_split(const LinearBackwardParams& p) {
  const int64_t M = p.grad.shape[0], N = p.grad.shape[1];
  if (p.grad_x.defined) split_product(matrix(p.grad), matrix(p.weight), {M, p.weight.shape[1], N}, p.grad_x, nullptr);
  if (p.grad_weight.defined)
    split_product(matrix(p.grad).transposed(), matrix(p.x), {N, p.x.shape[1], M}, p.grad_weight, nullptr);
  if (p.grad_bias.defined) column_sums(p.grad, p.grad_bias);
}

}  // namespace llmfast::LLMFAST_TARGET
