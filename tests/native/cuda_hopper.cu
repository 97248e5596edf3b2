// What the Hopper kernels assume of mbarriers, bulk copies and warpgroup products (csrc/ptx/{mbarrier,bulk_copy,
// warpgroup}.h), against plain loops. test_cuda_emulation.py builds it with the C++ compiler on the emulated machine;
// where there is a device of compute capability 9.0, nvcc builds it for sm_90a, so that both are held to the same.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/cuda_launch.h"
#include "ptx/barrier.h"
#include "ptx/bulk_copy.h"
#include "ptx/convert.h"
#include "ptx/mbarrier.h"
#include "ptx/warpgroup.h"

namespace llmfast::cuda {
namespace {

int failures = 0;

void check(bool holds, const char* what, double got, double expected, int at) {
  if (holds) return;
  if (failures++ < 20) std::printf("FAILED: %s at %d: %g, expected %g\n", what, at, got, expected);
}

template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
#ifdef __CUDACC__
  require_success(cudaMallocManaged(&memory, count * sizeof(T)), "memory");
#else
  memory = std::aligned_alloc(1024, (count * sizeof(T) + 1023) / 1024 * 1024);
#endif
  std::memset(memory, 0, count * sizeof(T));
  return static_cast<T*>(memory);
}

template <class... Parameters, class... Arguments>
void run(unsigned threads, size_t shared_bytes, void (*kernel)(Parameters...), Arguments... arguments) {
  launch(Stream{0, nullptr}, Grid{1}, threads, shared_bytes, kernel, arguments...);
#ifdef __CUDACC__
  require_success(cudaDeviceSynchronize(), "kernel");
#endif
}

uint16_t bits_of(int value) {  // bf16, exact for small integers
  const float wide = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  return static_cast<uint16_t>(bits >> 16);
}

MappedTensor matrix(const void* data, int rows, int cols, int ld, int box_rows, int box_cols, Swizzle swizzle) {
  return {data, DType::bf16, 2, {cols, rows}, {1, ld}, {box_cols, box_rows}, swizzle};
}

// ---- a box, as it lies in shared memory, and back --------------------------------------------------------------------

constexpr int kBoxRows = 24;

__global__ void box_kernel(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int x, int y,
                           int bytes, uint16_t* raw) {
  char* shared = dynamic_shared<char>();
  const uint32_t base = shared_address(shared), barrier = base + 8192;
  if (thread() == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  for (int round = 0; round < 3; ++round) {  // the parity flips
    if (thread() == 0) {
      mbarrier_arrive_expect(barrier, bytes);
      bulk_load(base, &from, barrier, x, y);
    }
    mbarrier_wait(barrier, round % 2);
    __syncthreads();
  }
  for (int i = thread(); i < bytes / 2; i += 128) raw[i] = reinterpret_cast<uint16_t*>(shared)[i];
  fence_async_proxy();
  __syncthreads();
  if (thread() == 0) {
    bulk_store(&to, base, x, y);
    bulk_commit();
    bulk_wait<0>();
  }
}

void boxes(Swizzle swizzle, int x, int y) {
  constexpr int kRows = 40, kCols = 100, kLd = 104;
  const int span = static_cast<int>(swizzle) / 2, bytes = kBoxRows * span * 2;
  uint16_t *from = allocate<uint16_t>(kRows * kLd), *to = allocate<uint16_t>(kRows * kLd), *raw = allocate<uint16_t>(4096);
  for (int i = 0; i < kRows * kLd; ++i) from[i] = static_cast<uint16_t>(i + 1);
  run(128, 8192 + 64, box_kernel, make_tensor_map(matrix(from, kRows, kCols, kLd, kBoxRows, span, swizzle)),
      make_tensor_map(matrix(to, kRows, kCols, kLd, kBoxRows, span, swizzle)), x, y, bytes, raw);
  const int mask = span == 64 ? 7 : span == 32 ? 3 : 1;
  for (int r = 0; r < kBoxRows; ++r)
    for (int c = 0; c < span; ++c) {
      const int byte = (r * span + c) * 2, at = (byte ^ ((byte >> 7 & mask) << 4)) / 2;
      const bool inside = x + c >= 0 && x + c < kCols && y + r >= 0 && y + r < kRows;
      const int expected = inside ? from[(y + r) * kLd + x + c] : 0;
      check(raw[at] == expected, "a box in shared memory", raw[at], expected, r * span + c);
    }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kLd; ++c) {
      const bool inside = r >= y && r < y + kBoxRows && c >= x && c < x + span && c < kCols;
      const int expected = inside ? from[r * kLd + c] : 0;
      check(to[r * kLd + c] == expected, "a box stored", to[r * kLd + c], expected, r * kLd + c);
    }
}

// ---- products: d[64, kN] = a[64, 64] b[kN, 64]^T in four steps of depth ----------------------------------------------

constexpr int kDepth = 64;

template <int kN, Major kA, Major kB, bool kRegisters>
__global__ void product_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                               const uint16_t* a_rows, float* d) {
  const uint32_t base = shared_address(dynamic_shared<char>()), b_at = base + 8192, barrier = b_at + kN * 128;
  constexpr int kSlab = kDepth * 128;  // bytes of 64 neighbours in n
  if (thread() == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, 8192 + (kB == Major::k ? kN * 128 : (kN + 63) / 64 * kSlab));
    bulk_load(base, &a, barrier, 0, 0);
    if (kB == Major::k) bulk_load(b_at, &b, barrier, 0, 0);
    else
      for (int slab = 0; slab < (kN + 63) / 64; ++slab) bulk_load(b_at + slab * kSlab, &b, barrier, slab * 64, 0);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  float acc[kN / 2];
  uint32_t fragment[4][4];
  for (int k = 0; k < 4; ++k)
    for (int r = 0; r < 4; ++r) {
      const int row = warp() * 16 + lane() / 4 + 8 * (r % 2), col = 16 * k + lane() % 4 * 2 + 8 * (r / 2);
      fragment[k][r] = a_rows[row * kDepth + col] | static_cast<uint32_t>(a_rows[row * kDepth + col + 1]) << 16;
    }
  warpgroup_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t of_b = kB == Major::k ? matrix_descriptor(b_at + 32 * k, 1024)
                                         : matrix_descriptor(b_at + 2048 * k, 1024, kSlab);
    if constexpr (kRegisters) {
      warpgroup_product<kN, bf16, kB>(acc, fragment[k], of_b, k > 0);
    } else {
      const uint64_t of_a =
          kA == Major::k ? matrix_descriptor(base + 32 * k, 1024) : matrix_descriptor(base + 2048 * k, 1024, kSlab);
      warpgroup_product<kN, bf16, kA, kB>(acc, of_a, of_b, k > 0);
    }
  }
  warpgroup_commit();
  warpgroup_wait<0>();
