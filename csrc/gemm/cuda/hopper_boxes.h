// Finished tiles out of shared memory by the bulk copy engine: 64 x 64 boxes of 16-bit elements.
//
// An epilogue of boxes has kSlabs, the slabs of shared memory that a warpgroup needs, and
//   void box(float (&x)[32], int m, int n, Slabs<kSlabs>& slabs) const
// called by a warpgroup for its accumulators of 64 rows from m on and 64 columns from n on, laid out as
// warpgroup_product leaves them. Boxes beyond C's edges are not stored. An epilogue of rows has kRows and
//   template <int kN> void rows(float (&x)[kN / 2], int m, int n) const
// called for 64 rows and all columns of a tile. A paired epilogue of boxes has kPaired, too, and box(first, second, m,
// n, slabs): its B is two matrices [N, K], whose products with A come together.
#pragma once
#include "core/tensor_map.h"
#include "gemm/cuda/epilogue.h"
#include "gemm/cuda/hopper_mainloop.h"
#include "ptx/barrier.h"
#include "ptx/bulk_copy.h"

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

// Neighbouring columns of a box in one register: pairs[i] is x[2 i] and x[2 i + 1].
template <class T>
__device__ __forceinline__ void pack_box(uint32_t (&pairs)[16], const float (&x)[32]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) pairs[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
}

// The box of a matrix [M, N], N and its rows' starts even, in the accumulators' layout; zeros beyond the edges.
template <class T>
__device__ __forceinline__ void load_box(uint32_t (&pairs)[16], const T* from, int64_t ld, int m, int n, int64_t M,
                                         int64_t N) {
  const int row = m + warp() % 4 * 16 + lane() / 4, col = n + lane() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* const start = from + (row + half * 8) * ld + col;
    const int left = row + half * 8 < M ? static_cast<int>(N - col) : 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) pairs[2 * j + half] = j * 8 < left ? load<Bytes4>(start + j * 8).word[0] : 0;
  }
}

// A warpgroup's ring of slabs. Its first thread hands them to the copy engine and waits for it.
template <int kSlabs>
class Slabs {
 public:
  __device__ Slabs(uint32_t base, int barrier) : base_(base), barrier_(barrier) {}

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
    const uint32_t slab = base_ + next_ * kSlabBytes;
    const int row = warp() % 4 * 16 + lane() % 16;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      stmatrix_x4(slab + chunk_offset<64>(row, 2 * i + lane() / 16),
                  {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]});
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

 private:
  __device__ static bool leads() { return thread() % 128 == 0; }

  uint32_t base_;
  int barrier_, next_ = 0;
};

// x[i] += bias[column of accumulator i], zero from N on.
template <class T>
__device__ __forceinline__ void add_bias(float (&x)[32], const T* bias, int n, int64_t N) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int64_t at = n + 8 * j + lane() % 4 * 2;
    const float low = at < N ? to_float(bias[at]) : 0.0f, high = at + 1 < N ? to_float(bias[at + 1]) : 0.0f;
    x[4 * j] += low, x[4 * j + 2] += low;
    x[4 * j + 1] += high, x[4 * j + 3] += high;
  }
}

inline MappedTensor mapped_boxes(const void* data, DType dtype, int64_t ld, GemmShape shape) {
  return {data, dtype, 2, {shape.N, shape.M}, {1, shape.M == 1 ? ceil_div(shape.N, kChunk) * kChunk : ld}, {64, 64},
          Swizzle::bytes128};
}
template <class T>
constexpr DType half_dtype() {
  return std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
}

// C = acc + addend in float32; a quad of lanes writes 32 bytes.
struct FloatRows {
  static constexpr bool kRows = true;
  float* c;
  int64_t ldc;
  const float* addend;  // or null
  int64_t ld_addend, M, N;

  template <int kN>
  __device__ __forceinline__ void rows(float (&acc)[kN / 2], int m, int n) const {
    const int64_t row = m + warp() % 4 * 16 + lane() / 4;
    const int left = static_cast<int>(N - n < kN ? N - n : kN) - lane() % 4 * 2;
    const bool even = (ldc | ld_addend) % 2 == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row + half * 8;
      if (at >= M) continue;
      float* const to = c + at * ldc + n + lane() % 4 * 2;
      const float* const from = addend ? addend + at * ld_addend + n + lane() % 4 * 2 : nullptr;
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        float2 pair = make_float2(acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]);
        if (even && 8 * j + 1 < left) {
          if (from) {
            const float2 more = load<float2>(from + 8 * j);
            pair.x += more.x, pair.y += more.y;
          }
          store(to + 8 * j, pair);
        } else {
          if (8 * j < left) to[8 * j] = pair.x + (from ? from[8 * j] : 0.0f);
          if (8 * j + 1 < left) to[8 * j + 1] = pair.y + (from ? from[8 * j + 1] : 0.0f);
        }
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
  TensorMap c;
  T* unmapped;  // c where the copy engine cannot address it, or null
  int64_t ldc;
  const T* bias;        // or null
  const float* addend;  // or null
  int64_t ld_addend, M, N;

  __device__ __forceinline__ void box(float (&x)[32], int m, int n, Slabs<kSlabs>& slabs) const {
    if (bias) add_bias(x, bias, n, N);
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
