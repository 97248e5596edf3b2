// AdamW step and sums of squares over many tensors; see adamw.h for the formulas.
//
// One launch takes up to kTensors tensors, whose table is a kernel parameter (all drivers take 4 KB), and cuts each
// into pieces of kPiece elements, a block a piece: block -> tensor by counting the tensors that begin before it. A
// thread takes eight elements at a time, in two quads (Columns in core/cuda_elements.h), since float32 is most of it. The
// step is bound by memory, 28 bytes an element: each is read and written once. A piece's sum of squares is added in a
// fixed order that depends on sizes alone, and one block adds the pieces' sums, in float64.
#include "core/cuda_elements.h"
#include "core/cuda_launch.h"
#include "core/cuda_row_sum.h"
#include "optim/adamw_cuda.h"

namespace llmfast::cuda {
namespace {

constexpr int kTensors = 32, kThreads = 256;
constexpr double kMostFinite = 1.7976931348623157e308;
constexpr int64_t kPiece = kNormPieceElements;

// Which piece of which tensor a block has.
struct Pieces {
  int64_t end[kTensors];  // blocks of this tensor and those before it
  int count = 0;

  int64_t add(int64_t elements) {
    const int64_t before = count ? end[count - 1] : 0;
    return end[count++] = before + (elements + kPiece - 1) / kPiece;
  }
  __device__ __forceinline__ int tensor_of(int64_t block) const {
    int tensor = 0;
    while (block >= end[tensor]) ++tensor;
    return tensor;
  }
  __device__ __forceinline__ int64_t first_of(int tensor, int64_t block) const {
    return (block - (tensor ? end[tensor - 1] : 0)) * kPiece;
  }
};

// Elements first .. first + kPiece of a flat tensor of `count`; nothing if data is nullptr.
__device__ __forceinline__ RowPointer piece_of(const void* data, DType dtype, int64_t first, int64_t count) {
  char* start = static_cast<char*>(const_cast<void*>(data));
  const int64_t rest = count - first;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  if (start) start += first * size_of(dtype);
  return {start, static_cast<int>(rest < kPiece ? rest : kPiece), dtype, aligned};
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }  // NaN is not

struct StepOperands {
  AdamWTensor tensors[kTensors];
  Pieces pieces;
  float grad_scale;
  const float* more_scale;  // another factor, on the device, or nullptr
};
static_assert(sizeof(StepOperands) <= 4096);

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ StepOperands o) {
  const float more_scale = o.more_scale ? *o.more_scale : 1.0f, grad_scale = o.grad_scale * more_scale;
  if (!is_finite(more_scale)) return;
  const int tensor = o.pieces.tensor_of(blockIdx.x);
  const int64_t first = o.pieces.first_of(tensor, blockIdx.x);
  const AdamWTensor& t = o.tensors[tensor];
  const RowPointer grad = piece_of(t.grad, t.grad_dtype, first, t.count);
  const RowPointer exp_avg = piece_of(t.exp_avg, DType::f32, first, t.count);
  const RowPointer exp_avg_sq = piece_of(t.exp_avg_sq, DType::f32, first, t.count);
  const RowPointer param = piece_of(t.param, t.param_dtype, first, t.count);
  const RowPointer value = t.master ? piece_of(t.master, DType::f32, first, t.count) : param;
  for (int strip = 0; strip * kThreads * kEight < grad.C; ++strip) {
    const Columns columns(strip, kThreads, thread(), true);
    const Eight grad_raw = load_eight<true>(grad, columns);
    const Eight m_raw = load_eight(exp_avg, columns), v_raw = load_eight(exp_avg_sq, columns);
    const Eight w_raw = load_eight(value, columns);
    float g[kEight], m[kEight], v[kEight], w[kEight];
    widen(grad_raw, grad.dtype, g);
    widen(m_raw, DType::f32, m);
    widen(v_raw, DType::f32, v);
    widen(w_raw, DType::f32, w);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const float scaled = g[j] * grad_scale;
      m[j] = fmaf(scaled - m[j], t.one_minus_beta1, m[j]);
      v[j] = fmaf(scaled * scaled, t.one_minus_beta2, v[j] * t.beta2);
      const float denom = fmaf(sqrtf(v[j]), t.denom_scale, t.eps);
      w[j] = fmaf(-t.step_size, m[j] / denom, w[j] * t.decay);
    }
    store_floats(exp_avg, columns, m);
    store_floats(exp_avg_sq, columns, v);
    store_floats(value, columns, w);
    if (t.master) store_floats(param, columns, w);
  }
}

