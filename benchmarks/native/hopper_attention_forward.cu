// The Hopper attention forward in its variants: checked against plain float32 attention on sampled rows, repeated
// bitwise, timed. No Python, no torch.
//
//   nvcc -std=c++17 -O3 -DLLMFAST_TARGET=cuda -Icsrc -gencode=arch=compute_90a,code=sm_90a
//     benchmarks/native/hopper_attention_forward.cu csrc/core/cuda_device.cu -o hopper_attention_forward
//   ./hopper_attention_forward [word ...]     only cases whose name has every word; "list" names them all
//
// A line for each case: its name before it starts, then the median time of 12 launches, TFLOP/s (4 D a pair of query
// and key that see each other; causal counts half), the largest error over the largest value, and how many of two
// repetitions differ in a bit.
// A C++ compiler builds it on the emulated machine (-x c++, with csrc/ptx/emulated/*.cpp): small cases, no times.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "attention/cuda/hopper_forward_kernel.h"

namespace llmfast::cuda {
namespace {

// ---- memory and numbers ---------------------------------------------------------------------------------------------

#ifdef __CUDACC__
constexpr bool kTimed = true;
void* allocate(size_t bytes) {
  void* memory = nullptr;
  require_success(cudaMalloc(&memory, bytes), "memory");
  return memory;
}
void deallocate(void* memory) { require_success(cudaFree(memory), "free"); }
void copy(void* to, const void* from, size_t bytes) {
  require_success(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "copy");
}
void clear(int* word) { require_success(cudaMemsetAsync(word, 0, sizeof(int)), "clear"); }
void synchronize() { require_success(cudaDeviceSynchronize(), "kernel"); }

double median_ms(const std::function<void()>& run) {
  constexpr int kWarmups = 3, kRuns = 12;
  cudaEvent_t begin[kRuns], end[kRuns];
  for (int i = 0; i < kWarmups; ++i) run();
  for (int i = 0; i < kRuns; ++i) {
    cudaEventCreate(&begin[i]);
    cudaEventCreate(&end[i]);
    cudaEventRecord(begin[i]);
    run();
    cudaEventRecord(end[i]);
  }
  synchronize();
  std::vector<float> times(kRuns);
  for (int i = 0; i < kRuns; ++i) {
    cudaEventElapsedTime(&times[i], begin[i], end[i]);
    cudaEventDestroy(begin[i]);
    cudaEventDestroy(end[i]);
  }
  std::sort(times.begin(), times.end());
  return times[kRuns / 2];
}
#else
constexpr bool kTimed = false;
void* allocate(size_t bytes) { return std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024); }
void deallocate(void* memory) { std::free(memory); }
void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void clear(int* word) { *word = 0; }
void synchronize() {}
double median_ms(const std::function<void()>&) { return 0.0; }
#endif

__device__ uint32_t hashed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// About normal, variance 1.
__global__ void fill_kernel(bf16* to, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{256} + thread(); i < count; i += gridDim.x * int64_t{256}) {
    float sum = 0.0f;
    for (uint32_t j = 0; j < 4; ++j)
      sum += static_cast<float>(hashed(static_cast<uint32_t>(i) * 4u + j + seed) >> 8) / 16777216.0f - 0.5f;
    to[i] = from_float<bf16>(sum * 1.7320508f);
  }
}

__global__ void compare_kernel(const uint32_t* a, const uint32_t* b, int64_t count, int* differ) {
  for (int64_t i = blockIdx.x * int64_t{256} + thread(); i < count; i += gridDim.x * int64_t{256})
    if (a[i] != b[i]) atomicMax(differ, 1);
}

// ---- plain attention of sampled rows --------------------------------------------------------------------------------

struct Sample {
  int sequence, head, row;  // of the sequence
};

__device__ bool sees(const AttentionParams& p, const Sequence& s, int row, int key) {
  return Band{s.Tq, s.Tk, p.left, p.right}.keys_of(row).has(key);
}

