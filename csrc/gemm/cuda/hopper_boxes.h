// Finished tiles out of shared memory by the bulk copy engine: 64 x 64 boxes of 16-bit elements.
//
// An epilogue of boxes has kSlabs, the slabs of shared memory that a warpgroup needs, and
//   void box(float (&x)[32], int m, int n, Slabs<kSlabs, kRead>& slabs) const
// called by a warpgroup for its accumulators of 64 rows from m on and 64 columns from n on, laid out as
// warpgroup_product leaves them. Boxes beyond C's edges are not stored. An epilogue of rows has kRows and
//   template <int kN> void rows(float (&x)[kN / 2], int m, int n) const
// called for 64 rows and all columns of a tile. A paired epilogue of boxes has kPaired, too, and box(first, second, m,
// n, slabs): its B is two matrices [N, K], whose products with A come together.
//
// What an epilogue of boxes reads comes ahead of it. With kRead, const TensorMap* read(int) names that many matrices
// [M, N]: the engine brings their boxes while the tile's products run, slabs.load(i) reads the current ones, and
// slabs.release() gives them back. With kBias, `bias` [N] or null and N: a tile's part is in shared memory when the
// products end. With kPingPong, or kRead, tiles are taken in turns (ping-pong): for epilogues with much arithmetic.
#pragma once
#include "core/tensor_map.h"
#include "gemm/cuda/epilogue.h"
#include "gemm/cuda/hopper_mainloop.h"
#include "ptx/barrier.h"
#include "ptx/bulk_copy.h"
#include "ptx/mbarrier.h"

namespace llmfast::cuda {

// What stands for an epilogue on Hopper: visit(epilogue, shape, body) calls body with it. By default itself.
template <class Epilogue>
struct OnHopper {
  template <class Body>
  static void visit(const Epilogue& epilogue, GemmShape, const Body& body) {
    body(epilogue);
  }
};

template <class Epilogue, class = void>
struct SlabsOf {
  static constexpr int kCount = 0;
};
template <class Epilogue>
struct SlabsOf<Epilogue, std::enable_if_t<(Epilogue::kSlabs > 0)>> {
  static constexpr int kCount = Epilogue::kSlabs;
};

template <class Epilogue, class = void>
struct IsOfRows {
  static constexpr bool kHolds = false;
};
template <class Epilogue>
struct IsOfRows<Epilogue, std::enable_if_t<Epilogue::kRows>> {
  static constexpr bool kHolds = true;
};

template <class Epilogue, class = void>
struct IsPaired {
  static constexpr bool kHolds = false;
};
template <class Epilogue>
struct IsPaired<Epilogue, std::enable_if_t<Epilogue::kPaired>> {
  static constexpr bool kHolds = true;
};

template <class Epilogue, class = void>
struct ReadBoxes {
  static constexpr int kCount = 0;
};
template <class Epilogue>
struct ReadBoxes<Epilogue, std::enable_if_t<(Epilogue::kRead > 0)>> {
  static constexpr int kCount = Epilogue::kRead;
};

template <class Epilogue, class = void>
struct HasBias {
  static constexpr bool kHolds = false;
};
template <class Epilogue>
struct HasBias<Epilogue, std::enable_if_t<Epilogue::kBias>> {
  static constexpr bool kHolds = true;
};

template <class Epilogue, class = void>
struct WantsPingPong {
  static constexpr bool kHolds = false;
};
template <class Epilogue>
struct WantsPingPong<Epilogue, std::enable_if_t<Epilogue::kPingPong>> {
  static constexpr bool kHolds = true;
};

// Whether tiles may be narrow where rows are few (hopper_plan): their epilogue is then the portable one, by columns.
template <class Epilogue>
struct MayBeNarrow {
  static constexpr bool kHolds = false;
};
template <class T>
struct MayBeNarrow<StoreEpilogue<T, T>> {
  static constexpr bool kHolds = true;
};

// Neighbouring columns of a box in one register: pairs[i] is x[2 i] and x[2 i + 1].
template <class T>
__device__ __forceinline__ void pack_box(uint32_t (&pairs)[16], const float (&x)[32]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) pairs[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
}

// The shared memory of one warpgroup's epilogue: a ring of slabs for what it stores, a ring of kRead slabs a place for
// what it reads, a tile's part of the bias or three warps' sums of a box's columns. The warpgroup's first thread deals
// with the copy engine.
template <int kSlabs, int kRead>
struct EpilogueMemory {
  static constexpr int kPlaces = kRead > 0 ? 4 / kRead : 0;  // of what is read; four boxes are a tile of 128 x 128
  static constexpr int kBiasColumns = 256;
  static constexpr int kScratchBytes = kRead > 0 ? 3 * 64 * 4 : kBiasColumns * 2;  // sums of columns, or the bias
  static constexpr int kSlabsBytes = (kSlabs + kPlaces * kRead) * kSlabBytes;  // multiples of 1024, at `slabs`
  static constexpr int kOtherBytes = kScratchBytes + kPlaces * 16;                 // at `others`
  uint32_t slabs, others;

