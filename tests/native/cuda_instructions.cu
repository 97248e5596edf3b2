// What kernels assume of the instructions in csrc/ptx, against plain loops over the definitions of the PTX ISA.
// test_cuda_emulation.py builds it with the C++ compiler on the emulated machine, and with nvcc where there is a GPU,
// so that both are held to the same expectations.
//   cuda_instructions            runs all checks; exit status 0 if they hold
//   cuda_instructions MISTAKE    commits a programming error that the emulation must report
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "core/cuda_launch.h"
#include "core/cuda_row_sum.h"
#include "ptx/barrier.h"
#include "ptx/convert.h"
#include "ptx/copy_async.h"
#include "ptx/math.h"
#include "ptx/matrix.h"
#include "ptx/memory.h"

namespace llmfast::cuda {
namespace {

int failures = 0;

void check(bool holds, const char* what, double detail = 0) {
  if (holds) return;
  std::printf("FAILED: %s (%g)\n", what, detail);
  ++failures;
}

template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
#ifdef __CUDACC__
  require_success(cudaMallocHost(&memory, count * sizeof(T)), "memory");  // pinned: kernels see it at the same address
#else
  memory = std::aligned_alloc(256, (count * sizeof(T) + 255) / 256 * 256);
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

// A 16-bit float that holds a small integer exactly.
template <class T>
uint16_t integer_bits(int value) {
  uint32_t bits;
  const float wide = static_cast<float>(value);
  std::memcpy(&bits, &wide, 4);
  if (std::is_same<T, bf16>::value) return static_cast<uint16_t>(bits >> 16);
  if (value == 0) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13));
}

// ---- ldmatrix -------------------------------------------------------------------------------------------------------

constexpr int kPitch = 80;  // bytes from row to row: conflict-free, and no power of two

__global__ void ldmatrix_kernel(const uint16_t* rows, uint32_t* plain, uint32_t* transposed, uint32_t* pair) {
  char* shared = dynamic_shared<char>();
  store(shared + lane() * kPitch, load<Bytes16>(rows + lane() * 8));
  __syncthreads();
  const uint32_t row = shared_address(shared) + lane() * kPitch;
  uint32_t r[4], t[4], two[2];
  ldmatrix_x4(r, row);
  ldmatrix_x4_trans(t, row);
  ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 4; ++i) plain[4 * lane() + i] = r[i];
  for (int i = 0; i < 4; ++i) transposed[4 * lane() + i] = t[i];
  for (int i = 0; i < 2; ++i) pair[2 * lane() + i] = two[i];
}

void ldmatrix_layout() {
  uint16_t* rows = allocate<uint16_t>(256);
  uint32_t *plain = allocate<uint32_t>(128), *transposed = allocate<uint32_t>(128), *pair = allocate<uint32_t>(64);
  // Element i: matrix i / 64, row i / 8 % 8, column i % 8.
  for (int i = 0; i < 256; ++i) rows[i] = static_cast<uint16_t>(1000 + i);
  run(32, 32 * kPitch, ldmatrix_kernel, rows, plain, transposed, pair);
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int half = 0; half < 2; ++half) {
        const int g = lane / 4, c = 2 * (lane % 4) + half;
        const auto at = [&](uint32_t word) { return static_cast<int>(word >> 16 * half & 0xffff); };
        check(at(plain[4 * lane + matrix]) == rows[64 * matrix + 8 * g + c], "ldmatrix", lane);
        check(at(transposed[4 * lane + matrix]) == rows[64 * matrix + 8 * c + g], "ldmatrix.trans", lane);
        if (matrix < 2) check(at(pair[2 * lane + matrix]) == rows[64 * matrix + 8 * c + g], "ldmatrix.x2.trans", lane);
      }
}

// ---- mma, fed as kernels feed it: cp.async, ldmatrix ----------------------------------------------------------------

