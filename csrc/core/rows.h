// The vectors along the last dimension of a strided tensor, numbered in row-major order of the leading dimensions.
// Header for every target: only internal linkage, nothing but <cstdint>.
#pragma once
#include <cstdint>

#include "core/types.h"

namespace llmfast {
namespace {

struct Rows {
  int64_t count = 1;  // rows in all
  int dims = 0;       // leading dimensions that remain after joining those that one stride can walk
  int64_t size[kMaxDims], stride[kMaxDims];

  Rows(const TensorView& t, int leading) {
    for (int i = 0; i < leading; ++i) {
      count *= t.shape[i];
      if (t.shape[i] == 1) continue;
      if (dims > 0 && stride[dims - 1] == t.shape[i] * t.stride[i]) {
        size[dims - 1] *= t.shape[i];
        stride[dims - 1] = t.stride[i];
      } else {
        size[dims] = t.shape[i];
        stride[dims++] = t.stride[i];
      }
    }
  }

  // Elements from the tensor's start to row `row`.
  int64_t offset(int64_t row) const {
    if (dims == 0) return 0;
    int64_t elements = 0;
    for (int i = dims - 1; i > 0; --i) {
      elements += row % size[i] * stride[i];
      row /= size[i];
    }
    return elements + row * stride[0];
  }
};

// The same for a tensor whose dtype is known only at run time; every row of an undefined tensor is nullptr.
struct RowPointers {
  char* data;
  int64_t element_bytes;
  Rows rows;

  explicit RowPointers(const TensorView& t)
      : data(t.as<char>()), element_bytes(size_of(t.dtype)), rows(t, t.defined ? t.ndim - 1 : 0) {}
  void* row(int64_t index) const { return data ? data + rows.offset(index) * element_bytes : nullptr; }
};

}  // namespace
}  // namespace llmfast