  __device__ uint32_t read(int place, int which) const {
    return slabs + (kSlabs + place * kRead + which) * kSlabBytes;
  }
  __device__ uint32_t full(int place) const { return others + kScratchBytes + place * 8; }
  __device__ uint32_t empty(int place) const { return others + kScratchBytes + (kPlaces + place) * 8; }
  __device__ void init() const {
    for (int i = 0; i < kPlaces; ++i) mbarrier_init(full(i), 1), mbarrier_init(empty(i), 1);
  }
};

template <int kSlabs, int kRead = 0>
class Slabs {
 public:
  __device__ Slabs(const EpilogueMemory<kSlabs, kRead>& memory, int barrier) : memory_(memory), barrier_(barrier) {}

  // x, rounded to T, to the box of `map` at (m, n).
  template <class T>
  __device__ __forceinline__ void store(const TensorMap* map, const float (&x)[32], int m, int n) {
    uint32_t pairs[16];
    pack_box<T>(pairs, x);
    store(map, pairs, m, n);
  }
  __device__ __forceinline__ void store(const TensorMap* map, const uint32_t (&pairs)[16], int m, int n) {
    if (leads()) bulk_wait_read<kSlabs - 1>();
    barrier_sync(barrier_, 128);
    const uint32_t slab = memory_.slabs + next_ * kSlabBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      stmatrix_x4(slab + chunk_of(i), {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]});
    fence_async_proxy();
    barrier_sync(barrier_, 128);
    if (leads()) {
      bulk_store(map, slab, n, m);
      bulk_commit();
    }
    next_ = next_ + 1 == kSlabs ? 0 : next_ + 1;
  }
  __device__ void finish() const {
    if (leads()) bulk_wait<0>();
  }