// One block a sample; scores [samples][Tk].
__global__ void reference_scores_kernel(const AttentionParams p, const Sample* samples, float* scores) {
  const Sample at = samples[blockIdx.x];
  const Sequence s = sequence_of(p, at.sequence);
  const bf16* q = row_of<const bf16>(p.q, at.sequence, at.head, s.first_q + at.row);
  for (int key = thread(); key < s.Tk; key += 128) {
    const bf16* k = row_of<const bf16>(p.k, at.sequence, at.head / (p.Hq / p.Hkv), s.first_k + key);
    float sum = 0.0f;
    for (int d = 0; d < p.D; ++d) sum += to_float(q[d]) * to_float(k[d]);
    sum *= p.scale;
    if (p.softcap > 0.0f) sum = p.softcap * tanhf(sum / p.softcap);
    scores[blockIdx.x * p.Tk + key] = sees(p, s, at.row, key) ? sum : -infinity();
  }
}
__global__ void reference_out_kernel(const AttentionParams p, const Sample* samples, const float* scores, float* out,
                                     float* lse) {
  const Sample at = samples[blockIdx.x];
  const Sequence s = sequence_of(p, at.sequence);
  const float* row = scores + blockIdx.x * p.Tk;
  float most = kLowest, sum = 0.0f;
  for (int key = 0; key < s.Tk; ++key) most = fmaxf(most, row[key]);
  for (int key = 0; key < s.Tk; ++key) sum += exp2_approx((row[key] - most) * kLog2E);
  if (thread() == 0) lse[blockIdx.x] = sum == 0.0f ? -infinity() : most + logf(sum);
  for (int d = thread(); d < p.Dv; d += 128) {
    float total = 0.0f;
    for (int key = 0; key < s.Tk; ++key)
      if (row[key] > -infinity())
        total += exp2_approx((row[key] - most) * kLog2E) *
                 to_float(row_of<const bf16>(p.v, at.sequence, at.head / (p.Hq / p.Hkv), s.first_k + key)[d]);
    out[blockIdx.x * p.Dv + d] = sum == 0.0f ? 0.0f : total / sum;
  }
}

// ---- cases ----------------------------------------------------------------------------------------------------------

struct Shape {
  const char* name;
  int B, Hq, Hkv, Tq, Tk, D, Dv;
  int64_t left = kUnbounded, right = kUnbounded;
  float softcap = 0.0f;
  std::vector<int64_t> lengths = {};  // packed sequences; B = how many, Tq = Tk = their sum
};

enum class Order { chosen, by_head };  // by_head: every key/value head a section

struct Variant {
  std::string name;
  int kD;
  bool softcap;  // is built
  std::function<void(const AttentionParams&, int, int)> run;
};

template <class Tile, bool kSoftcap = false>
Variant variant() {
  std::string name = "hd" + std::to_string(Tile::kD) + "-" + std::to_string(Tile::kRows) + "x" +
                     std::to_string(Tile::kKeys) + "-overlapped-turns";
  if (Tile::kKeyStages != 2 || Tile::kValueStages != 2)
    name += "-stages" + std::to_string(Tile::kKeyStages) + std::to_string(Tile::kValueStages);
  return {name, Tile::kD, kSoftcap, [](const AttentionParams& p, int blocks, int sections) {
            if constexpr (kSoftcap)
              if (p.softcap > 0.0f)
                return launch_hopper_forward<bf16, Tile, Masking::anything>(p, Stream{0, nullptr}, blocks, sections);
            launch_hopper_forward<bf16, Tile, Masking::band>(p, Stream{0, nullptr}, blocks, sections);
          }};
}

struct Buffers {  // [B, T, H, D]
  bf16 *q, *k, *v, *out;
  float* lse;
  int64_t* first = nullptr;
  int64_t out_bytes, lse_bytes;
  AttentionParams p = {};

