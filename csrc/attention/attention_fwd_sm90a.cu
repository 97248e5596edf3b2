// Masked attention, forward, for compute capability 9.0 (bf16, fp16); see attention.h for the formula.
//
// A block works through tiles of 128 queries of one head, its share of all (ForwardOrder). Its warpgroups:
//   0: a warp that finds work and posts it, one that copies Q, K and V by the bulk copy engine, two that look for NaN
//   1, 2: consumers, 64 queries each, rows whole in one warpgroup. For the tiles of keys, from the last to the first:
//     S[64][keys] = Q K^T                                 wgmma, both operands in shared memory
//     softcap, mask tensor, band where a tile has something to hide
//     running maximum and sum, S -> P                     in registers, while P V of the tile before is under way
//     O[64][kD] = O * 2^(old maximum - new) + P V         P from registers: S's layout is that of a first operand
//   out = O / sum through shared memory, stored by the copy engine while the next tile begins; lse
// The consumers take turns in issuing products, so that one's softmax also runs under another's products.
// Only the tiles at the ends of a row's band may hide something: they alone pay for masks and for the search for NaN.
// A boolean mask of keys (padding) narrows the band, and holes in it count as such ends. With any other mask all tiles
// do; those that a boolean one hides from all rows of a warpgroup are passed by.
//
// Heads of any size up to 256 are padded with zeros by the copy engine. What it cannot address (a start or stride that
// is no multiple of 16 bytes) is for the portable kernel.
//
// Memory: kD 64: Q, out 16 KB each (24 with three consumers), 2 K, 2 V of 16 KB; 128: 32 KB each, 192 KB; 256: Q 64 KB,
// out in its place, 2 K, 2 V of 40 KB (80 keys), 224 KB. One block a multiprocessor.
// Registers (nvcc 13.0.88, sm_90a): 232 for a consumer, 160 for each of three. Spilled, stores and loads: 52 bytes with
// three consumers and 400 with 256 dims, little of it in the loop over keys; with a boolean mask 182 in the warp that
// finds work, and 640 with 256 dims; with anything else 440 with 256 dims.
//
// Measured 2026-11-26, H100 80GB HBM3, benchmarks/native/hopper_attention_forward.cu "time full-B4-T4k": 128 dims 689
// TFLOP/s, 64 dims 445 and 500 with three consumers, 256 dims 704. "time causal-B4-T4k", before ForwardOrder: 584, 385
// and 370, 574.
#include "attention/attention_cuda.h"
#include "attention/cuda/hopper_forward_kernel.h"

namespace llmfast::cuda {
namespace {

using Tile64 = HopperForwardTile<64, 2, 128, 2, 2, true, 40, 232>;
using Tile64Wide = HopperForwardTile<64, 3, 128, 2, 2, true, 32, 160>;
using Tile128 = HopperForwardTile<128, 2, 128, 2, 2, true, 40, 232>;
using Tile256 = HopperForwardTile<256, 2, 80, 2, 2, false, 40, 232>;

template <class T, class Tile>
void launch(const AttentionParams& p, const Stream& stream, int blocks) {
  switch (masking_of<Tile>(p)) {
    case Masking::band: return launch_hopper_forward<T, Tile, Masking::band>(p, stream, blocks);
    case Masking::boolean: return launch_hopper_forward<T, Tile, Masking::boolean>(p, stream, blocks);
    case Masking::anything: return launch_hopper_forward<T, Tile, Masking::anything>(p, stream, blocks);
  }
}

// Three consumers share a step's K and V, and their turns fill each other's gaps better, where rows see many keys and
// there are tiles enough.
bool takes_wide(const AttentionParams& p, int blocks) {
  const bool many_keys = !p.first_q && p.Tk >= 2048 && (p.left >= 2048 || p.right >= 2048);
  const bool many_tiles = p.B * p.Hq * (p.Tq / Tile64Wide::kRows) >= 3 * blocks;
  return many_keys && many_tiles && masking_of<Tile64Wide>(p) == Masking::band;
}

template <class T>
void forward(const AttentionParams& p, const Stream& stream) {
  const int64_t D = p.D > p.Dv ? p.D : p.Dv;
  const int blocks = device_info(stream.device).multiprocessors;
  if (D <= 64 && takes_wide(p, blocks)) launch_hopper_forward<T, Tile64Wide, Masking::band>(p, stream, blocks);
  else if (D <= 64) launch<T, Tile64>(p, stream, blocks);
  else if (D <= 128) launch<T, Tile128>(p, stream, blocks);
  else launch<T, Tile256>(p, stream, blocks);
}

}  // namespace

bool attention_forward_sm90a_supports(const AttentionParams& p) {  // any tile: addresses and strides decide
  return HopperForwardTensors(p, 128, 80).fit(p);
}

void attention_forward_sm90a(const AttentionParams& p, const Stream& stream) {
  if (p.q.dtype == DType::bf16) forward<bf16>(p, stream);
  else forward<fp16>(p, stream);
}

}  // namespace llmfast::cuda
