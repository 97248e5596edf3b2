// What the epilogues of Hopper's product cost: each beside the plain store of the same product, for both tiles.
//
//   nvcc -std=c++17 -O3 -DLLMFAST_TARGET=cuda -Icsrc -gencode=arch=compute_90a,code=sm_90a -o hopper_epilogues
//     benchmarks/native/hopper_epilogues.cu csrc/core/cuda_device.cu
//   ./hopper_epilogues [SHAPE [CASE]]    one line a case: milliseconds (median of 20), TFLOP/s
//
// Times alone: the tests of the ops check results. Random bf16 everywhere.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "ffn/cuda/hopper_epilogues.h"
#include "linear_cross_entropy/cuda/hopper_epilogues.h"

namespace llmfast::cuda {
namespace {

const Stream kStream{0, nullptr};
const char *only_shape = nullptr, *only_case = nullptr;

template <class T>
T* allocate(int64_t count) {
  void* memory = nullptr;
  require_success(cudaMalloc(&memory, count * sizeof(T)), "memory");
  require_success(cudaMemset(memory, 0, count * sizeof(T)), "memory");
  return static_cast<T*>(memory);
}

__global__ void fill_kernel(bf16* to, int64_t count, float scale) {
  for (int64_t i = blockIdx.x * int64_t{256} + thread(); i < count; i += int64_t{256} * gridDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
    to[i] = from_float<bf16>(((x >> 8) * (2.0f / 16777216.0f) - 1.0f) * scale);
  }
}
bf16* random_values(int64_t count, float scale) {
  bf16* to = allocate<bf16>(count);
  launch(kStream, {1024}, 256, 0, fill_kernel, to, count, scale);
  return to;
}

void time_case(const char* name, GemmShape shape, double products, const std::function<void()>& run) {
  if (only_case && !std::strstr(name, only_case)) return;
  std::printf("  %-24s ", name);
  std::fflush(stdout);
  cudaEvent_t start, end;
  cudaEventCreate(&start), cudaEventCreate(&end);
  for (int i = 0; i < 3; ++i) run();
  require_success(cudaDeviceSynchronize(), name);
  std::vector<float> times(20);
  for (float& time : times) {
    cudaEventRecord(start);
    run();
    cudaEventRecord(end);
    require_success(cudaEventSynchronize(end), name);
    cudaEventElapsedTime(&time, start, end);
  }
  std::sort(times.begin(), times.end());
  const double flops = 2.0 * products * shape.M * shape.N * shape.K;
  std::printf("%8.4f ms %7.1f TFLOP/s\n", times[10], flops / times[10] * 1e-9);
  std::fflush(stdout);
}

template <class Tile, Major kB, class Epilogue>
void time_tile(const char* name, const Operand& a, const Operand& b, const Operand* second, GemmShape shape,
               const Epilogue& epilogue) {
  time_case(name, shape, second ? 2 : 1, [&] {
    launch_hopper_gemm<bf16, Tile, Major::k, kB>(a, b, shape, {1, shape.K}, epilogue, kStream,
                                                 Tile::kN == 256 ? 16 : 12, {nullptr, second});
  });
}
template <Major kB, class Epilogue>
void time_both(const char* name, const Operand& a, const Operand& b, const Operand* second, GemmShape shape,
               const Epilogue& epilogue) {
  char text[64];
  std::snprintf(text, sizeof text, "%s 128x256", name);
  time_tile<HopperWideTile, kB>(text, a, b, second, shape, epilogue);
  std::snprintf(text, sizeof text, "%s pp128x128", name);
  time_tile<HopperLargeTile, kB>(text, a, b, second, shape, epilogue);
}

void time_shape(const char* shape_name, GemmShape s) {
  if (only_shape && std::strcmp(only_shape, "all") != 0 && std::strcmp(only_shape, shape_name) != 0) return;
  std::printf("== %s: %lldx%lldx%lld\n", shape_name, (long long)s.M, (long long)s.N, (long long)s.K);
  const float scale = 1.7f / std::sqrt(static_cast<float>(s.K));
  const Operand a{random_values(s.M * s.K, 1.0f), s.K, 1};
  const bf16 *weights = random_values(s.N * s.K, scale), *more = random_values(s.N * s.K, scale);
  const Operand by_k{weights, s.K, 1}, by_n{weights, 1, s.N}, second{more, s.K, 1};
  const bf16* bias = random_values(s.N, 1.0f);
  bf16 *c = random_values(s.M * s.N, 1.0f), *d = random_values(s.M * s.N, 1.0f), *e = allocate<bf16>(s.M * s.N);
  bf16 *f = allocate<bf16>(s.M * s.N), *g = allocate<bf16>(s.M * s.N);
  auto* sums = allocate<float>(ceil_div(s.M, 64) * s.N);
  const auto map = [&](const bf16* data) { return make_tensor_map(mapped_rows(data, s.N, s)); };
  const auto store = OnHopper<StoreEpilogue<bf16>>::make({c, s.N}, s);
  const auto biased = OnHopper<StoreEpilogue<bf16>>::make({c, s.N, bias}, s);
  using Gelu = OneActivation<GeluTanh>;
  using Gate = OneActivation<Silu>;
  time_both<Major::k>("store", a, by_k, nullptr, s, store);
  time_both<Major::k>("bias", a, by_k, nullptr, s, biased);
  time_both<Major::k>("gelu", a, by_k, nullptr, s, HiddenBoxes<bf16, Gelu>{map(c), map(d), bias, s.N, {}, false});
  time_both<Major::k>("gelu, saved", a, by_k, nullptr, s, HiddenBoxes<bf16, Gelu>{map(c), map(d), bias, s.N, {}, true});
  time_both<Major::k>("swiglu, saved", a, by_k, &second, s,
                      GatedBoxes<bf16, Gate>{map(c), map(d), map(e), nullptr, s.N, {}, true});
  time_both<Major::mn>("store, k,mn", a, by_n, nullptr, s, store);
  time_tile<HopperReadTile, Major::mn>("gelu slope pp128x128", a, by_n, nullptr, s,
                                       SlopeBoxes<bf16, false, Gelu>{map(e), map(f), map(f), map(d), map(d), {}, sums,
                                                                     s.M, s.N});
  time_tile<HopperReadTile, Major::mn>("swiglu slope pp128x128", a, by_n, nullptr, s,
                                       SlopeBoxes<bf16, true, Gate>{map(e), map(f), map(g), map(d), map(c), {}, nullptr,
                                                                    s.M, s.N});
  auto* parts = allocate<cross_entropy::LogSum>(s.M * ceil_div(s.N, 128));
  float *row = allocate<float>(s.M), *other = allocate<float>(s.M);
  auto* target = allocate<int64_t>(s.M);
  time_both<Major::k>("log sums", a, by_k, nullptr, s, LogSumRows{parts, row, target, s.M, s.N, 0});
  time_both<Major::k>("logit gradients", a, by_k, nullptr, s,
                      LogitGradientBoxes<bf16>{map(c), row, other, target, s.M, 0, -100});
  for (const void* memory : {a.data, (const void*)weights, (const void*)more, (const void*)bias, (const void*)c,
                             (const void*)d, (const void*)e, (const void*)f, (const void*)g, (const void*)parts,
                             (const void*)row, (const void*)sums, (const void*)other, (const void*)target})
    cudaFree(const_cast<void*>(memory));
}

}  // namespace
}  // namespace llmfast::cuda

int main(int count, char** arguments) {
  using namespace llmfast::cuda;
  if (count > 1) only_shape = arguments[1];
  if (count > 2) only_case = arguments[2];
  time_shape("gpt2", {65536, 3072, 768});
  time_shape("4096", {8192, 11008, 4096});
  time_shape("logits", {8192, 16384, 768});
  return 0;
}
