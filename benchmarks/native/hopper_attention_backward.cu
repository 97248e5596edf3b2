// Hopper's attention backward alone: right on sampled rows (against plain loops in double), the same bits twice, and
// how fast, kernel by kernel, for the tile shapes that only measurement can choose between.
//
//   nvcc -std=c++17 -O3 -DLLMFAST_TARGET=cuda -Icsrc -gencode=arch=compute_90a,code=sm_90a -t 0
//     benchmarks/native/hopper_attention_backward.cu csrc/attention/attention_bwd_sm80.cu csrc/core/cuda_device.cu
//     -o hopper_attention_backward
// (One file above 500 lines: a program that a single command builds and copies.)
//   ./hopper_attention_backward check [part of a case's name]
//   ./hopper_attention_backward time [part of a case's name]      the ways, from the first kernel to the last
//   ./hopper_attention_backward kernels [part of a case's name]   and kernels of other tile shapes
//
// FLOPs are those of five products of the visible scores, whatever is computed twice. With a plain C++ compiler and the
// emulated machine (csrc/ptx/emulated/*.cpp) `check` runs without a GPU.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "attention/attention_bwd_sm90a.cu"

namespace llmfast::cuda {
namespace {

const Stream kStream{0, nullptr};

template <class T>
T* allocate(int64_t count) {
  void* memory = nullptr;
#ifdef __CUDACC__
  require_success(cudaMalloc(&memory, count * sizeof(T)), "memory");
#else
  memory = std::aligned_alloc(1024, (count * sizeof(T) + 1023) / 1024 * 1024);
#endif
  return static_cast<T*>(memory);
}
void release(void* memory) {
#ifdef __CUDACC__
  cudaFree(memory);
#else
  std::free(memory);
#endif
}
template <class T>
std::vector<T> read(const T* from, int64_t count) {
  std::vector<T> values(count);
#ifdef __CUDACC__
  require_success(cudaMemcpy(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), "copy");
#else
  std::memcpy(values.data(), from, count * sizeof(T));
#endif
  return values;
}
template <class T>
void write(T* to, const std::vector<T>& values) {
#ifdef __CUDACC__
  require_success(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
#else
  std::memcpy(to, values.data(), values.size() * sizeof(T));
#endif
}
void finish() {
#ifdef __CUDACC__
  require_success(cudaDeviceSynchronize(), "kernel");
#endif
}

// ---- inputs ---------------------------------------------------------------------------------------------------------

__device__ float random_normal(uint64_t index, uint32_t seed) {  // nearly: the sum of four uniforms, variance 1
  uint64_t x = index * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
  x ^= x >> 30, x *= 0xbf58476d1ce4e5b9ull, x ^= x >> 27, x *= 0x94d049bb133111ebull, x ^= x >> 31;
  const float sum = (x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48);
  return (sum / 65536.0f - 2.0f) * 1.7320508f;
}
__global__ void fill_kernel(bf16* to, int64_t count, uint32_t seed) {
  const int64_t i = blockIdx.x * int64_t{256} + thread();
  if (i < count) to[i] = from_float<bf16>(random_normal(i, seed));
}
__global__ void fill_lse_kernel(float* to, int64_t count, float value, uint32_t seed) {
  const int64_t i = blockIdx.x * int64_t{256} + thread();
  if (i < count) to[i] = value + 0.3f * random_normal(i, seed);
}
__global__ void poison_kernel(uint32_t* to, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{256} + thread();
  if (i < count) to[i] = 0xffffffffu;
}
template <class... Parameters, class... Arguments>
void over(int64_t count, void (*kernel)(Parameters...), Arguments... arguments) {
  launch(kStream, {static_cast<unsigned>(ceil_div(count, 256))}, 256, 0, kernel, arguments...);
}

// Boolean masks of keys alone, [B,1,1,Tk], and with causal, [B,1,Tq,Tk]; a float for each head and pair, [1,H,Tq,Tk],
// -inf after the diagonal.
enum class Mask { none, padding, causal_padding, bias };

struct Case {
  const char* name;
  int64_t B, Hq, Hkv, Tq, Tk, D;
  int64_t left, right;
  float softcap;
  std::vector<int64_t> first_q, first_k;  // packed: of Tq and Tk tokens in all
  Mask mask = Mask::none;

  bool sees(int64_t sequence, int64_t query, int64_t key) const {  // beside the band
    const int64_t lengths[] = {Tk, Tk * 3 / 4 - 36, Tk / 3 + 17, 31};
    if (mask == Mask::none) return true;
    if (mask != Mask::padding && key > query + Tk - Tq) return false;
    return mask == Mask::bias || key < lengths[sequence % 4];
  }
};

// Heads of a token side by side, as models have them.
HeadTensor heads_of(bf16* data, int64_t tokens, int64_t heads, int64_t D, bool packed) {
  return {data, DType::bf16, packed ? 0 : tokens * heads * D, D, heads * D};
}

struct Problem {
  AttentionBackwardParams p = {};
  std::vector<void*> owned;
  int64_t q_elements, k_elements;
  bf16 *grad_q, *grad_k, *grad_v;
  float* query_sums;

  template <class T>
  T* own(int64_t count) {
    T* memory = allocate<T>(count);
    owned.push_back(memory);
    return memory;
  }
  bf16* random(int64_t count, uint32_t seed) {
    bf16* memory = own<bf16>(count);
    over(count, fill_kernel, memory, count, seed);
    return memory;
  }
  explicit Problem(const Case& c) {
    const bool packed = !c.first_q.empty();
    const int64_t sequences = packed ? 1 : c.B;
    p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.D = p.Dv = c.D, p.Tq = c.Tq, p.Tk = c.Tk;
    p.left = c.left, p.right = c.right, p.softcap = c.softcap;
    p.scale = 1.0f / sqrtf(static_cast<float>(c.D));
    q_elements = sequences * c.Tq * c.Hq * c.D, k_elements = sequences * c.Tk * c.Hkv * c.D;
    p.q = heads_of(random(q_elements, 1), c.Tq, c.Hq, c.D, packed);
    p.k = heads_of(random(k_elements, 2), c.Tk, c.Hkv, c.D, packed);
    p.v = heads_of(random(k_elements, 3), c.Tk, c.Hkv, c.D, packed);
    p.out = heads_of(random(q_elements, 4), c.Tq, c.Hq, c.D, packed);
    p.grad_out = heads_of(random(q_elements, 5), c.Tq, c.Hq, c.D, packed);
    p.grad_q = heads_of(grad_q = own<bf16>(q_elements), c.Tq, c.Hq, c.D, packed);
    p.grad_k = heads_of(grad_k = own<bf16>(k_elements), c.Tk, c.Hkv, c.D, packed);
    p.grad_v = heads_of(grad_v = own<bf16>(k_elements), c.Tk, c.Hkv, c.D, packed);
    // Any numbers will do as lse and out: the formula takes them as they are. These keep the weights' sums near 1.
    const int64_t rows = sequences * c.Hq * c.Tq;
    float* const lse = own<float>(rows);
    over(rows, fill_lse_kernel, lse, rows, logf(static_cast<float>(c.Tk) / 2) + 0.5f, 6u);
    p.lse = {lse, DType::f32, packed ? 0 : c.Hq * c.Tq, c.Tq, 1};
    if (c.mask != Mask::none) set_mask(c);
    const int64_t statistics = attention_backward_workspace(c.B, c.Hq, c.Tq, packed);
    const int64_t classes = p.mask.data ? MaskClasses(p).floats() : 0;
    p.workspace = own<float>(statistics + classes + query_sums_floats(c.B, c.Hq, c.Tq, packed, c.D <= 64 ? 64 : 128));
    query_sums = p.workspace + statistics;
    if (packed) {
      int64_t *const first_q = own<int64_t>(c.B + 1), *const first_k = own<int64_t>(c.B + 1);
      write(first_q, c.first_q), write(first_k, c.first_k);
      p.first_q = first_q, p.first_k = first_k;
    }
    spoil_results();
    finish();
  }
  void set_mask(const Case& c) {
    const bool of_rows = c.mask != Mask::padding, adds = c.mask == Mask::bias;
    const int64_t planes = adds ? c.Hq : c.B, rows = of_rows ? c.Tq : 1;
    std::vector<uint8_t> shown(planes * rows * c.Tk);
    for (int64_t i = 0; i < static_cast<int64_t>(shown.size()); ++i)
      shown[i] = c.sees(i / (rows * c.Tk), i / c.Tk % rows, i % c.Tk);
    const int64_t row_stride = of_rows ? c.Tk : 0, plane_stride = rows * c.Tk;
    if (adds) {
      std::vector<float> values(shown.size());
      for (size_t i = 0; i < values.size(); ++i)
        values[i] = shown[i] ? 0.01f * static_cast<float>(i % 97) : -__builtin_inff();
      float* const data = own<float>(values.size());
      write(data, values);
      p.mask = {data, DType::f32, 0, plane_stride, row_stride, 1};
    } else {
      uint8_t* const data = own<uint8_t>(shown.size());
      write(data, shown);
      p.mask = {data, DType::boolean, plane_stride, 0, row_stride, 1};
    }
  }
  void spoil_results() {
    over(q_elements / 2, poison_kernel, reinterpret_cast<uint32_t*>(grad_q), q_elements / 2);
    for (bf16* grad : {grad_k, grad_v})
      over(k_elements / 2, poison_kernel, reinterpret_cast<uint32_t*>(grad), k_elements / 2);
  }
  ~Problem() {
    for (void* memory : owned) release(memory);
  }
};

// ---- variants -------------------------------------------------------------------------------------------------------

using Run = void (*)(const AttentionBackwardParams&, const Stream&);
struct Variant {
  const char* name;
  int kD;
  Run run, run_capped;
};

template <class Layout, bool kCounted = true>
Variant keys_variant(const char* name) {
  return {name, Layout::kD, launch_keys<bf16, Layout, Scoring::plain, kCounted>,
          launch_keys<bf16, Layout, Scoring::capped, kCounted>};
}
template <class Layout, bool kCounted = true>
Variant queries_variant(const char* name) {
  return {name, Layout::kD, launch_queries<bf16, Layout, Scoring::plain, kCounted>,
          launch_queries<bf16, Layout, Scoring::capped, kCounted>};
}
// Rows of the other side's tiles x stages; +: does not drain; before: no Overlap.
constexpr Overlap kNone = Overlap::none;
const std::vector<Variant> kKeys = {
    keys_variant<KeysLayout<128, 64, 2>>("keys 64 x 2"),
    keys_variant<KeysLayout<128, 64, 2, true, kNone>>("keys 64 x 2, before"),
    keys_variant<KeysLayout<64, 128, 2>>("keys 128 x 2"),
    keys_variant<KeysLayout<64, 128, 2, true, kNone>>("keys 128 x 2, before"),
    keys_variant<KeysLayout<64, 64, 4>>("keys 64 x 4"),
    keys_variant<KeysLayout<64, 64, 4, false>>("keys 64 x 4 +")};
const std::vector<Variant> kQueries = {
    queries_variant<QueriesLayout<128, 128, 2>>("queries 128 x 2"),
    queries_variant<QueriesLayout<128, 128, 2, true, kNone>>("queries 128 x 2, before"),
    queries_variant<QueriesLayout<128, 64, 3, false>>("queries 64 x 3 +"),
    queries_variant<QueriesLayout<64, 128, 3, false>>("queries 128 x 3 +"),
    queries_variant<QueriesLayout<64, 128, 3, false, kNone>>("queries 128 x 3 +, before"),
    queries_variant<QueriesLayout<64, 128, 3>>("queries 128 x 3")};

template <class Layout>
Variant joint_variant(const char* name) {
  return {name, Layout::kD, launch_jointly<bf16, Layout, false>, launch_jointly<bf16, Layout, true>};
}
// In any order of additions, or in turns.
const std::vector<Variant> kJoint = {
    joint_variant<JointLayout<128, 64, 2, false>>("joint 64 x 2"),
    joint_variant<JointLayout<128, 64, 2, true>>("ordered 64 x 2"),
    joint_variant<JointLayout<64, 128, 2, false>>("joint 128 x 2"),
    joint_variant<JointLayout<64, 128, 2, true>>("ordered 128 x 2")};

void run_statistics(const AttentionBackwardParams& p, int kD, float* sums = nullptr, bool zeroes = true) {
  if (kD == 64) launch_query_statistics<bf16, 8>(p, kStream, sums, zeroes);
  else launch_query_statistics<bf16, 16>(p, kStream, sums, zeroes);
}
void run_rounding(const AttentionBackwardParams& p, int kD) {
  if (kD == 64) launch_rounding<bf16, 64>(p, kStream);
  else launch_rounding<bf16, 128>(p, kStream);
}
int padded(int64_t D) { return D <= 64 ? 64 : 128; }
void run_variant(const Variant& v, const AttentionBackwardParams& p) {
  (p.softcap > 0 ? v.run_capped : v.run)(p, kStream);
}
bool is_ordered(const Variant& v) { return v.name[0] == 'o'; }
void run_jointly(const Variant& v, const Problem& problem) {
  run_statistics(problem.p, v.kD, problem.query_sums, !is_ordered(v));
  run_variant(v, problem.p);
  run_rounding(problem.p, v.kD);
}

// ---- plain loops ----------------------------------------------------------------------------------------------------

constexpr int kPlain = 128;  // threads; D <= kPlain

__device__ double dot(const bf16* a, const bf16* b, int D) {
  double sum = 0;
  for (int d = 0; d < D; ++d) sum += static_cast<double>(to_float(a[d])) * to_float(b[d]);
  return sum;
}

// p and ds of one query and key.
__device__ void plain_pair(const AttentionBackwardParams& p, const Sequence& s, int head, int query, int key,
                           double* weight, double* gradient) {
  const int D = static_cast<int>(p.D), kv = head / static_cast<int>(p.Hq / p.Hkv);
  *weight = *gradient = 0;
  const Band band{s.Tq, s.Tk, p.left, p.right};
  if (!band.keys_of(query).has(key)) return;
  const bf16* const grad = row_of<const bf16>(p.grad_out, s.index, head, s.first_q + query);
  double score = p.scale * dot(row_of<const bf16>(p.q, s.index, head, s.first_q + query),
                               row_of<const bf16>(p.k, s.index, kv, s.first_k + key), D);
  if (p.mask.data) {
    const char* const at = mask_element(p, s.index, head, query, key);
    if (p.mask.dtype == DType::boolean ? !*at : hides(*reinterpret_cast<const float*>(at))) return;
    if (p.mask.dtype != DType::boolean) score += *reinterpret_cast<const float*>(at);
  }
  double slope = 1;
  if (p.softcap > 0) {
    const double t = tanh(score / p.softcap);
    score = p.softcap * t, slope = 1 - t * t;
  }
  *weight = exp(score - *row_of<const float>(p.lse, s.index, head, s.first_q + query));
  const double delta = dot(grad, row_of<const bf16>(p.out, s.index, head, s.first_q + query), D);
  *gradient = *weight * (dot(grad, row_of<const bf16>(p.v, s.index, kv, s.first_k + key), D) - delta) * slope;
}

// Largest difference of a row from the plain sums, as a share of its largest element.
__device__ void report(double exact, const bf16* ours, int D, float* share) {
  __shared__ double wanted[kPlain];
  __syncthreads();
  wanted[thread()] = exact;
  __syncthreads();
  if (thread() == 0) {
    double largest = 1e-6, error = 0;
    for (int d = 0; d < D; ++d) {
      const double difference = fabs(wanted[d] - to_float(ours[d]));
      error = difference <= error ? error : difference;  // NaN sticks
      largest = fabs(wanted[d]) > largest ? fabs(wanted[d]) : largest;
    }
    *share = static_cast<float>(error / largest);
  }
}

// samples: {sequence, head, token}; a block each.
__global__ void plain_grad_q_kernel(const AttentionBackwardParams p, const int* samples, float* shares) {
  __shared__ double gradients[kPlain];
  const int* const sample = samples + 3 * blockIdx.x;
  const Sequence s = sequence_of(p, sample[0]);
  const int D = static_cast<int>(p.D), head = sample[1], query = sample[2], kv = head / static_cast<int>(p.Hq / p.Hkv);
  double sum = 0;
  for (int first = 0; first < s.Tk; first += kPlain) {
    double weight = 0, gradient = 0;
    if (first + thread() < s.Tk) plain_pair(p, s, head, query, first + thread(), &weight, &gradient);
    gradients[thread()] = gradient;
    __syncthreads();
    for (int j = 0; j < kPlain && first + j < s.Tk && thread() < D; ++j)
      if (gradients[j] != 0)
        sum += gradients[j] * to_float(row_of<const bf16>(p.k, s.index, kv, s.first_k + first + j)[thread()]);
    __syncthreads();
  }
  report(sum * p.scale, row_of<const bf16>(p.grad_q, s.index, head, s.first_q + query), D, shares + blockIdx.x);
}

__global__ void plain_grad_kv_kernel(const AttentionBackwardParams p, const int* samples, float* shares) {
  __shared__ double weights[kPlain], gradients[kPlain];
  const int* const sample = samples + 3 * blockIdx.x;
  const Sequence s = sequence_of(p, sample[0]);
  const int D = static_cast<int>(p.D), kv = sample[1], key = sample[2], group = static_cast<int>(p.Hq / p.Hkv);
  double sum_k = 0, sum_v = 0;
  for (int head = kv * group; head < (kv + 1) * group; ++head)
    for (int first = 0; first < s.Tq; first += kPlain) {
      double weight = 0, gradient = 0;
      if (first + thread() < s.Tq) plain_pair(p, s, head, first + thread(), key, &weight, &gradient);
      weights[thread()] = weight, gradients[thread()] = gradient;
      __syncthreads();
      for (int i = 0; i < kPlain && first + i < s.Tq && thread() < D; ++i) {
        if (weights[i] == 0) continue;
        const int64_t row = s.first_q + first + i;
        sum_k += gradients[i] * to_float(row_of<const bf16>(p.q, s.index, head, row)[thread()]);
        sum_v += weights[i] * to_float(row_of<const bf16>(p.grad_out, s.index, head, row)[thread()]);
      }
      __syncthreads();
    }
  report(sum_k * p.scale, row_of<const bf16>(p.grad_k, s.index, kv, s.first_k + key), D, shares + 2 * blockIdx.x);
  report(sum_v, row_of<const bf16>(p.grad_v, s.index, kv, s.first_k + key), D, shares + 2 * blockIdx.x + 1);
}

int failures = 0;

// Rows at both ends of every sequence, and some in between.
std::vector<int> samples_of(const Case& c, bool of_keys, int between) {
  std::vector<int> samples;
  const int heads = static_cast<int>(of_keys ? c.Hkv : c.Hq);
  uint32_t random = 12345;
  for (int s = 0; s < c.B; ++s) {
    const auto& first = of_keys ? c.first_k : c.first_q;
    const int T = static_cast<int>(first.empty() ? (of_keys ? c.Tk : c.Tq) : first[s + 1] - first[s]);
    for (int i = 0; i < between + 4 && T > 0; ++i) {
      random = random * 1664525u + 1013904223u;
      const int ends[] = {0, T - 1, std::min(T - 1, 127), std::min(T - 1, 128)};
      const int token = i < 4 ? ends[i] : static_cast<int>(random >> 8) % T;
      samples.insert(samples.end(), {s, static_cast<int>(random >> 4) % heads, token});
    }
  }
  return samples;
}

void compare(const Case& c, Problem& problem, int between) {
  constexpr float kTolerated = 0.02f;  // bf16 weights and results: 0.4 % at most of a few terms
  float worst[3] = {0, 0, 0};
  for (const bool of_keys : {false, true}) {
    const std::vector<int> samples = samples_of(c, of_keys, between);
    const int count = static_cast<int>(samples.size() / 3), each = of_keys ? 2 : 1;
    int* const on_device = allocate<int>(samples.size());
    float* const shares = allocate<float>(count * each);
    write(on_device, samples);
    launch(kStream, {static_cast<unsigned>(count)}, kPlain, 0, of_keys ? plain_grad_kv_kernel : plain_grad_q_kernel,
           problem.p, static_cast<const int*>(on_device), shares);
    finish();
    const std::vector<float> found = read(shares, count * each);
    for (size_t i = 0; i < found.size(); ++i) {
      float& largest = worst[of_keys ? 1 + i % 2 : 0];
      if (!(found[i] <= largest)) largest = found[i];
    }
    release(on_device), release(shares);
  }
  bool right = true;
  for (const float share : worst) right &= share <= kTolerated;
  failures += !right;
  std::printf("  %-8s largest error / largest element: grad_q %.4f grad_k %.4f grad_v %.4f\n",
              right ? "right" : "WRONG", worst[0], worst[1], worst[2]);
  std::fflush(stdout);
}

struct Results {
  std::vector<uint32_t> q, k, v;
  explicit Results(const Problem& problem)
      : q(read(reinterpret_cast<const uint32_t*>(problem.grad_q), problem.q_elements / 2)),
        k(read(reinterpret_cast<const uint32_t*>(problem.grad_k), problem.k_elements / 2)),
        v(read(reinterpret_cast<const uint32_t*>(problem.grad_v), problem.k_elements / 2)) {}
  bool operator==(const Results& other) const { return q == other.q && k == other.k && v == other.v; }
};

// ---- cases ----------------------------------------------------------------------------------------------------------

constexpr int64_t kAny = kUnbounded;

const std::vector<Case> kChecks = {
    {"one tile d128", 1, 1, 1, 128, 128, 128, kAny, kAny, 0, {}, {}},
    {"one tile d64", 1, 1, 1, 128, 128, 64, kAny, kAny, 0, {}, {}},
    {"edges d128", 1, 1, 1, 130, 257, 128, kAny, kAny, 0, {}, {}},
    {"edges d64", 1, 1, 1, 257, 130, 64, kAny, kAny, 0, {}, {}},
    {"causal d128", 2, 2, 2, 515, 515, 128, kAny, 0, 0, {}, {}},
    {"causal d64", 2, 2, 2, 515, 515, 64, kAny, 0, 0, {}, {}},
    {"causal grouped d72", 1, 4, 2, 300, 400, 72, kAny, 0, 0, {}, {}},
    {"rows that see nothing d64", 1, 1, 1, 400, 130, 64, kAny, 0, 0, {}, {}},
    {"window d128", 1, 2, 1, 500, 500, 128, 90, 0, 0, {}, {}},
    {"softcap d128", 1, 1, 1, 200, 300, 128, kAny, 0, 2.0f, {}, {}},
    {"softcap d64", 1, 1, 1, 200, 300, 64, kAny, 0, 2.0f, {}, {}},
    {"packed d128", 3, 2, 1, 330, 360, 128, kAny, 0, 0, {0, 5, 200, 330}, {0, 25, 230, 360}},
    {"packed d64", 3, 2, 1, 330, 360, 64, 70, 3, 0, {0, 5, 200, 330}, {0, 25, 230, 360}},
    {"packed full d128", 3, 2, 1, 330, 360, 128, kAny, kAny, 0, {0, 5, 200, 330}, {0, 25, 230, 360}},
    {"padding d64", 4, 2, 1, 400, 400, 64, kAny, kAny, 0, {}, {}, Mask::padding},
    {"causal and padding d128", 4, 2, 1, 400, 400, 128, kAny, kAny, 0, {}, {}, Mask::causal_padding},
    {"bias d64", 2, 2, 2, 300, 400, 64, kAny, kAny, 0, {}, {}, Mask::bias},
    {"bias d128", 2, 2, 2, 300, 400, 128, kAny, kAny, 0, {}, {}, Mask::bias},
    {"many heads d128", 4, 16, 16, 1024, 1024, 128, kAny, 0, 0, {}, {}},
    {"many heads d64", 4, 16, 4, 1500, 1500, 64, kAny, 0, 0, {}, {}},
    {"long d128", 1, 8, 8, 4096, 4096, 128, kAny, 0, 0, {}, {}},
};

#ifdef __CUDACC__

// Keeps some multiprocessors and the memory busy beside the kernels.
__global__ void compete_kernel(uint32_t* memory, int64_t count, int rounds) {
  for (int round = 0; round < rounds; ++round)
    for (int64_t i = blockIdx.x * int64_t{512} + thread(); i < count; i += int64_t{gridDim.x} * 512)
      memory[i] = memory[i] * 1664525u + 1013904223u;
}
struct Competitor {
  static constexpr int64_t kCount = int64_t{1} << 24;
  uint32_t* memory = allocate<uint32_t>(kCount);
  cudaStream_t stream;

  Competitor() { require_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream"); }
  ~Competitor() {
    cudaStreamDestroy(stream);
    release(memory);
  }
  void run(int i) const { compete_kernel<<<16 + 29 * i % 200, 512, 0, stream>>>(memory, kCount, 1 + i % 4); }
};

#endif

// Runs everything, compares with the plain loops, and, if the order of sums is fixed, repeats bitwise.
template <class RunAll>
void check(const Case& c, Problem& problem, const char* what, bool repeats, const RunAll& run_all) {
  std::printf("check %s, %s\n", c.name, what);
  std::fflush(stdout);
  problem.spoil_results();
  run_all();
  finish();
  compare(c, problem, 12);
  if (!repeats) return;
  const Results before(problem);
  int different = 0;
#ifdef __CUDACC__
  const int times = what[0] == 'o' ? 20 : 4;  // blocks that wait for one another: more often
  const Competitor competitor;
#else
  const int times = 1;
#endif
  for (int i = 0; i < times; ++i) {
    problem.spoil_results();
#ifdef __CUDACC__
    competitor.run(i);
#endif
    run_all();
    finish();
    different += !(Results(problem) == before);
  }
  if (different) std::printf("  DIFFERENT BITS in %d of %d repetitions\n", different, times), ++failures;
}

void check(const Case& c) {
#ifndef __CUDACC__
  if (c.Tq > 600) return;
#endif
  Problem problem(c);
  const int kD = padded(c.D);
  if (c.mask != Mask::none)
    return check(c, problem, "mask", true, [&] { attention_backward_sm90a(problem.p, kStream); });
  for (const bool of_keys : {true, false})
    for (const Variant& v : of_keys ? kKeys : kQueries) {
      if (v.kD != kD) continue;
      const Variant* other = nullptr;
      for (const Variant& o : of_keys ? kQueries : kKeys)
        if (!other && o.kD == kD) other = &o;
      check(c, problem, v.name, true, [&] {
        run_statistics(problem.p, kD);
        run_variant(v, problem.p);
        run_variant(*other, problem.p);
      });
    }
  for (const Variant& v : kJoint)
    if (v.kD == kD)
      check(c, problem, v.name, is_ordered(v), [&] { run_jointly(v, problem); });
}

#ifdef __CUDACC__

const std::vector<Case> kTimes = {
    {"causal d128 t2k", 8, 16, 16, 2048, 2048, 128, kAny, 0, 0, {}, {}},
    {"causal d128 t4k", 4, 16, 16, 4096, 4096, 128, kAny, 0, 0, {}, {}},
    {"causal d128 t8k", 2, 16, 16, 8192, 8192, 128, kAny, 0, 0, {}, {}},
    {"causal d128 t16k", 1, 16, 16, 16384, 16384, 128, kAny, 0, 0, {}, {}},
    {"full d128 t4k", 4, 16, 16, 4096, 4096, 128, kAny, kAny, 0, {}, {}},
    {"full d128 t8k", 2, 16, 16, 8192, 8192, 128, kAny, kAny, 0, {}, {}},
    {"grouped causal d128 t4k", 4, 32, 8, 4096, 4096, 128, kAny, 0, 0, {}, {}},
    {"causal d64 t1k", 16, 16, 16, 1024, 1024, 64, kAny, 0, 0, {}, {}},
    {"causal d64 t4k", 4, 16, 16, 4096, 4096, 64, kAny, 0, 0, {}, {}},
    {"causal d64 t16k", 1, 16, 16, 16384, 16384, 64, kAny, 0, 0, {}, {}},
    {"padding d64 t2k", 4, 16, 16, 2048, 2048, 64, kAny, kAny, 0, {}, {}, Mask::padding},
    {"causal and padding d64 t2k", 4, 16, 16, 2048, 2048, 64, kAny, kAny, 0, {}, {}, Mask::causal_padding},
    {"bias d128 t2k", 4, 16, 16, 2048, 2048, 128, kAny, kAny, 0, {}, {}, Mask::bias},
};

template <class Body>
double milliseconds(const Body& body) {
  constexpr int kRuns = 11;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < kRuns + 2; ++i) {
    cudaEventRecord(begin);
    body();
    cudaEventRecord(end);
    require_success(cudaEventSynchronize(end), "kernel");
    float time;
    cudaEventElapsedTime(&time, begin, end);
    if (i >= 2) times.push_back(time);
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[kRuns / 2];
}

double visible_pairs(const Case& c) {
  const Band band{static_cast<int>(c.Tq), static_cast<int>(c.Tk), c.left, c.right};
  double pairs = 0;
  for (int i = 0; i < c.Tq; ++i) {
    const Span keys = band.keys_of(i);
    if (c.mask == Mask::none && !keys.empty()) pairs += static_cast<double>(keys.end - keys.begin) * c.B;
    for (int s = 0; s < c.B && c.mask != Mask::none; ++s)
      for (int j = keys.begin; j < keys.end; ++j) pairs += c.sees(s, i, j);
  }
  return pairs * static_cast<double>(c.Hq);
}

void print_way(const char* name, double ms, double product) {
  std::printf("  %-20s %8.3f ms %7.1f TFLOP/s of 5 products\n", name, ms, product * 5 / ms * 1e-9);
  std::fflush(stdout);
}

// The ways from the first kernel to the last, each with its largest errors.
void time(const Case& c) {
  Problem problem(c);
  const double product = 2.0 * visible_pairs(c) * static_cast<double>(c.D);  // FLOPs of one of the products
  const char* const names[] = {"two kernels", "in turns", "in any order"};
  AttentionParams free = problem.p;
  free.any_order = true;
  std::printf("time %s: B %ld Hq %ld Hkv %ld T %ld D %ld; by itself %s, %s if asked for the same bits\n", c.name,
              static_cast<long>(c.B), static_cast<long>(c.Hq), static_cast<long>(c.Hkv), static_cast<long>(c.Tq),
              static_cast<long>(c.D), names[static_cast<int>(backward_way(free))],
              names[static_cast<int>(backward_way(problem.p))]);
  std::fflush(stdout);
  const int64_t from = one_pass_from.exchange(kUnbounded);
  print_way("two kernels", milliseconds([&] { attention_backward_sm90a(problem.p, kStream); }), product);
  compare(c, problem, 1);
  one_pass_from = from;
  if (c.mask != Mask::none) {
    const double classes = milliseconds([&] { launch_mask_classes(problem.p, kStream, mask_classes_of(problem.p)); });
    std::printf("  %-20s before %.3f ms\n", "", classes);
    print_way("sm_80's kernels", milliseconds([&] { attention_backward_sm80(problem.p, kStream); }), product);
    return;
  }
  print_way("two kernels, before", milliseconds([&] {
              run_statistics(problem.p, padded(c.D));
              for (const auto* variants : {&kKeys, &kQueries})
                for (const Variant& v : *variants)
                  if (v.kD == padded(c.D) && std::string(v.name).find(", before") != std::string::npos)
                    run_variant(v, problem.p);
            }),
            product);
  for (const Variant& v : kJoint) {
    if (v.kD != padded(c.D)) continue;
    problem.spoil_results();
    print_way(v.name, milliseconds([&] { run_jointly(v, problem); }), product);
    const double before = milliseconds([&] { run_statistics(problem.p, v.kD, problem.query_sums, !is_ordered(v)); });
    const double after = milliseconds([&] { run_rounding(problem.p, v.kD); });
    std::printf("  %-20s before %.3f ms, after %.3f ms\n", "", before, after);
    run_jointly(v, problem);
    compare(c, problem, 1);
  }
}

// Each kernel alone, whatever else there is to choose.
void time_kernels(const Case& c) {
  Problem problem(c);
  const double product = 2.0 * visible_pairs(c) * static_cast<double>(c.D);  // FLOPs of one of the products
  std::printf("kernels %s: B %ld Hq %ld Hkv %ld T %ld D %ld\n", c.name, static_cast<long>(c.B), static_cast<long>(c.Hq),
              static_cast<long>(c.Hkv), static_cast<long>(c.Tq), static_cast<long>(c.D));
  std::fflush(stdout);
  const double statistics = milliseconds([&] { run_statistics(problem.p, padded(c.D)); });
  std::printf("  %-20s %8.3f ms\n", "statistics", statistics);
  for (const bool of_keys : {true, false})
    for (const Variant& v : of_keys ? kKeys : kQueries) {
      if (v.kD != padded(c.D)) continue;
      std::printf("  %-20s ", v.name);
      std::fflush(stdout);
      const double both = milliseconds([&] {  // the statistics' kernel resets what others count
        run_statistics(problem.p, padded(c.D));
        run_variant(v, problem.p);
      });
      const double ms = both - statistics;
      std::printf("%8.3f ms %7.1f TFLOP/s of its own %d products\n", ms, product * (of_keys ? 4 : 3) / ms * 1e-9,
                  of_keys ? 4 : 3);
    }
  const double portable = milliseconds([&] { attention_backward_sm80(problem.p, kStream); });
  std::printf("  %-20s %8.3f ms %7.1f TFLOP/s of 5 products\n", "sm_80's kernels", portable,
              product * 5 / portable * 1e-9);
  std::fflush(stdout);
}

#endif

}  // namespace

#ifndef __CUDACC__
int64_t attention_backward_workspace(int64_t B, int64_t Hq, int64_t Tq, bool packed) {
  return Hq * slots_of_head(B, Tq, packed) * kSlotRows * 2 + kCounters;
}
#endif

}  // namespace llmfast::cuda

int main(int count, char** arguments) {
  using namespace llmfast::cuda;
  const std::string what = count > 1 ? arguments[1] : "check", part = count > 2 ? arguments[2] : "";
  const auto chosen = [&](const Case& c) { return std::string(c.name).find(part) != std::string::npos; };
  if (what == "check")
    for (const Case& c : kChecks)
      if (chosen(c)) check(c);
#ifdef __CUDACC__
  for (const Case& c : kTimes)
    if (chosen(c) && what == "time") llmfast::cuda::time(c);
    else if (chosen(c) && what == "kernels") time_kernels(c);
#endif
  std::printf(failures ? "%d FAILURES\n" : "no failures\n", failures);
  return failures != 0;
}