  explicit Buffers(const Shape& s) {
    const bool packed = !s.lengths.empty();
    const int64_t B = packed ? 1 : s.B;
    const auto make = [&](bf16*& data, int64_t tokens, int64_t heads, int64_t D, uint32_t seed) {
      data = static_cast<bf16*>(allocate(B * tokens * heads * D * 2));
      llmfast::launch(Stream{0, nullptr}, {kTimed ? 1024u : 4u}, 256, 0, fill_kernel, data, B * tokens * heads * D,
                      seed);
      return HeadTensor{data, DType::bf16, packed ? 0 : tokens * heads * D, D, heads * D};
    };
    p.B = s.B, p.Hq = s.Hq, p.Hkv = s.Hkv, p.D = s.D, p.Dv = s.Dv, p.Tq = s.Tq, p.Tk = s.Tk;
    p.left = s.left, p.right = s.right, p.softcap = s.softcap;
    p.scale = 1.0f / std::sqrt(static_cast<float>(s.D));
    p.q = make(q, s.Tq, s.Hq, s.D, 1u);
    p.k = make(k, s.Tk, s.Hkv, s.D, 1000001u);
    p.v = make(v, s.Tk, s.Hkv, s.Dv, 2000003u);
    p.out = make(out, s.Tq, s.Hq, s.Dv, 3000017u);
    out_bytes = B * s.Tq * s.Hq * s.Dv * 2;
    lse_bytes = B * s.Hq * s.Tq * 4;
    lse = static_cast<float*>(allocate(lse_bytes));
    p.lse = {lse, DType::f32, packed ? 0 : int64_t{s.Hq} * s.Tq, s.Tq, 1};
    if (packed) {
      std::vector<int64_t> bounds = {0};
      for (int64_t length : s.lengths) bounds.push_back(bounds.back() + length);
      first = static_cast<int64_t*>(allocate(bounds.size() * 8));
      copy(first, bounds.data(), bounds.size() * 8);
      p.first_q = p.first_k = first;
    }
    synchronize();
  }
  ~Buffers() {
    for (void* memory : {static_cast<void*>(q), static_cast<void*>(k), static_cast<void*>(v), static_cast<void*>(out),
                         static_cast<void*>(lse), static_cast<void*>(first)})
      if (memory) deallocate(memory);
  }
};

struct Errors {
  double out = 0, lse = 0;
};

Errors errors(const Shape& s, Buffers& buffers) {
  const AttentionParams& p = buffers.p;
  std::vector<Sample> samples;
  const int count = kTimed ? 96 : 40;
  for (int i = 0; i < count; ++i) {
    Sample at{i * 7 % s.B, i * 5 % s.Hq, 0};
    const int Tq = s.lengths.empty() ? s.Tq : static_cast<int>(s.lengths[at.sequence]);
    if (Tq == 0) continue;
    at.row = i < 8 ? Tq - 1 - Tq * i / 8 : static_cast<int>((i * 2654435761u) % static_cast<unsigned>(Tq));
    samples.push_back(at);
  }
  const unsigned n = static_cast<unsigned>(samples.size());
  Sample* on_device = static_cast<Sample*>(allocate(n * sizeof(Sample)));
  float* scores = static_cast<float*>(allocate(sizeof(float) * n * s.Tk));
  float* out = static_cast<float*>(allocate(sizeof(float) * n * s.Dv));
  float* lse = static_cast<float*>(allocate(sizeof(float) * n));
  copy(on_device, samples.data(), n * sizeof(Sample));
  llmfast::launch(Stream{0, nullptr}, {n}, 128, 0, reference_scores_kernel, p, on_device, scores);
  llmfast::launch(Stream{0, nullptr}, {n}, 128, 0, reference_out_kernel, p, on_device, scores, out, lse);
  synchronize();
  std::vector<float> expected(n * s.Dv), expected_lse(n);
  copy(expected.data(), out, expected.size() * 4);
  copy(expected_lse.data(), lse, n * 4);
  Errors worst;
  for (unsigned i = 0; i < n; ++i) {
    const Sample at = samples[i];
    int64_t token = at.row;
    for (int j = 0; j < at.sequence && !s.lengths.empty(); ++j) token += s.lengths[j];
    const int64_t sequence = s.lengths.empty() ? at.sequence : 0;
    std::vector<uint16_t> got(s.Dv);
    float got_lse = 0.0f;
    copy(got.data(), buffers.out + ((sequence * s.Tq + token) * s.Hq + at.head) * s.Dv, s.Dv * 2);
    copy(&got_lse, buffers.lse + (sequence * s.Hq + at.head) * s.Tq + token, 4);
    double most = 1e-6, error = 0;
    for (int d = 0; d < s.Dv; ++d) {
      const uint32_t bits = static_cast<uint32_t>(got[d]) << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      const double difference = std::fabs(double(value) - expected[i * s.Dv + d]);
      error = difference <= error ? error : difference;  // NaN wins
      most = std::max(most, std::fabs(double(expected[i * s.Dv + d])));
    }
    if (!(error / most <= worst.out)) worst.out = error / most;
    const double lse_error = got_lse == expected_lse[i] ? 0.0 : std::fabs(double(got_lse) - expected_lse[i]);
    if (!(lse_error <= worst.lse)) worst.lse = lse_error;
  }
  for (void* memory : {static_cast<void*>(on_device), static_cast<void*>(scores), static_cast<void*>(out),
                       static_cast<void*>(lse)})
    deallocate(memory);
  return worst;
}