  // The current box of each matrix that is read, in the accumulators' layout; zeros beyond the edges.
  __device__ __forceinline__ void await() const { mbarrier_wait(memory_.full(place_.stage), place_.parity); }
  __device__ __forceinline__ void load(uint32_t (&pairs)[16], int which) const {
    const uint32_t slab = memory_.read(place_.stage, which);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t four[4];
      ldmatrix_x4(four, slab + chunk_of(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[4 * i + j] = four[j];
    }
  }
  // After a store() that follows the loads: its fence and barrier order them before the engine's next write.
  __device__ __forceinline__ void release() {
    if (leads()) mbarrier_arrive(memory_.empty(place_.stage));
    place_.advance();
  }

  // Sums over the 64 rows of a box: share_sums() before a store(), write_sums() between that and the next one, whose
  // barriers order them. A lane keeps two columns; the first warp adds the others' and writes to[m / 64][n ...].
  __device__ __forceinline__ float2 share_sums(const float (&x)[32]) const {
    float sums[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i] = x[i / 2 * 4 + i % 2] + x[i / 2 * 4 + 2 + i % 2];
    halve<16>(sums);
    halve<8>(sums);
    halve<4>(sums);
    if (warp() % 4 > 0) {
      store_shared(sums_of(warp() % 4 - 1), __float_as_uint(sums[0]));
      store_shared(sums_of(warp() % 4 - 1) + 4, __float_as_uint(sums[1]));
    }
    return make_float2(sums[0], sums[1]);
  }
  __device__ __forceinline__ void write_sums(float2 own, float* to, int m, int n, int64_t M, int64_t N) const {
    if (warp() % 4 > 0) return;
#pragma unroll
    for (int other = 0; other < 3; ++other) {
      own.x += __uint_as_float(load_shared_word(sums_of(other)));
      own.y += __uint_as_float(load_shared_word(sums_of(other) + 4));
    }
    const int64_t column = n + sum_column();
    if (m < M && column < N) llmfast::cuda::store(to + m / 64 * N + column, own);
  }

  // A tile's bias, two columns a thread: own_bias() starts the loads, hold_bias() shares what came. Each is called once
  // a tile, before its boxes, by the whole warpgroup.
  struct Bias {
    uint32_t low, high;
  };
  template <class T>
  __device__ __forceinline__ static Bias own_bias(const T* bias, int n, int columns, int64_t N) {
    const int mine = static_cast<int>(thread() % 128) * 2;
    const int64_t at = n + mine;
    return {mine < columns && at < N ? bias[at].bits : 0u, mine < columns && at + 1 < N ? bias[at + 1].bits : 0u};
  }
  __device__ __forceinline__ void hold_bias(Bias pair, int n) const {
    barrier_sync(barrier_, 128);  // the tile before has read its own
    store_shared(bias_at(n + static_cast<int>(thread() % 128) * 2), pair.low | pair.high << 16);
    barrier_sync(barrier_, 128);
  }
  template <class T>
  __device__ __forceinline__ void add_bias(float (&x)[32], int n) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float low, high;
      unpack_pair<T>(load_shared_word(bias_at(n + 8 * j + lane() % 4 * 2)), low, high);
      x[4 * j] += low, x[4 * j + 2] += low;
      x[4 * j + 1] += high, x[4 * j + 3] += high;
    }
  }

 private:
  __device__ static bool leads() { return thread() % 128 == 0; }
  // Byte of a slab at which this lane's row of the i-th four 8 x 8 matrices starts.
  __device__ static int chunk_of(int i) {
    return chunk_offset<64>(warp() % 4 * 16 + lane() % 16, 2 * i + lane() / 16);
  }
  // Of kBit sums, the lanes with that bit keep the upper half, added to their partners' own.
  template <int kBit>
  __device__ __forceinline__ static void halve(float (&sums)[16]) {
    const bool upper = lane() & kBit;
#pragma unroll
    for (int i = 0; i < kBit / 2; ++i) {
      const float mine = upper ? sums[kBit / 2 + i] : sums[i], others = upper ? sums[i] : sums[kBit / 2 + i];
      sums[i] = mine + __shfl_xor_sync(kAllLanes, others, kBit);
    }
  }
  // The first of the two columns of a box whose sums this lane keeps.
  __device__ static int sum_column() { return lane() / 4 * 8 + lane() % 4 * 2; }
  __device__ uint32_t sums_of(int which) const { return memory_.others + (which * 64 + sum_column()) * 4; }
  __device__ uint32_t bias_at(int n) const { return memory_.others + n % memory_.kBiasColumns * 2; }

  EpilogueMemory<kSlabs, kRead> memory_;
  int barrier_, next_ = 0;
  RingPlace<EpilogueMemory<kSlabs, kRead>::kPlaces> place_;
};

inline MappedTensor mapped_boxes(const void* data, DType dtype, int64_t ld, GemmShape shape) {
  return {data, dtype, 2, {shape.N, shape.M}, {1, shape.M == 1 ? ceil_div(shape.N, kChunk) * kChunk : ld}, {64, 64},
          Swizzle::bytes128};
}
template <class T>
constexpr DType half_dtype() {
  return std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
}

// C = acc + addend in float32; a quad of lanes writes 32 bytes. All of the addend is asked for before anything is
// stored: it may be C, so that the compiler could not take a load ahead of a store.
struct FloatRows {
  static constexpr bool kRows = true;
  float* c;
  int64_t ldc;
  const float* addend;  // or null
  int64_t ld_addend, M, N;

  template <int kN>
  __device__ __forceinline__ void rows(float (&acc)[kN / 2], int m, int n) const {
    const int64_t row = m + warp() % 4 * 16 + lane() / 4;
    const int col = n + lane() % 4 * 2;
    const bool pairs = (ldc | ld_addend) % 2 == 0 && N - n >= kN;
    if (addend)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (row + half * 8 < M) add<kN>(acc, addend + (row + half * 8) * ld_addend + col, half, pairs, N - col);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (row + half * 8 < M) write<kN>(acc, c + (row + half * 8) * ldc + col, half, pairs, N - col);
  }

