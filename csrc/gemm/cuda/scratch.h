// Pieces of the workspace that Python allocates. Without a base it only counts, so that one description of what an op
// needs serves both the question how much and the carving.
#pragma once
#include <cstdint>

namespace llmfast::cuda {

class Scratch {
 public:
  explicit Scratch(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* const piece = base_ ? base_ + bytes_ : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(piece);
  }
  int64_t floats() const { return bytes_ / 4; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace llmfast::cuda
