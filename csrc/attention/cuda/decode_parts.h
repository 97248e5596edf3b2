// Into how many parts a decoding block's keys are cut. Host and device: tests check these against their limits.
#pragma once
#include "attention/cuda/tiles.h"
#include "gemm/cuda/schedule.h"

namespace llmfast::cuda {

// Keys [begin, end) are seen by some query; part i is the `length` from begin + i * length on, and none is empty.
struct KeyParts {
  int begin, end, length, count;
};

constexpr int kMostKeyParts = 2 * kFullDevice;

// Head dims that tiles have.
constexpr int decode_width(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

// At most so many parts of `keys` keys of each of the `items` key/value heads of all sequences; more keys never make
// fewer. `width` is that of Dv, so that D need not be known to size the workspace. A block has 96 KB under way (width
// 64) or 64 KB, and memory has 3 MB (4.3 TB/s, 700 ns): one or two blocks a multiprocessor are enough, and where there
// are as many items nothing is cut. Nor are keys and values that a block reads in less than twice the time that the
// second kernel takes.
constexpr int64_t most_parts(int64_t items, int64_t keys, int width) {
  constexpr int64_t kLeastCutBytes = 256 << 10, kLeastPartBytes = 64 << 10;
  const int64_t bytes = keys * width * 4, blocks = width <= 64 ? kFullDevice : 2 * kFullDevice;
  if (items < 1 || bytes < kLeastCutBytes) return 1;
  const int64_t wanted = blocks / items, most = bytes / kLeastPartBytes;
  const int64_t parts = wanted < most ? wanted : most;
  return parts < 1 ? 1 : parts;
}

inline KeyParts key_parts(int64_t items, Span seen, int width) {
  const int64_t keys = seen.empty() ? 0 : seen.end - seen.begin, step = width <= 64 ? 128 : 64;  // of a block
  const int64_t length = ceil_div(ceil_div(keys, most_parts(items, keys, width)), step) * step;
  return {seen.begin, seen.end, static_cast<int>(length), static_cast<int>(keys == 0 ? 1 : ceil_div(keys, length))};
}

}  // namespace llmfast::cuda