// d[16,8] = a[16,16] b; b is [n,k] in b_rows and [k,n] in b_columns.
template <class T>
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b_rows, const uint16_t* b_columns, float* d) {
  const uint32_t shared = shared_address(dynamic_shared<char>());
  const uint32_t a_at = shared, rows_at = shared + 16 * kPitch, columns_at = rows_at + 8 * kPitch;
  copy_async_16(a_at + lane() / 2 * kPitch + lane() % 2 * 16, a + 8 * lane());
  if (lane() < 16) copy_async_16(rows_at + lane() / 2 * kPitch + lane() % 2 * 16, b_rows + 8 * lane());
  copy_async_commit();
  if (lane() < 16) copy_async_16(columns_at + lane() * kPitch, b_columns + 8 * lane());
  copy_async_commit();
  copy_async_wait<1>();
  __syncwarp();
  uint32_t a_fragment[4], b_fragment[2];
  ldmatrix_x4(a_fragment, a_at + lane() % 16 * kPitch + lane() / 16 * 16);
  ldmatrix_x2(b_fragment, rows_at + lane() % 8 * kPitch + lane() / 8 % 2 * 16);
  float twice[4] = {0, 0, 0, 0};
  mma_m16n8k16<T>(twice, a_fragment, b_fragment);
  copy_async_wait<0>();
  __syncwarp();
  ldmatrix_x2_trans(b_fragment, columns_at + lane() % 16 * kPitch);
  mma_m16n8k16<T>(twice, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) d[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = twice[i];
}

template <class T>
void mma_is_a_product(const char* name) {
  uint16_t *a = allocate<uint16_t>(256), *rows = allocate<uint16_t>(128), *columns = allocate<uint16_t>(128);
  float* d = allocate<float>(128);
  const auto a_at = [](int m, int k) { return (7 * m + 3 * k) % 11 - 5; };
  const auto b_at = [](int k, int n) { return (5 * k + 9 * n) % 13 - 6; };
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 16; ++m) a[16 * m + k] = integer_bits<T>(a_at(m, k));
    for (int n = 0; n < 8; ++n) rows[16 * n + k] = columns[8 * k + n] = integer_bits<T>(b_at(k, n));
  }
  run(32, 40 * kPitch, mma_kernel<T>, a, rows, columns, d);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int sum = 0;
      for (int k = 0; k < 16; ++k) sum += a_at(m, k) * b_at(k, n);
      check(d[8 * m + n] == static_cast<float>(2 * sum), name, 8 * m + n);
    }
}

// ---- warps, barriers, copies ----------------------------------------------------------------------------------------

__global__ void warp_kernel(int* out) {
  const int id = lane();
  out[id] = __shfl_xor_sync(kAllLanes, id, 5);
  out[32 + id] = __shfl_down_sync(kAllLanes, id, 3);
  out[64 + id] = __shfl_up_sync(kAllLanes, id, 3);
  out[96 + id] = __shfl_sync(kAllLanes, id, 7);
  out[128 + id] = __shfl_xor_sync(kAllLanes, id, 2, 8);
  out[160 + id] = static_cast<int>(__ballot_sync(kAllLanes, id % 3 == 0));
  out[192 + id] = __any_sync(kAllLanes, id == 31) && !__all_sync(kAllLanes, id != 31);
  if (id < 16) out[224 + id] = __shfl_xor_sync(0x0000ffffu, id, 1);
}

void warp_instructions() {
  int* out = allocate<int>(256);
  run(32, 0, warp_kernel, out);
  uint32_t thirds = 0;
  for (int i = 0; i < 32; i += 3) thirds |= 1u << i;
  for (int i = 0; i < 32; ++i) {
    check(out[i] == (i ^ 5), "shfl.xor", i);
    check(out[32 + i] == (i + 3 < 32 ? i + 3 : i), "shfl.down", i);
    check(out[64 + i] == (i >= 3 ? i - 3 : i), "shfl.up", i);
    check(out[96 + i] == 7, "shfl.idx", i);
    check(out[128 + i] == (i ^ 2), "shfl.xor in eights", i);
    check(static_cast<uint32_t>(out[160 + i]) == thirds, "ballot", i);
    check(out[192 + i] == 1, "any and all", i);
    if (i < 16) check(out[224 + i] == (i ^ 1), "shuffle of half a warp", i);
  }
}

