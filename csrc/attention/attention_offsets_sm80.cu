// int32 token offsets of packed sequences as int64, in which kernels read them: wide[0, :] = q, wide[1, :] = k. One launch
// ahead of the kernel costs the host less than two conversions by torch.
#include "attention/attention_cuda.h"
#include "core/cuda_launch.h"

namespace llmfast::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) widen_offsets_kernel(const int32_t* q, const int32_t* k, int64_t* wide,
                                                                 int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  wide[i] = q[i];
  wide[count + i] = k[i];
}

}  // namespace

void widen_offsets(const TensorView& q, const TensorView& k, const TensorView& wide, const Stream& stream) {
  const OnDevice current(stream.device);
  const int64_t count = q.shape[0];
  launch(stream, {static_cast<unsigned>((count + kThreads - 1) / kThreads)}, kThreads, 0, widen_offsets_kernel,
         q.as<const int32_t>(), k.as<const int32_t>(), wide.as<int64_t>(), count);
}

}  // namespace llmfast::cuda
