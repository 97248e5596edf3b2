// Masked attention, forward, on Hopper's tensor cores (bf16, fp16); see attention.h for the formula.
#include "attention/attention_cuda.h"
#include "attention/cuda/hopper_forward_kernel.h"

namespace llmfast::cuda {
namespace {

using Tile64 = HopperForwardTile<64, 2, 128, 2, 2, true, Loop::overlapped, true, 40, 232>;
using Tile128 = HopperForwardTile<128, 2, 128, 2, 2, true, Loop::overlapped, true, 40, 232>;
using Tile256 = HopperForwardTile<256, 2, 80, 2, 2, false, Loop::simple, false, 40, 232>;

template <class T, class Tile>
void launch(const AttentionParams& p, const Stream& stream) {
  const int blocks = device_info(stream.device).multiprocessors;
  if (p.softcap > 0.0f || !(p.scale > 0.0f)) launch_hopper_forward<T, Tile, true>(p, stream, blocks);
  else launch_hopper_forward<T, Tile, false>(p, stream, blocks);
}

template <class T>
void forward(const AttentionParams& p, const Stream& stream) {
  const int64_t D = p.D > p.Dv ? p.D : p.Dv;
  if (D <= 64) launch<T, Tile64>(p, stream);
  else if (D <= 128) launch<T, Tile128>(p, stream);
  else launch<T, Tile256>(p, stream);
}

}  // namespace

bool attention_forward_sm90a_supports(const AttentionParams& p) {
  return !p.mask.data && HopperForwardTensors(p, 128, 80).fit(p);
}

void attention_forward_sm90a(const AttentionParams& p, const Stream& stream) {
  if (p.q.dtype == DType::bf16) forward<bf16>(p, stream);
  else forward<fp16>(p, stream);
}

}  // namespace llmfast::cuda
