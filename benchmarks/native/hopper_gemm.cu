// The Hopper product (csrc/gemm/cuda/hopper_gemm.h) on its own: correctness, repeatability and speed of its tile
// variants, beside cuBLAS in the same run.
//
//   nvcc -std=c++17 -O3 -DLLMFAST_TARGET=cuda -Icsrc -gencode=arch=compute_90a,code=sm_90a -o hopper_gemm
//     benchmarks/native/hopper_gemm.cu csrc/core/cuda_device.cu
//   ./hopper_gemm check            small and ragged shapes, every variant, every element against float64
//   ./hopper_gemm SHAPE [VARIANT]  one line a variant: milliseconds (median of 20), TFLOP/s, share of cuBLAS's speed
//   ./hopper_gemm list             the names
//
// Random bf16 everywhere. Before timing, 4096 random elements are checked against float64 sums, all against cuBLAS's
// result, and three runs against each other bit by bit. cuBLAS is loaded at run time, from LLMFAST_CUBLAS or wherever
// the loader finds libcublas.so; without it the peer is left out. A plain C++ compiler builds the program on the
// emulated machine, for `check`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gemm/cuda/hopper_gemm.h"
#ifdef __CUDACC__
#include <dlfcn.h>
#endif

namespace llmfast::cuda {
namespace {

const Stream kStream{0, nullptr};
int failures = 0;

#ifdef __CUDACC__
void synchronize(const char* what) { require_success(cudaDeviceSynchronize(), what); }
template <class T>
T* allocate(int64_t count) {
  void* memory = nullptr;
  require_success(cudaMalloc(&memory, count * sizeof(T)), "memory");
  return static_cast<T*>(memory);
}
void release(void* memory) { cudaFree(memory); }
template <class T>
std::vector<T> to_host(const T* from, int64_t count) {
  std::vector<T> host(count);
  require_success(cudaMemcpy(host.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), "copy to the host");
  return host;
}
void fill_bytes(void* to, int value, int64_t bytes) { require_success(cudaMemset(to, value, bytes), "memset"); }
#else
void synchronize(const char*) {}
template <class T>
T* allocate(int64_t count) {
  return static_cast<T*>(std::aligned_alloc(1024, (count * sizeof(T) + 1023) / 1024 * 1024));
}
void release(void* memory) { std::free(memory); }
template <class T>
std::vector<T> to_host(const T* from, int64_t count) {
  return std::vector<T>(from, from + count);
}
void fill_bytes(void* to, int value, int64_t bytes) { std::memset(to, value, bytes); }
#endif

__host__ __device__ inline uint32_t hash(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ x >> 16;
}

template <class T>
__global__ void fill_kernel(T* to, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{256} + thread(); i < count; i += int64_t{256} * gridDim.x)
    to[i] = from_float<T>((hash(static_cast<uint32_t>(i) + seed) >> 8) * (2.0f / 16777216.0f) - 1.0f);
}
template <class T>
T* random_matrix(int64_t count, uint32_t seed) {
  T* to = allocate<T>(count);
  launch(kStream, {static_cast<unsigned>(std::min<int64_t>(1024, ceil_div(count, 256)))}, 256, 0, fill_kernel<T>, to,
         count, hash(seed));
  return to;
}

struct Problem {
  Major major_a, major_b;
  GemmShape shape;
  void *a, *b, *c;
  int64_t ldc;
  float* workspace;

