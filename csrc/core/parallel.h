// Threads. One pool: the OpenMP runtime that torch has loaded, so torch.set_num_threads governs both.
// Header for every target: only internal linkage, nothing but <cstdint> and OpenMP.
#pragma once
#include <omp.h>

#include <cstdint>

namespace llmfast {

struct Range {
  int64_t begin, end;
};

namespace {

// The `part`-th of `parts` nearly equal slices of [0, total), cut at multiples of `grain`.
inline Range slice(int64_t total, int64_t part, int64_t parts, int64_t grain = 1) {
  const int64_t blocks = (total + grain - 1) / grain;
  const int64_t begin = blocks * part / parts * grain, end = blocks * (part + 1) / parts * grain;
  return {begin < total ? begin : total, end < total ? end : total};
}

// Threads worth waking for `work` units when each should get at least `grain`.
inline int threads_for(int64_t work, int64_t grain) {
  const int64_t useful = work / (grain > 0 ? grain : 1);
  const int64_t available = omp_in_parallel() ? 1 : omp_get_max_threads();
  return static_cast<int>(useful < 1 ? 1 : useful < available ? useful : available);
}

// Runs body(part) for each part of [0, threads), a thread each. Where OpenMP gives fewer threads than it is asked for, as
// OMP_THREAD_LIMIT and OMP_DYNAMIC make it, some run several.
template <class Body>
inline void for_each_part(int threads, const Body& body) {
  if (threads == 1) return body(0);
#pragma omp parallel num_threads(threads)
  for (int part = omp_get_thread_num(); part < threads; part += omp_get_num_threads()) body(part);
}

// Runs body(begin, end) over slices of [0, total): one contiguous slice a thread, so a result that is accumulated per
// thread depends on the thread count alone. `grain`: least units per thread.
template <class Body>
inline void parallel_for(int64_t total, int64_t grain, const Body& body) {
  const int threads = threads_for(total, grain);
  if (threads == 1) {
    if (total > 0) body(int64_t{0}, total);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const Range range = slice(total, omp_get_thread_num(), omp_get_num_threads());
    if (range.begin < range.end) body(range.begin, range.end);
  }
}

}  // namespace
}  // namespace llmfast