double visible_pairs(const Shape& s) {  // of one head of all sequences; causal of T x T counts as half
  double pairs = 0;
  for (int b = 0; b < s.B; ++b) {
    const int Tq = s.lengths.empty() ? s.Tq : static_cast<int>(s.lengths[b]), Tk = s.lengths.empty() ? s.Tk : Tq;
    if (s.left == kUnbounded && s.right == 0 && Tq == Tk) {
      pairs += 0.5 * Tq * Tk;
      continue;
    }
    const Band band{Tq, Tk, s.left, s.right};
    for (int i = 0; i < Tq; ++i) {
      const Span keys = band.keys_of(i);
      pairs += keys.empty() ? 0 : keys.end - keys.begin;
    }
  }
  return pairs;
}

int failures = 0;

void run_case(const std::string& name, const Shape& s, const Variant& variant, Order order, int multiprocessors) {
  std::printf("%-78s ", name.c_str());
  std::fflush(stdout);
  Buffers buffers(s);
  const int sections = order == Order::chosen ? 0 : s.Hkv * (s.lengths.empty() ? s.B : 1);
  const auto run = [&] { variant.run(buffers.p, multiprocessors, sections); };
  uint32_t* first = static_cast<uint32_t*>(allocate(buffers.out_bytes));
  int* differ = static_cast<int*>(allocate(4));
  int different = 0;
  run();
  synchronize();
  copy(first, buffers.out, buffers.out_bytes);
  for (int i = 0; i < 2; ++i) {
    clear(differ);
    run();
    llmfast::launch(Stream{0, nullptr}, {kTimed ? 512u : 2u}, 256, 0, compare_kernel, first,
                    reinterpret_cast<const uint32_t*>(buffers.out), buffers.out_bytes / 4, differ);
    synchronize();
    int found = 0;
    copy(&found, differ, 4);
    different += found;
  }
  deallocate(first);
  deallocate(differ);
  const Errors e = errors(s, buffers);
  const bool right = e.out <= 1.0 / 64 && e.lse <= 2e-3 && different == 0;
  failures += !right;
  const double ms = median_ms(run), flops = 2.0 * (s.D + s.Dv) * visible_pairs(s) * s.Hq;
  if (kTimed) std::printf("%9.4f ms %7.1f TFLOP/s ", ms, flops / ms * 1e-9);
  std::printf("error %.2e lse %.1e different %d %s\n", e.out, e.lse, different, right ? "ok" : "WRONG");
  std::fflush(stdout);
}

}  // namespace
}  // namespace llmfast::cuda