__global__ void block_kernel(float* out, const float* in) {
  float* shared = dynamic_shared<float>();
  const uint32_t slot = shared_address(shared + 4 * thread());
  copy_async_16(slot, in + 4 * thread(), thread() % 5 * 4);  // 0 to 4 of the floats; zeros for the rest
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const int other = (thread() + 37) % 128;
  for (int i = 0; i < 4; ++i) out[4 * thread() + i] = shared[4 * other + i];
  RowSum<false, 128, 2> row_sum;
  for (int round = 1; round <= 3; ++round) {
    float sums[2] = {static_cast<float>(round), static_cast<float>(thread())};
    row_sum(sums);
    if (thread() == 0) out[512 + round] = sums[0] + sums[1];
  }
  // Warps 0 and 1 hand a value to warps 2 and 3.
  if (warp() < 2) {
    shared[thread()] = 1000.0f + static_cast<float>(thread());
    barrier_arrive(1, 128);
  } else {
    barrier_sync(1, 128);
    out[520 + thread() - 64] = shared[thread() - 64];
  }
}

void block_instructions() {
  float *out = allocate<float>(600), *in = allocate<float>(512);
  for (int i = 0; i < 512; ++i) in[i] = static_cast<float>(i + 1);
  run(128, 2048, block_kernel, out, in);
  for (int i = 0; i < 512; ++i) {
    const int from = (i / 4 + 37) % 128, part = i % 4;
    check(out[i] == (part < from % 5 ? in[4 * from + part] : 0.0f), "cp.async with a tail", i);
  }
  for (int round = 1; round <= 3; ++round)
    check(out[512 + round] == static_cast<float>(128 * round + 127 * 64), "sums over a block", round);
  for (int i = 0; i < 64; ++i) check(out[520 + i] == static_cast<float>(1000 + i), "a named barrier", i);
}

// ---- numbers --------------------------------------------------------------------------------------------------------

template <class T>
__global__ void convert_kernel(uint16_t* again, uint16_t* rounded, float* functions) {
  for (int i = thread(); i < 65536; i += 256) {
    const float value = to_float(T{static_cast<uint16_t>(i)});
    again[i] = from_float<T>(value).bits;
    float low, high;
    unpack_pair<T>(pack_pair<T>(value, 1.0f), low, high);
    if (__float_as_uint(low) != __float_as_uint(value) && value == value) again[i] = 0xdead;
    // Halfway between two neighbours: to the even one.
    const uint16_t low_bits = i & 0x7fff, next_bits = low_bits + 1;
    const float here = to_float(T{low_bits}), next = to_float(T{next_bits});
    rounded[i] = from_float<T>(0.5f * here + 0.5f * next).bits;
  }
  const float x = 0.37f + static_cast<float>(thread()) / 64;
  functions[4 * thread()] = exp2_approx(-x) / exp2f(-x);
  functions[4 * thread() + 1] = log2_approx(1 + x) / log2f(1 + x);
  functions[4 * thread() + 2] = tanh_approx(x) / tanhf(x);
  functions[4 * thread() + 3] = reciprocal_approx(x) * x;
}

template <class T>
void conversions(const char* name, int infinity) {
  uint16_t *again = allocate<uint16_t>(65536), *rounded = allocate<uint16_t>(65536);
  float* functions = allocate<float>(1024);
  run(256, 0, convert_kernel<T>, again, rounded, functions);
  for (int i = 0; i < 65536; ++i) {
    const bool nan = (i & 0x7fff) > infinity;
    check(nan || again[i] == i, name, i);
    const int low = i & 0x7fff, even = low % 2 ? low + 1 : low;
    if (low + 1 < infinity) check(rounded[i] == even, "rounding to even", i);
  }
  for (int i = 0; i < 1024; ++i) check(std::fabs(functions[i] - 1) < (i % 4 == 2 ? 6e-4 : 1e-6), "approximations", i);
}

