// Blocks of the Hopper backward that work on one tile after another, of keys or of queries: how work and tiles go from
// the thread that asks for copies to the warps that inspect and to those that compute.
//
// Barriers: posted, taken (of a place for work), own_full, own_empty (the block's own rows), and for each stage of the
// ring full (its tiles have come), inspected (rows that might spoil sums are zero) and empty.
#pragma once
#include "attention/cuda/hopper_backward.h"
#include "attention/cuda/hopper_backward_mask.h"

namespace llmfast::cuda {

static_assert(kClassRows == kOwnRows, "a block's rows are one class of tiles");

// A tile of the ring, posted with it.
struct alignas(16) RingStep {
  int first, head;  // its first token, and of which query head
  bool changed;     // by the mask
  bool inspects;    // its rows
};

// RingPlace in one register: how often it advanced.
template <int kStages>
struct CountedPlace {
  uint32_t count = 0;
  __device__ int stage() const { return static_cast<int>(count % kStages); }
  __device__ int parity() const { return static_cast<int>(count / kStages % 2); }
  __device__ void advance() { ++count; }
};

// Which work comes next, for the one thread that asks: from a counter that all blocks share, fetched while the work
// before is under way, or, without a counter, the block's own index alone.
struct Tickets {
  int* counter;
  int total, next;

  __device__ Tickets(int* counter, int total)
      : counter(counter), total(total), next(counter ? atomicAdd(counter, 1) : static_cast<int>(blockIdx.x)) {}
  __device__ int take() {  // total or more: none is left
    const int now = next;
    next = counter ? atomicAdd(counter, 1) : total;
    return now;
  }
};

// Shared memory behind kTileBytes of tiles; Work has `none` (no work is left) and `steps`.
template <class Work, int kStages_, int kTileBytes>
struct RingLayout {
  static constexpr int kStages = kStages_, kInspectors = 3;
  static constexpr int kWorkAt = kTileBytes, kWorkBytes = 128, kStepsAt = kWorkAt + 2 * kWorkBytes;
  static constexpr int kScratchAt = kStepsAt + kStages * static_cast<int>(sizeof(RingStep));
  static constexpr int kBarriersAt = kScratchAt + kScratchBytes;
  static constexpr int kBarriers = 6 + 3 * kStages, kBytes = kBarriersAt + 8 * kBarriers + kSharedAlignment;
  static_assert(kBytes <= 232448 && sizeof(Work) <= kWorkBytes);

  char* bytes;
  uint32_t base;
  __device__ Work& work(int place) const { return *reinterpret_cast<Work*>(bytes + kWorkAt + place * kWorkBytes); }
  __device__ RingStep& step(int stage) const { return reinterpret_cast<RingStep*>(bytes + kStepsAt)[stage]; }
  __device__ uint32_t scratch() const { return base + kScratchAt; }
  __device__ uint32_t barrier(int i) const { return base + kBarriersAt + 8 * i; }
  __device__ uint32_t posted(int place) const { return barrier(place); }
  __device__ uint32_t taken(int place) const { return barrier(2 + place); }
  __device__ uint32_t own_full() const { return barrier(4); }
  __device__ uint32_t own_empty() const { return barrier(5); }
  __device__ uint32_t full(int stage) const { return barrier(6 + stage); }
  __device__ uint32_t inspected(int stage) const { return barrier(6 + kStages + stage); }
  __device__ uint32_t empty(int stage) const { return barrier(6 + 2 * kStages + stage); }

  __device__ void initialise_barriers() const {
    for (int place = 0; place < 2; ++place) {
      mbarrier_init(posted(place), 1);
      mbarrier_init(taken(place), kConsumerWarps + kInspectors);
    }
    mbarrier_init(own_full(), 1);
    mbarrier_init(own_empty(), kConsumerWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(inspected(stage), kInspectors);
      mbarrier_init(empty(stage), kConsumerWarps + kInspectors);
    }
    mbarrier_init_fence();
  }
};

// The one thread that asks for copies. of(ticket): the work; load(work, place): asks for its own rows and its tiles.
template <class Layout, class Of, class Load>
__device__ __forceinline__ void hand_out(Layout shared, int* counter, int total, const Of& of, const Load& load) {
  Tickets tickets(counter, total);
  RingPlace<Layout::kStages> place;
  RingPlace<2> post;
  int own_parity = 1;
  for (bool none = false; !none;) {
    const int ticket = tickets.take();
    none = ticket >= total;
    const auto w = of(none ? 0 : ticket);
    if (!none && w.nothing()) continue;
    mbarrier_wait(shared.taken(post.stage), post.parity ^ 1);
    shared.work(post.stage) = w;
    shared.work(post.stage).none = none;
    mbarrier_arrive(shared.posted(post.stage));
    post.advance();
    if (none || w.steps == 0) continue;
    mbarrier_wait(shared.own_empty(), own_parity);
    own_parity ^= 1;
    load(w, place);
  }
}

// A warp that inspects. clear(stage): makes rows that might spoil sums zeros.
template <class Layout, class Clear>
__device__ __forceinline__ void inspect_tiles(Layout shared, const Clear& clear) {
  RingPlace<Layout::kStages> place;
  for (RingPlace<2> post;; post.advance()) {
    mbarrier_wait(shared.posted(post.stage), post.parity);
    const bool none = shared.work(post.stage).none;
    const int steps = shared.work(post.stage).steps;
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(shared.taken(post.stage));
    if (none) return;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, place.advance()) {
      mbarrier_wait(shared.full(place.stage), place.parity);
      const bool inspects = shared.step(place.stage).inspects;
      if (inspects) clear(place.stage);
      __syncwarp();
      if (lane() == 0) {
        if (inspects) mbarrier_arrive(shared.inspected(place.stage));
        mbarrier_arrive(shared.empty(place.stage));
      }
    }
  }
}

}  // namespace llmfast::cuda
