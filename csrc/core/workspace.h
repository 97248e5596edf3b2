// Scratch memory: grow-only, 64-byte aligned buffers, one per (thread, slot). Kernels get pointers, they never allocate;
// reuse keeps the pages mapped, which on glibc saves a page fault per 4 KiB and call (large blocks go back to the kernel
// on every free).
#pragma once
#include <cstddef>

namespace llmfast {

enum class Slot : int {
  packed_a,
  packed_b,
  tile,        // accumulator tiles of the GEMM
  staging,     // rows on their way out
  hidden,      // FFN hidden block, cross-entropy logits chunk
  attention_k,
  attention_v,
  attention_q,
  attention_score,
  attention_acc,
  reduction,   // per-thread partial sums
  norm_vectors,  // weight and bias in float32
  norm_row,
  embedding_order,  // positions of the input, sorted by id
  block,       // a transformer block's intermediates
  count
};

void* workspace_bytes(Slot slot, size_t bytes);  // of the calling thread; contents undefined
size_t workspace_total_bytes();                  // of all threads, for reports

// Inlined always, also where little is optimised: a function of its own would be compiled with the instructions of whatever
// target calls it, and the linker picks one for all.
template <class T>
__attribute__((always_inline)) inline T* workspace(Slot slot, size_t count) {
  return static_cast<T*>(workspace_bytes(slot, count * sizeof(T)));
}

}  // namespace llmfast