  Operand operand_a() const {
    return major_a == Major::k ? Operand{a, lead(shape.K), 1} : Operand{a, 1, lead(shape.M)};
  }
  Operand operand_b() const {
    return major_b == Major::k ? Operand{b, lead(shape.K), 1} : Operand{b, 1, lead(shape.N)};
  }
  static int64_t lead(int64_t count) { return ceil_div(count, 8) * 8; }
  int64_t elements_a() const { return major_a == Major::k ? shape.M * lead(shape.K) : shape.K * lead(shape.M); }
  int64_t elements_b() const { return major_b == Major::k ? shape.N * lead(shape.K) : shape.K * lead(shape.N); }
};

struct Element {
  double exact;
  float got;
};
// Element index(i) of C: its float64 sum and what is there.
template <class T>
__global__ void exact_kernel(const Operand a, const Operand b, const T* c, int64_t ldc, GemmShape shape, int64_t count,
                             Element* elements) {
  const int64_t i = blockIdx.x * int64_t{256} + thread(), all = shape.M * shape.N, N = shape.N, K = shape.K;
  if (i >= count) return;
  const auto seed = static_cast<uint32_t>(i);
  const int64_t index = count == all ? i : static_cast<int64_t>((uint64_t{hash(seed)} << 32 | hash(seed + 77)) % all);
  const T *row = static_cast<const T*>(a.data) + index / N * a.stride_mn,
          *col = static_cast<const T*>(b.data) + index % N * b.stride_mn;
  double sum = 0;
  for (int64_t k = 0; k < K; ++k)
    sum += static_cast<double>(to_float(row[k * a.stride_k])) * to_float(col[k * b.stride_k]);
  elements[i] = {sum, to_float(c[index / N * ldc + index % N])};
}

// The largest error in units of the result's last place at the size of a typical sum, over `samples` elements (0: all).
template <class T>
double error_of(const Problem& p, int64_t samples) {
  const int64_t all = p.shape.M * p.shape.N, count = samples > 0 && samples < all ? samples : all;
  Element* there = allocate<Element>(count);
  launch(kStream, {static_cast<unsigned>(ceil_div(count, 256))}, 256, 0, exact_kernel<T>, p.operand_a(), p.operand_b(),
         static_cast<const T*>(p.c), p.ldc, p.shape, count, there);
  synchronize("exact sums");
  const std::vector<Element> elements = to_host(there, count);
  release(there);
  double worst = 0;
  const double places = std::is_same_v<T, bf16> ? 256 : 2048, typical = std::sqrt(p.shape.K / 9.0);
  for (const Element& e : elements) {
    const double error = std::fabs(e.got - e.exact) * places / std::max(typical, std::fabs(e.exact));
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
  }
  return worst;
}

struct Variant {
  const char* name;
  std::function<void(const Problem&)> run;
};

template <class T, class Tile, Major kA, Major kB, bool kBoxes = true>
Variant tile_variant(const char* name, int raster) {
  return {name, [raster](const Problem& p) {
            const StoreEpilogue<T> store{static_cast<T*>(p.c), p.ldc};
            const auto run = [&](const auto& epilogue) {
              launch_hopper_gemm<T, Tile, kA, kB>(p.operand_a(), p.operand_b(), p.shape, {1, p.shape.K}, epilogue,
                                                  kStream, raster);
            };
            if constexpr (kBoxes) run(OnHopper<StoreEpilogue<T>>::make(store, p.shape));
            else run(store);
          }};
}
template <class T, Major kA, Major kB>
Variant planned() {
  return {"planned", [](const Problem& p) {
            HopperProduct::run<T, kA, kB>(p.operand_a(), p.operand_b(), p.shape,
                                          StoreEpilogue<T>{static_cast<T*>(p.c), p.ldc}, p.workspace, kStream);
          }};
}
template <class T, class Tile, Major kA, Major kB, int kParts = 2>
Variant cut_variant(const char* name) {
  return {name, [](const Problem& p) {
            const int64_t depth = part_depth(p.shape.K, kParts), count = ceil_div(p.shape.K, depth);
            launch_hopper_gemm<T, Tile, kA, kB>(p.operand_a(), p.operand_b(), p.shape, {count, depth},
                                                PartEpilogue{p.workspace, p.shape.M, p.shape.N, 0}, kStream);
            add_parts<HopperProduct>(p.workspace, p.shape, count, StoreEpilogue<T>{static_cast<T*>(p.c), p.ldc},
                                     kStream);
          }};
}
template <class T, Major kA, Major kB>
std::vector<Variant> variants() {
  std::vector<Variant> list;
  list.push_back(planned<T, kA, kB>());
  list.push_back(tile_variant<T, HopperTile<128, 256, 4, false>, kA, kB>("128x256 s4 r16", 16));
  list.push_back(tile_variant<T, HopperTile<128, 128, 6, true>, kA, kB>("pp128x128 s6 r12", 12));
  list.push_back(tile_variant<T, HopperTile<128, 192, 4, false>, kA, kB>("128x192 s4 r16", 16));
  list.push_back(cut_variant<T, HopperMiddleTile, kA, kB>("128x192 in two parts"));
  if constexpr (kA == Major::k && std::is_same_v<T, bf16>) {  // of few rows
    list.push_back(cut_variant<T, HopperLargeTile, kA, kB, 4>("128x128 in four parts"));
    list.push_back(cut_variant<T, HopperTile<64, 128, 8, true>, kA, kB, 4>("pp64x128 s8 in four parts"));
    list.push_back(cut_variant<T, HopperTile<64, 64, 12, true>, kA, kB>("pp64x64 s12 in two parts"));
  }
  if constexpr (kB == Major::k && std::is_same_v<T, bf16>) {
    list.push_back(tile_variant<T, HopperNarrowTile, kA, kB, false>("pp64x32 s16 columns", 12));
    list.push_back(tile_variant<T, HopperTile<64, 64, 12, true>, kA, kB>("pp64x64 s12 r12", 12));
    list.push_back(tile_variant<T, HopperTile<128, 256, 4, false>, kA, kB>("128x256 s4 r8", 8));
    list.push_back(tile_variant<T, HopperTile<128, 256, 4, false>, kA, kB>("128x256 s4 r32", 32));
    list.push_back(tile_variant<T, HopperTile<128, 256, 3, false>, kA, kB>("128x256 s3 r16", 16));
    list.push_back(tile_variant<T, HopperTile<128, 256, 4, false>, kA, kB, false>("128x256 s4 columns", 16));
    list.push_back(tile_variant<T, HopperTile<128, 128, 6, true>, kA, kB>("pp128x128 s6 r8", 8));
    list.push_back(tile_variant<T, HopperTile<128, 128, 4, true>, kA, kB>("pp128x128 s4 r12", 12));
    list.push_back(tile_variant<T, HopperTile<128, 128, 6, true>, kA, kB, false>("pp128x128 columns", 12));
    list.push_back(tile_variant<T, HopperTile<64, 256, 4, true>, kA, kB>("pp64x256 s4 r32", 32));
    list.push_back(tile_variant<T, HopperTile<128, 128, 6, false>, kA, kB>("128x128 s6 r12", 12));
  }
  return list;
}

template <class T>
std::vector<Variant> variants_of(Major a, Major b) {
  if (a == Major::k && b == Major::k) return variants<T, Major::k, Major::k>();
  if (a == Major::k) return variants<T, Major::k, Major::mn>();
  return variants<T, Major::mn, Major::mn>();
}

template <class T>
Problem make_problem(Major a, Major b, GemmShape shape) {
  Problem p{a, b, shape, nullptr, nullptr, nullptr, Problem::lead(shape.N), nullptr};
  p.a = random_matrix<T>(p.elements_a(), 1);
  p.b = random_matrix<T>(p.elements_b(), 2);
  p.c = allocate<T>(shape.M * p.ldc);
  p.workspace = allocate<float>(std::max(4 * shape.M * shape.N, hopper_parts_workspace(shape)));
  synchronize("inputs");
  return p;
}
void free_problem(const Problem& p) { release(p.a), release(p.b), release(p.c), release(p.workspace); }

const char* name_of_majors(const Problem& p) {
  return p.major_a == Major::mn ? "mn,mn" : p.major_b == Major::mn ? "k,mn" : "k,k";
}

__global__ void count_unequal_kernel(const uint16_t* a, const uint16_t* b, int64_t count, unsigned* unequal) {
  unsigned mine = 0;
  for (int64_t i = blockIdx.x * int64_t{256} + thread(); i < count; i += int64_t{256} * gridDim.x) mine += a[i] != b[i];
  if (mine > 0) *unequal = 1;  // whoever writes, it is not zero
}

template <class T>
bool verify(const Problem& p, const Variant& v, int64_t samples) {
  const int64_t elements = p.shape.M * p.ldc;
  unsigned* unequal = allocate<unsigned>(1);
  fill_bytes(unequal, 0, 4);
  void* const c = p.c;
  Problem other = p;
  other.c = allocate<T>(elements);
  fill_bytes(c, 0xff, elements * sizeof(T));
  v.run(p);
  synchronize(v.name);
  const double error = error_of<T>(p, samples);
  for (int round = 0; round < 2; ++round) {
    fill_bytes(other.c, 0xff, elements * sizeof(T));
    v.run(other);
    launch(kStream, {static_cast<unsigned>(std::min<int64_t>(1024, ceil_div(elements, 256)))}, 256, 0,
           count_unequal_kernel, static_cast<const uint16_t*>(c), static_cast<const uint16_t*>(other.c), elements,
           unequal);
    synchronize(v.name);
  }
  const bool same = to_host(unequal, 1)[0] == 0, right = error <= 1.25 && same;
  release(other.c), release(unequal);
  if (!right) ++failures;
  std::printf("%s error %.2f ulp%s", right ? "ok," : "WRONG,", error, same ? "" : ", DIFFERS between runs");
  return right;
}

template <class T>
void check_shapes(const char* type) {
  const GemmShape shapes[] = {{1, 1, 8},       {128, 256, 64},   {128, 256, 128},  {64, 128, 64 * 5}, {129, 257, 72},
                              {300, 700, 64 * 9 + 8}, {65, 40, 1100}, {512, 520, 64 * 13}, {256, 1000, 2048}};
  for (const GemmShape& shape : shapes)
    for (const auto& [a, b] : {std::pair{Major::k, Major::k}, {Major::k, Major::mn}, {Major::mn, Major::mn}}) {
      const Problem p = make_problem<T>(a, b, shape);
      for (const Variant& v : variants_of<T>(a, b)) {
        std::printf("%s %lldx%lldx%lld %s, %s: ", type, (long long)shape.M, (long long)shape.N, (long long)shape.K,
                    name_of_majors(p), v.name);
        std::fflush(stdout);
        verify<T>(p, v, 0);
        std::printf("\n");
      }
      free_problem(p);
    }
}

#ifdef __CUDACC__

float median_milliseconds(const std::function<void()>& run, int rounds) {
  cudaEvent_t start, end;
  cudaEventCreate(&start), cudaEventCreate(&end);
  for (int i = 0; i < 3; ++i) run();
  std::vector<float> times(rounds);
  for (float& time : times) {
    cudaEventRecord(start);
    run();
    cudaEventRecord(end);
    require_success(cudaEventSynchronize(end), "timed run");
    cudaEventElapsedTime(&time, start, end);
  }
  std::sort(times.begin(), times.end());
  return times[rounds / 2];
}

// cuBLAS without its headers; the numbers are those of cublas_api.h.
class Cublas {
 public:
  Cublas() {
    const char* named = std::getenv("LLMFAST_CUBLAS");
    for (const char* name : {named ? named : "libcublas.so", "libcublas.so.13", "libcublas.so.12"})
      if (void* library = dlopen(name, RTLD_NOW | RTLD_GLOBAL)) {
        const auto create = reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasCreate_v2"));
        gemm_ = reinterpret_cast<Gemm>(dlsym(library, "cublasGemmEx"));
        if (create && gemm_ && create(&handle_) == 0) return;
      }
    std::printf("no cuBLAS: %s\n", dlerror());
    gemm_ = nullptr;
  }
  bool present() const { return gemm_; }