int main(int count, char** words) {
  using namespace llmfast;
  using namespace llmfast::cuda;
  const int64_t none = kUnbounded;
  const std::vector<Variant> variants = {
      variant<HopperForwardTile<128, 2, 128, 2, 2, true, 40, 232>, true>(),
      variant<HopperForwardTile<64, 2, 128, 2, 2, true, 40, 232>>(),
      variant<HopperForwardTile<64, 3, 128, 2, 2, true, 32, 160>>(),
      variant<HopperForwardTile<256, 2, 80, 2, 2, false, 40, 232>>(),
  };
  // Small: every edge.
  const std::vector<Shape> checks = {
      {"full-128", 1, 1, 1, 128, 128, 0, 0},
      {"full-130x270", 2, 2, 1, 130, 270, 0, 0},
      {"causal-257", 2, 4, 2, 257, 257, 0, 0, none, 0},
      {"causal-70x400", 1, 2, 2, 70, 400, 0, 0, none, 0},
      {"causal-300x90", 1, 2, 2, 300, 90, 0, 0, none, 0},
      {"window-20-500", 1, 2, 1, 500, 500, 0, 0, 20, 0},
      {"softcap-causal-300", 1, 2, 2, 300, 300, 0, 0, none, 0, 3.0f},
      {"packed-causal", 5, 2, 1, 620, 620, 0, 0, none, 0, 0.0f, {5, 300, 0, 1, 314}},
  };
  const std::vector<Shape> timed = {
      {"causal-B16-T1k", 16, 32, 32, 1024, 1024, 0, 0, none, 0},
      {"causal-B8-T2k", 8, 16, 16, 2048, 2048, 0, 0, none, 0},
      {"causal-B4-T4k", 4, 16, 16, 4096, 4096, 0, 0, none, 0},
      {"causal-B2-T8k", 2, 16, 16, 8192, 8192, 0, 0, none, 0},
      {"causal-B1-T16k", 1, 16, 16, 16384, 16384, 0, 0, none, 0},
      {"full-B8-T2k", 8, 16, 16, 2048, 2048, 0, 0},
      {"full-B4-T4k", 4, 16, 16, 4096, 4096, 0, 0},
      {"full-B2-T8k", 2, 16, 16, 8192, 8192, 0, 0},
      {"full-B1-T16k", 1, 16, 16, 16384, 16384, 0, 0},
      {"grouped-causal-B4-T4k", 4, 32, 8, 4096, 4096, 0, 0, none, 0},
      {"window128-B2-T8k", 2, 16, 16, 8192, 8192, 0, 0, 127, 0},
      {"window128-grouped-B2-T8k", 2, 32, 8, 8192, 8192, 0, 0, 127, 0},
      {"window1024-B2-T8k", 2, 16, 16, 8192, 8192, 0, 0, 1023, 0},
  };
  const bool list = count == 2 && std::strcmp(words[1], "list") == 0;
  const int multiprocessors = list ? 0 : device_info(0).multiprocessors;
  if (!list) std::printf("%s, %d multiprocessors\n", device_info(0).name.c_str(), multiprocessors);
  for (const std::vector<Shape>* shapes : {&checks, &timed}) {
    if (!kTimed && shapes == &timed) continue;
    for (const Variant& v : variants)
      for (Shape s : *shapes) {
        if (s.softcap > 0.0f && !v.softcap) continue;
        s.D = s.Dv = v.kD;
        for (const auto& [suffix, order] :
             {std::pair<const char*, Order>{"persistent", Order::chosen}, {"by-head", Order::by_head}}) {
          // How work is handed out hardly depends on the variant.
          if (shapes == &timed && order != Order::chosen && v.name.find("x128") == std::string::npos) continue;
          const std::string name =
              std::string(shapes == &checks ? "check" : "time") + " " + v.name + " " + s.name + " " + suffix;
          bool wanted = true;
          for (int i = 1; i < count && !list; ++i) wanted = wanted && name.find(words[i]) != std::string::npos;
          if (list) std::printf("%s\n", name.c_str());
          else if (wanted) run_case(name, s, v, order, multiprocessors);
        }
      }
  }
  if (!list) std::printf("%d wrong\n", failures);
  return failures != 0;
}
