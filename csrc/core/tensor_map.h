// Tensor maps: what the bulk copy engine of compute capability 9.0 must know of a tensor in global memory to copy boxes
// of it to and from shared memory, zero-filled beyond the tensor's edges. Made on the host, passed to kernels by value as
// `const __grid_constant__ TensorMap`. No CUDA header: also for plain C++ files.
#pragma once
#include <cstdint>

#include "core/types.h"

namespace llmfast {

// How 16-byte chunks of a box lie in shared memory: chunk index ^= row % 8 in rows of 128 bytes, and likewise in
// narrower rows. The box's address is a multiple of 1024 bytes (128), 512 (64).
enum class Swizzle : int { none = 0, bytes32 = 32, bytes64 = 64, bytes128 = 128 };

// The tensor that a map describes, innermost dimension first. stride[0] is 1.
struct MappedTensor {
  const void* data;
  DType dtype;
  int dims;           // 2 to 5
  int64_t size[5];    // elements
  int64_t stride[5];  // elements
  int box[5];         // elements, at most 256 each; box[0] fills no more than a row of the swizzle
  Swizzle swizzle;
};

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// Whether the engine can address the tensor: 16-byte address and strides, sizes below 2^32. Empty tensors it cannot.
inline bool can_map(const MappedTensor& t) {
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0 || t.stride[0] != 1) return false;
  for (int i = 0; i < t.dims; ++i) {
    if (t.size[i] < 1 || t.size[i] > int64_t{0xffffffff}) return false;
    const int64_t bytes = t.stride[i] * size_of(t.dtype);
    if (i > 0 && (bytes <= 0 || bytes % 16 != 0 || bytes >= int64_t{1} << 40)) return false;
  }
  return true;
}

TensorMap make_tensor_map(const MappedTensor& tensor);  // throws CudaError

}  // namespace llmfast