#pragma unroll
  for (int i = 0; i < kN / 2; ++i)
    d[(warp() * 16 + lane() / 4 + 8 * (i / 2 % 2)) * kN + 8 * (i / 4) + 2 * (lane() % 4) + i % 2] = acc[i];
}

template <int kN, Major kA, Major kB, bool kRegisters>
void product(const char* what) {
  uint16_t *a = allocate<uint16_t>(64 * kDepth), *a_rows = allocate<uint16_t>(64 * kDepth);
  uint16_t* b = allocate<uint16_t>(256 * kDepth);
  float* d = allocate<float>(64 * kN);
  const auto a_at = [](int m, int k) { return (7 * m + 3 * k) % 11 - 5; };
  const auto b_at = [](int n, int k) { return (5 * n + 9 * k + n * k % 3) % 13 - 6; };
  constexpr int kWidth = (kN + 7) / 8 * 8;  // of b with n contiguous
  for (int k = 0; k < kDepth; ++k) {
    for (int m = 0; m < 64; ++m) {
      a_rows[m * kDepth + k] = bits_of(a_at(m, k));
      a[kA == Major::k ? m * kDepth + k : k * 64 + m] = bits_of(a_at(m, k));
    }
    for (int n = 0; n < kN; ++n) b[kB == Major::k ? n * kDepth + k : k * kWidth + n] = bits_of(b_at(n, k));
  }
  const auto map_a = make_tensor_map(matrix(a, 64, 64, 64, 64, 64, Swizzle::bytes128));
  const auto map_b = kB == Major::k
                         ? make_tensor_map(matrix(b, kN, kDepth, kDepth, kN, 64, Swizzle::bytes128))
                         : make_tensor_map(matrix(b, kDepth, kN, kWidth, kDepth, 64, Swizzle::bytes128));
  run(128, 8192 + 4 * 8192 + 1024, product_kernel<kN, kA, kB, kRegisters>, map_a, map_b, a_rows, d);
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kN; ++n) {
      int sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a_at(m, k) * b_at(n, k);
      check(d[m * kN + n] == static_cast<float>(sum), what, d[m * kN + n], sum, m * kN + n);
    }
}

// ---- a ring of slots that a producer warp fills, bytes, sums and stmatrix --------------------------------------------

constexpr int kSlots = 3, kRounds = 20;

