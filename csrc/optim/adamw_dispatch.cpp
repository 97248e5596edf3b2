#include <algorithm>
#include <cmath>
#include <vector>

#include "core/check.h"
#include "optim/adamw_checks.h"

namespace llmfast {
namespace {

const DispatchTable<AdamWParams> kStep("adamw", {LLMFAST_VEC_ROWS(adamw_step, kAllFloat)});
const DispatchTable<GradNormParams> kSquares("grad_norm", {LLMFAST_VEC_ROWS(sum_squares, kAllFloat)});

void require_step(const TensorView& step) {
  require(step.defined && step.dtype == DType::f32 && step.numel() == 1, "steps: expected one float32 each");
}

}  // namespace

void adamw_step(const AdamWInputs& in) {
  std::vector<AdamWTensor> tensors(in.count);
  for (int64_t i = 0; i < in.count; ++i) {
    tensors[i] = checked_adamw(in, i);
    require_step(in.steps[i]);
  }
  for (int64_t i = 0; i < in.count; ++i)
    set_scalars(&tensors[i], in.groups[in.group_of[i]], *in.steps[i].as<float>() += 1.0f);
  kStep(DType::f32, {tensors.data(), in.count, in.grad_scale});  // dtypes may be mixed; every row takes all
}

double grad_norm(const TensorView* grads, int64_t count) {
  constexpr int64_t kPiece = int64_t{1} << 16;
  std::vector<NormPiece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    const TensorView& g = grads[i];
    check_gradient(g, i);
    const int64_t size = g.numel();
    for (int64_t begin = 0; begin < size; begin += kPiece)
      pieces.push_back({g.as<char>() + begin * size_of(g.dtype), std::min(kPiece, size - begin), g.dtype, 0.0});
  }
  kSquares(DType::f32, {pieces.data(), static_cast<int64_t>(pieces.size())});
  double squares = 0;
  for (const NormPiece& piece : pieces) squares += piece.squares;
  return std::sqrt(squares);
}

}  // namespace llmfast