 private:
  template <int kN>
  __device__ __forceinline__ static void add(float (&acc)[kN / 2], const float* from, int half, bool pairs,
                                             int64_t left) {
    if (pairs) {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const float2 more = load<float2>(from + 8 * j);
        acc[4 * j + 2 * half] += more.x, acc[4 * j + 2 * half + 1] += more.y;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        if (8 * j < left) acc[4 * j + 2 * half] += from[8 * j];
        if (8 * j + 1 < left) acc[4 * j + 2 * half + 1] += from[8 * j + 1];
      }
    }
  }
  template <int kN>
  __device__ __forceinline__ static void write(const float (&acc)[kN / 2], float* to, int half, bool pairs,
                                               int64_t left) {
    if (pairs) {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
        store(to + 8 * j, make_float2(acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]));
    } else {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        if (8 * j < left) to[8 * j] = acc[4 * j + 2 * half];
        if (8 * j + 1 < left) to[8 * j + 1] = acc[4 * j + 2 * half + 1];
      }
    }
  }
};

template <class T>
struct OnHopper<StoreEpilogue<T, float>> {  // without bias
  template <class Body>
  static void visit(const StoreEpilogue<T, float>& e, GemmShape shape, const Body& body) {
    body(FloatRows{e.c, e.ldc, e.addend, e.ld_addend, shape.M, shape.N});
  }
};

// x += addend's box.
__device__ __forceinline__ void add_floats(float (&x)[32], const float* addend, int64_t ld, int m, int n, int64_t M,
                                           int64_t N) {
  const int row = m + warp() % 4 * 16 + lane() / 4, col = n + lane() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int64_t at = row + i % 2 * 8, right = col + i / 2 * 8;
    if (at >= M) continue;
    if (right < N) x[2 * i] += addend[at * ld + right];
    if (right + 1 < N) x[2 * i + 1] += addend[at * ld + right + 1];
  }
}

// A box element by element.
template <class T>
__device__ __forceinline__ void store_floats(T* c, const float (&x)[32], int64_t ld, int m, int n, int64_t M,
                                             int64_t N) {
  const int row = m + warp() % 4 * 16 + lane() / 4, col = n + lane() % 4 * 2;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int64_t at = row + i % 2 * 8, right = col + i / 2 * 8;
    if (at >= M) continue;
    if (right < N) c[at * ld + right] = from_float<T>(x[2 * i]);
    if (right + 1 < N) c[at * ld + right + 1] = from_float<T>(x[2 * i + 1]);
  }
}

template <class T>
struct BoxStoreEpilogue {
  static constexpr int kSlabs = 2;
  static constexpr bool kBias = true;
  TensorMap c;
  T* unmapped;  // c where the copy engine cannot address it, or null
  int64_t ldc;
  const T* bias;        // or null
  const float* addend;  // or null
  int64_t ld_addend, M, N;

  __device__ __forceinline__ void box(float (&x)[32], int m, int n, Slabs<kSlabs>& slabs) const {
    if (bias) slabs.template add_bias<T>(x, n);
    if (addend) add_floats(x, addend, ld_addend, m, n, M, N);
    if (unmapped) store_floats(unmapped, x, ldc, m, n, M, N);
    else slabs.store<T>(&c, x, m, n);
  }
};

template <class T>
struct OnHopper<StoreEpilogue<T, T>> {
  static BoxStoreEpilogue<T> make(const StoreEpilogue<T>& e, GemmShape shape) {
    const MappedTensor c = mapped_boxes(e.c, half_dtype<T>(), e.ldc, shape);
    const bool mapped = can_map(c);
    return {mapped ? make_tensor_map(c) : TensorMap{}, mapped ? nullptr : e.c, e.ldc,  e.bias, e.addend, e.ld_addend,
            shape.M,                                   shape.N};
  }
  template <class Body>
  static void visit(const StoreEpilogue<T>& e, GemmShape shape, const Body& body) {
    body(make(e, shape));
  }
};

}  // namespace llmfast::cuda
