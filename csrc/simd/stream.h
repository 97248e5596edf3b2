// Stores that may go around the caches, for outputs larger than the caches: nobody finds them there anyway, and a store
// around them does not read the line first. Whoever streams ends with streamed_stores_done().
#pragma once
#include "gemm/epilogue.h"

namespace llmfast::LLMFAST_TARGET {

// Outputs of one call beyond this many bytes are streamed.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

template <class T>
inline void put(Vec v, T* p, AllLanes, bool stream) {
  if (stream) {
    v.stream(p);
  } else {
    v.store(p);
  }
}
template <class T>
inline void put(Vec v, T* p, FirstLanes lanes, bool) {
  lanes.store(v, p);
}

// Whether every row of the contiguous tensor t may be written with Vec::stream.
inline bool streamable(const TensorView& t, int64_t C) {
  const uintptr_t register_bytes = Vec::kLanes * size_of(t.dtype);
  return C % Vec::kLanes == 0 && reinterpret_cast<uintptr_t>(t.data) % register_bytes == 0;
}

// Orders this thread's streamed stores before whatever it tells other threads next.
inline void streamed_stores_done() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

}  // namespace llmfast::LLMFAST_TARGET