__global__ void ring_kernel(const float* in, float* out, float* sums) {
  char* shared = dynamic_shared<char>();
  const uint32_t base = shared_address(shared), full = base + kSlots * 512, empty = full + 8 * kSlots;
  if (thread() == 0) {
    for (int s = 0; s < kSlots; ++s) mbarrier_init(full + 8 * s, 1), mbarrier_init(empty + 8 * s, 128);
    mbarrier_init_fence();
  }
  __syncthreads();
  RingPlace<kSlots> place;
  if (thread() >= 128) {
    if (thread() == 128)
      for (int round = 0; round < kRounds; ++round, place.advance()) {
        mbarrier_wait(empty + 8 * place.stage, place.parity ^ 1);
        mbarrier_arrive_expect(full + 8 * place.stage, 512);
        bulk_load_bytes(base + 512 * place.stage, in + 128 * round, 512, full + 8 * place.stage);
      }
  } else {
    float sum = 0.0f;
    for (int round = 0; round < kRounds; ++round, place.advance()) {
      mbarrier_wait(full + 8 * place.stage, place.parity);
      sum += reinterpret_cast<float*>(shared + 512 * place.stage)[thread()];
      mbarrier_arrive(empty + 8 * place.stage);
    }
    out[thread()] = sum;
    float* mine = reinterpret_cast<float*>(shared + kSlots * 512 + 64);
    mine[thread()] = sum;
    fence_async_proxy();
    barrier_sync(1, 128);
    if (thread() == 0) {
      bulk_add_floats(sums, shared_address(mine), 512);
      bulk_add_floats(sums, shared_address(mine), 512);
      bulk_commit();
      bulk_wait<0>();
    }
  }
}

void ring() {
  float *in = allocate<float>(128 * kRounds), *out = allocate<float>(128), *sums = allocate<float>(128);
  for (int i = 0; i < 128 * kRounds; ++i) in[i] = static_cast<float>(i % 97);
  for (int i = 0; i < 128; ++i) sums[i] = 5.0f;
  run(160, 4096, ring_kernel, in, out, sums);
  for (int i = 0; i < 128; ++i) {
    float sum = 0;
    for (int round = 0; round < kRounds; ++round) sum += in[128 * round + i];
    check(out[i] == sum, "a ring of slots", out[i], sum, i);
    check(sums[i] == 5.0f + 2 * sum, "sums in memory", sums[i], 5.0f + 2 * sum, i);
  }
}

__global__ void stmatrix_kernel(uint16_t* plain, uint16_t* transposed) {
  uint16_t* shared = dynamic_shared<uint16_t>();
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) {  // element (g, 2t + half) of matrix i is 64 i + 8 g + 2 t + half
    const uint32_t low = 64 * i + lane() / 4 * 8 + lane() % 4 * 2;
    r[i] = low | (low + 1) << 16;
  }
  stmatrix_x4(shared_address(shared) + lane() * 16, r);
  stmatrix_x4_trans(shared_address(shared) + 512 + lane() * 16, r);
  __syncwarp();
  for (int i = lane(); i < 256; i += 32) plain[i] = shared[i], transposed[i] = shared[256 + i];
}

void stmatrix() {
  uint16_t *plain = allocate<uint16_t>(256), *transposed = allocate<uint16_t>(256);
  run(32, 1024, stmatrix_kernel, plain, transposed);
  for (int i = 0; i < 256; ++i) {
    const int across = i / 64 * 64 + i % 8 * 8 + i / 8 % 8;
    check(plain[i] == i, "stmatrix", plain[i], i, i);
    check(transposed[i] == across, "stmatrix.trans", transposed[i], across, i);
  }
}

}  // namespace
}  // namespace llmfast::cuda

int main() {
  using namespace llmfast::cuda;
  using llmfast::Swizzle;
  boxes(Swizzle::bytes128, 0, 0);
  boxes(Swizzle::bytes128, 64, 24);
  boxes(Swizzle::bytes64, 32, 8);
  boxes(Swizzle::bytes64, 96, 16);
  boxes(Swizzle::bytes32, 16, 32);
  stmatrix();
  ring();
  product<64, Major::k, Major::k, false>("product of k-major a and b");
  product<128, Major::k, Major::mn, false>("product of k-major a, mn-major b");
  product<256, Major::mn, Major::mn, false>("product of mn-major a and b");
  product<96, Major::mn, Major::k, false>("product of mn-major a, k-major b");
  product<176, Major::k, Major::k, true>("product of a in registers");
  product<256, Major::k, Major::mn, true>("product of a in registers, mn-major b");
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
