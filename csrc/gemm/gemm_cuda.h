// Checks that the GPU's tables of linear, ffn and cross-entropy share.
#pragma once
#include "core/check.h"

namespace llmfast {

inline void require_sizes_for_gpu(std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    require(size <= 0x7fff0000, "a tensor has too many rows or columns for a GPU kernel");
}

inline void require_workspace(const TensorView& workspace, int64_t floats) {
  if (floats == 0) return;
  require_dtype(workspace, "workspace", DType::f32);
  require_contiguous(workspace, "workspace");
  require(workspace.defined && workspace.numel() >= floats, "workspace: too small");
}

inline void require_same_dtype(const TensorView& t, const char* name, DType dtype) {
  if (t.defined) require_dtype(t, name, dtype);
}

}  // namespace llmfast