struct SquaresOperands {
  const void* data[kTensors];
  int64_t count[kTensors];
  DType dtype[kTensors];
  Pieces pieces;
  float* sums;
};

__global__ void __launch_bounds__(kThreads) squared_norms_kernel(const __grid_constant__ SquaresOperands o) {
  const int tensor = o.pieces.tensor_of(blockIdx.x);
  const int64_t first = o.pieces.first_of(tensor, blockIdx.x);
  const RowPointer grad = piece_of(o.data[tensor], o.dtype[tensor], first, o.count[tensor]);
  float sum[1] = {0};
#pragma unroll 4
  for (int index = thread() * kEight; index < grad.C; index += kThreads * kEight) {
    float g[kEight];
    load_floats(grad, index, 0.0f, g);
#pragma unroll
    for (int j = 0; j < kEight; ++j) sum[0] = fmaf(g[j], g[j], sum[0]);
  }
  RowSum<false, kThreads, 1> block_sum;
  block_sum(sum);
  if (thread() == 0) o.sums[blockIdx.x] = sum[0];
}

constexpr int kFinishThreads = 1024;

// One block: numbers[0] and [1] from the pieces' sums, as clip_norm() says.
__global__ void __launch_bounds__(kFinishThreads)
    finish_norm_kernel(float* numbers, const float* sums, int64_t pieces, double grad_scale, double max_norm) {
  __shared__ double parts[kFinishThreads];
  double sum = 0;
  for (int64_t i = thread(); i < pieces; i += kFinishThreads) sum += static_cast<double>(sums[i]);
  parts[thread()] = sum;
  __syncthreads();
  for (int width = kFinishThreads / 2; width > 0; width /= 2) {
    if (thread() < width) parts[thread()] += parts[thread() + width];
    __syncthreads();
  }
  if (thread() != 0) return;
  const double norm = fabs(grad_scale) * sqrt(parts[0]), ratio = max_norm / (norm + 1e-6);
  const bool clips = !(ratio >= 1) && max_norm <= kMostFinite;
  numbers[0] = static_cast<float>(norm);
  numbers[1] = static_cast<float>(clips ? grad_scale * ratio : grad_scale);
}

}  // namespace

void adamw_step_sm80(const CudaAdamWParams& params, const Stream& stream) {
  const AdamWParams& p = params.step;
  for (int64_t begin = 0; begin < p.tensor_count; begin += kTensors) {
    StepOperands o{};
    o.grad_scale = p.grad_scale;
    o.more_scale = params.grad_scale;
    int64_t blocks = 0;
    for (int64_t i = begin; i < p.tensor_count && i < begin + kTensors; ++i) {
      o.tensors[o.pieces.count] = p.tensors[i];
      blocks = o.pieces.add(p.tensors[i].count);
    }
    if (blocks > 0) launch(stream, Grid{static_cast<unsigned>(blocks)}, kThreads, 0, adamw_kernel, o);
  }
}

void clip_norm_sm80(const ClipParams& p, const Stream& stream) {
  float* sums = p.sums;
  for (int64_t begin = 0; begin < p.count; begin += kTensors) {
    SquaresOperands o{};
    o.sums = sums;
    int64_t blocks = 0;
    for (int64_t i = begin; i < p.count && i < begin + kTensors; ++i) {
      const int k = o.pieces.count;
      o.data[k] = p.grads[i].data;
      o.count[k] = p.grads[i].numel();
      o.dtype[k] = p.grads[i].dtype;
      blocks = o.pieces.add(o.count[k]);
    }
    if (blocks > 0) launch(stream, Grid{static_cast<unsigned>(blocks)}, kThreads, 0, squared_norms_kernel, o);
    sums += blocks;
  }
  launch(stream, Grid{1}, kFinishThreads, 0, finish_norm_kernel, p.numbers, p.sums, p.pieces, p.grad_scale, p.max_norm);
}

}  // namespace llmfast::cuda