  void operator()(const Problem& p, void* c) const {
    constexpr int kOpN = 0, kOpT = 1, kCompute32F = 68, kDefault = -1;
    const float one = 1, zero = 0;
    const Operand a = p.operand_a(), b = p.operand_b();  // column-major: C^T [N, M] = B A^T
    const int status =
        gemm_(handle_, p.major_b == Major::k ? kOpT : kOpN, p.major_a == Major::k ? kOpN : kOpT,
              static_cast<int>(p.shape.N), static_cast<int>(p.shape.M), static_cast<int>(p.shape.K), &one, p.b,
              CUDA_R_16BF, static_cast<int>(p.major_b == Major::k ? b.stride_mn : b.stride_k), p.a, CUDA_R_16BF,
              static_cast<int>(p.major_a == Major::k ? a.stride_mn : a.stride_k), &zero, c, CUDA_R_16BF,
              static_cast<int>(p.ldc), kCompute32F, kDefault);
    if (status != 0) std::printf("cuBLAS error %d\n", status), std::exit(2);
  }

 private:
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int, const void*,
                       cudaDataType, int, const void*, void*, cudaDataType, int, int, int);
  void* handle_ = nullptr;
  Gemm gemm_ = nullptr;
};

// The largest difference of two results, in units of the last place at the size of a typical sum.
__global__ void difference_kernel(const bf16* a, const bf16* b, int64_t count, float typical, unsigned* worst) {
  for (int64_t i = blockIdx.x * int64_t{256} + thread(); i < count; i += int64_t{256} * gridDim.x) {
    const float x = to_float(a[i]), y = to_float(b[i]), d = fabsf(x - y) * 256.0f / fmaxf(typical, fabsf(y));
    atomicMax(worst, __float_as_uint(d == d ? d : 1e30f));  // non-negative floats order as their bits do
  }
}
double difference(const bf16* a, const bf16* b, int64_t count, double typical) {
  unsigned* worst = allocate<unsigned>(1);
  fill_bytes(worst, 0, 4);
  launch(kStream, {1024}, 256, 0, difference_kernel, a, b, count, static_cast<float>(typical), worst);
  synchronize("difference");
  const unsigned bits = to_host(worst, 1)[0];
  release(worst);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct NamedShape {
  const char* name;
  Major a, b;
  GemmShape shape;
};
const NamedShape kShapes[] = {
    {"8192", Major::k, Major::k, {8192, 8192, 8192}},      {"4096", Major::k, Major::k, {4096, 4096, 4096}},
    {"up", Major::k, Major::k, {65536, 3072, 768}},        {"down", Major::k, Major::k, {65536, 768, 3072}},
    {"dx", Major::k, Major::mn, {65536, 768, 3072}},       {"dhidden", Major::k, Major::mn, {65536, 3072, 768}},
    {"dw", Major::mn, Major::mn, {3072, 768, 65536}},      {"dw4096", Major::mn, Major::mn, {4096, 4096, 8192}},
    {"small", Major::k, Major::k, {512, 4096, 4096}},      {"logits", Major::k, Major::k, {8192, 50304, 768}},
    {"rows64", Major::k, Major::k, {64, 4096, 4096}},      {"rows8", Major::k, Major::k, {8, 4096, 4096}},
    {"rows64dx", Major::k, Major::mn, {64, 4096, 4096}},   {"rows8wide", Major::k, Major::k, {8, 16384, 4096}},
};

void time_shape(const NamedShape& named, const char* only) {
  const Problem p = make_problem<bf16>(named.a, named.b, named.shape);
  const int64_t elements = p.shape.M * p.ldc;
  const double flops = 2.0 * p.shape.M * p.shape.N * p.shape.K;
  bf16* peer = allocate<bf16>(elements);
  static const Cublas cublas;
  std::printf("== %s: %lldx%lldx%lld %s, bf16\n", named.name, (long long)p.shape.M, (long long)p.shape.N,
              (long long)p.shape.K, name_of_majors(p));
  const auto rate = [&](float ms) { return flops / ms * 1e-9; };
  const auto time_cublas = [&](const char* name) {
    if (!cublas.present()) return 0.0f;
    const float ms = median_milliseconds([&] { cublas(p, peer); }, 20);
    std::printf("%-20s %8.4f ms %7.1f TFLOP/s\n", name, ms, rate(ms));
    std::fflush(stdout);
    return ms;
  };
  const float cublas_ms = time_cublas("cuBLAS");
  for (const Variant& v : variants_of<bf16>(named.a, named.b)) {
    if (only && std::strcmp(only, v.name) != 0) continue;
    std::printf("%-20s ", v.name);
    std::fflush(stdout);
    v.run(p);
    synchronize(v.name);
    const float ms = median_milliseconds([&] { v.run(p); }, 20);
    std::printf("%8.4f ms %7.1f TFLOP/s, %.3f of cuBLAS; ", ms, rate(ms), cublas_ms / ms);
    std::fflush(stdout);
    verify<bf16>(p, v, 4096);
    if (cublas.present()) {
      const double apart = difference(static_cast<const bf16*>(p.c), peer, elements, std::sqrt(p.shape.K / 9.0));
      const bool close = apart <= 4.0;
      if (!close) ++failures;
      std::printf(", %.1f ulp from cuBLAS%s", apart, close ? "" : " WRONG");
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  time_cublas("cuBLAS again");
  release(peer);
  free_problem(p);
}

#endif

}  // namespace
}  // namespace llmfast::cuda

int main(int count, char** arguments) {
  using namespace llmfast::cuda;
  using llmfast::bf16;
  using llmfast::fp16;
  const std::string what = count > 1 ? arguments[1] : "list";
  if (what == "check") {
    check_shapes<bf16>("bf16");
    if (count < 3) check_shapes<fp16>("fp16");
  }
#ifdef __CUDACC__
  for (const NamedShape& shape : kShapes) {
    if (what == "list") std::printf("%s\n", shape.name);
    if (what == shape.name || what == "all") time_shape(shape, count > 2 ? arguments[2] : nullptr);
  }
  if (what == "list")
    for (const Variant& v : variants_of<bf16>(llmfast::cuda::Major::k, llmfast::cuda::Major::k))
      std::printf("  %s\n", v.name);
#endif
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