// ---- mistakes -------------------------------------------------------------------------------------------------------

#ifndef __CUDACC__

__global__ void two_barriers(float*) {
  if (thread() < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void barriers_that_never_meet(float*) {
  if (thread() < 32) {
    barrier_sync(1, 64);
  } else {
    barrier_sync(2, 64);
  }
}
__global__ void half_a_warp(float* out) {
  if (lane() < 16) out[lane()] = warp_sum(1.0f);
}
__global__ void two_instructions(float* out) {
  if (lane() < 16) {
    out[lane()] = warp_sum(1.0f);
  } else {
    __syncwarp();
  }
}
__global__ void misaligned(float* out) { store(out + 1, Bytes16{}); }
__global__ void beyond_shared_memory(float*) { store_shared(shared_address(dynamic_shared<char>()) + 64, uint32_t{1}); }
__global__ void write_around_shared_memory(float*) { dynamic_shared<char>()[64] = 1; }
__global__ void never_waited(float* in) {
  copy_async_16(shared_address(dynamic_shared<char>()), in);
  copy_async_commit();
}
__global__ void read_before_wait(float* in) {
  in[4] = 1.0f;
  copy_async_16(shared_address(dynamic_shared<char>()), in + 4);
  copy_async_commit();
  in[0] = *dynamic_shared<float>();
  copy_async_wait<0>();
}
__global__ void read_before_barrier(float* out) {
  float* shared = dynamic_shared<float>();
  shared[thread()] = 1.0f;
  out[thread()] = shared[thread() ^ 1];
}

// The next launch finds the machine in order.
__global__ void after_an_error(float* out) { out[lane()] = warp_sum(1.0f); }

int commit(const std::string& mistake) {
  const struct {
    const char* name;
    void (*kernel)(float*);
    bool finishes;  // with NaN among its results
  } all[] = {{"two_barriers", two_barriers, false},
             {"barriers_that_never_meet", barriers_that_never_meet, false},
             {"half_a_warp", half_a_warp, false},
             {"two_instructions", two_instructions, false},
             {"misaligned", misaligned, false},
             {"beyond_shared_memory", beyond_shared_memory, false},
             {"write_around_shared_memory", write_around_shared_memory, false},
             {"never_waited", never_waited, false},
             {"read_before_wait", read_before_wait, true},
             {"read_before_barrier", read_before_barrier, true}};
  for (const auto& entry : all) {
    if (mistake != entry.name) continue;
    float* memory = allocate<float>(64);
    const bool shared_is_small = mistake.find("shared_memory") != std::string::npos;
    try {
      run(mistake == "half_a_warp" || mistake == "two_instructions" ? 32 : 64, shared_is_small ? 64 : 256, entry.kernel,
          memory);
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      run(32, 0, after_an_error, memory);
      return entry.finishes || memory[0] != 32.0f;
    }
    bool nan = false;
    for (int i = 0; i < 64; ++i) nan = nan || std::isnan(memory[i]);
    std::printf(nan ? "NaN\n" : "unnoticed\n");
    return !(entry.finishes && nan);
  }
  std::printf("no mistake of that name\n");
  return 1;
}

#endif

}  // namespace
}  // namespace llmfast::cuda

int main(int argc, char** argv) {
  using namespace llmfast::cuda;
#ifndef __CUDACC__
  if (argc > 1) return commit(argv[1]);
#else
  (void)argc, (void)argv;
#endif
  ldmatrix_layout();
  mma_is_a_product<llmfast::bf16>("mma of bf16");
  mma_is_a_product<llmfast::fp16>("mma of fp16");
  warp_instructions();
  block_instructions();
  conversions<llmfast::bf16>("bf16", 0x7f80);
  conversions<llmfast::fp16>("fp16", 0x7c00);
#ifndef __CUDACC__
  check(llmfast::emulated::counters().ldmatrix_conflicts == 0, "rows 80 bytes apart share no banks");
#endif
  return failures != 0;
}
