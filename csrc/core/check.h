// Argument checks of the native boundary. The Python ops check first, with the user's words; these guard memory.
#pragma once
#include <stdexcept>
#include <string>

#include "core/types.h"

namespace llmfast {

// Throws std::invalid_argument, which Python sees as ValueError.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

std::string describe(const TensorView& tensor);  // "float32[4, 8] strides [8, 1]"

void require_shape(const TensorView& tensor, const char* name, std::initializer_list<int64_t> shape);
void require_contiguous(const TensorView& tensor, const char* name);
void require_dtype(const TensorView& tensor, const char* name, DType dtype);
void require_floating(const TensorView& tensor, const char* name);

}  // namespace llmfast
