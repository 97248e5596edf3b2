#include "bindings/run.h"

#include <atomic>

#include "attention/attention_checks.h"
#include "attention/attention_cuda.h"
#include "bindings/eager.h"
#include "embedding/embedding_cuda.h"
#include "ffn/ffn_cuda.h"
#include "linear/linear_cuda.h"
#include "linear_cross_entropy/linear_cross_entropy_cuda.h"
#include "norm/norm_cuda.h"
#include "rotary/rotary_cuda.h"

namespace py = pybind11;

namespace llmfast {
namespace {

// enqueue(stream) on torch's current stream of a tensor's device, without the GIL.
template <class Enqueue>
void on_stream_of(const TensorView& tensor, const Enqueue& enqueue) {
  const Stream stream{tensor.device, current_stream(tensor.device)};
  const py::gil_scoped_release release;
  enqueue(stream);
}

// The same with `floats` of workspace. It is freed when the call returns, before the kernel ran: torch's allocator gives
// the memory to later work of the same stream only.
template <class Params, class... More>
void enqueue(void (*op)(const Params&, const More&..., const Stream&), Params params, const TensorView& tensor,
             int64_t floats, const More&... more) {
  py::object owner;
  if (floats > 0) owner = new_tensor(tensor, DType::f32, {floats}, &params.workspace);
  on_stream_of(tensor, [&](const Stream& stream) { op(params, more..., stream); });
}

// With int64 offsets, which live as long as `owner`.
AttentionArguments with_wide_offsets(AttentionArguments a, py::object* owner) {
  const TensorView q = a.cu_seqlens_q, k = a.cu_seqlens_k;
  if (!q.defined || q.dtype != DType::i32 || k.dtype != DType::i32) return a;
  const int64_t count = q.shape[0];
  TensorView wide;
  *owner = new_tensor(q, DType::i64, {2, count}, &wide);
  on_stream_of(q, [&](const Stream& stream) { cuda::widen_offsets(q, k, wide, stream); });
  a.cu_seqlens_q = {wide.data, DType::i64, 1, true, q.device, {count}, {1}};
  a.cu_seqlens_k = {wide.as<int64_t>() + count, DType::i64, 1, true, q.device, {count}, {1}};
  return a;
}

// A function of llmfast.backend.
py::object backend_function(const char* name) { return py::module_::import("llmfast.backend").attr(name); }

int64_t rows_of(const TensorView& t) { return t.shape[t.ndim - 1] ? t.numel() / t.shape[t.ndim - 1] : 0; }

}  // namespace

void run(const AttentionArguments& a) {
  const bool packed = a.cu_seqlens_q.defined;
  const int64_t floats = packed ? 0
                                : cuda::attention_workspace(a.q.shape[0], a.q.shape[1], a.k.shape[1], a.q.shape[2],
                                                            a.k.shape[2], a.v.shape[3]);
  py::object owner;
  enqueue<AttentionArguments>(attention_forward, with_wide_offsets(a, &owner), a.q, floats);
}

void run(const AttentionArguments& given, const AttentionGradients& g) {
  AttentionArguments a = given;
  a.any_order = !backend_function("deterministic")().cast<bool>();
  const AttentionParams p = checked_attention(a);
  const bool packed = a.cu_seqlens_q.defined;
  const int64_t sums = packed ? 0 : cuda::attention_backward_sums(p, a.q.device);
  const int64_t floats = cuda::attention_backward_workspace(p.B, p.Hq, p.Tq, packed) + sums;
  py::object owner;
  enqueue<AttentionArguments, AttentionGradients>(attention_backward, with_wide_offsets(a, &owner), a.q, floats, g);
}

void run(const EmbeddingParams& p) {
  on_stream_of(p.out, [&](const Stream& stream) { embedding_forward(p, stream); });
}

void run(const EmbeddingBackwardParams& p) {
  on_stream_of(p.grad, [&](const Stream& stream) { embedding_backward(p, stream); });
}

void run(const FfnParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], F = p.up_weight.shape[0], bytes = size_of(p.x.dtype);
  enqueue(ffn_forward, p, p.x, cuda::ffn_workspace(M, C, F, bytes, p.gate_weight.defined, p.up.defined));
}

void run(const FfnBackwardParams& p) {
  const int64_t M = p.grad.shape[0], C = p.grad.shape[1], F = p.up_weight.shape[0], bytes = size_of(p.grad.dtype);
  enqueue(ffn_backward, p, p.grad, cuda::ffn_backward_workspace(M, C, F, bytes, p.gate_weight.defined));
}

void run(const LinearParams& p) {
  enqueue(linear_forward, p, p.x, cuda::linear_workspace(p.x.shape[0], p.weight.shape[0], p.x.shape[1]));
}

void run(const LinearBackwardParams& p) {
  const int64_t M = p.grad.shape[0], N = p.grad.shape[1], K = p.x.shape[1];
  enqueue(linear_backward, p, p.grad, cuda::linear_backward_workspace(M, N, K));
}

void run(const LinearCrossEntropyParams& p) {
  enqueue(linear_cross_entropy_forward, p, p.x, cuda::linear_cross_entropy_workspace(p.x.shape[0]));
}

void run(const LinearCrossEntropyBackwardParams& p) {
  const int64_t M = p.x.shape[0], C = p.x.shape[1], V = p.weight.shape[0], bytes = size_of(p.x.dtype);
  enqueue(linear_cross_entropy_backward, p, p.x, cuda::linear_cross_entropy_backward_workspace(M, C, V, bytes));
}

void run(const LossReductionParams& p) {
  on_stream_of(p.losses, [&](const Stream& stream) { reduce_losses(p, stream); });
}

void run(const LossGradientParams& p) {
  on_stream_of(p.grad, [&](const Stream& stream) { spread_loss_gradient(p, stream); });
}

void run(const NormParams& p) {
  on_stream_of(p.x, [&](const Stream& stream) { norm_forward(p, stream); });
}

void run(const NormBackwardParams& p) {
  const int gradients = p.grad_weight.defined + p.grad_bias.defined;
  const int64_t M = p.summed.ndim ? rows_of(p.summed) : 0;
  const int64_t floats = M && gradients ? norm_backward_workspace(M, p.summed.shape[p.summed.ndim - 1], gradients) : 0;
  enqueue(norm_backward, p, p.summed, floats);
}

void run(const RotaryParams* tensors, int count) {
  on_stream_of(tensors[0].x, [&](const Stream& stream) {
    for (int i = 0; i < count; ++i) rotary(tensors[i], stream);
  });
}

void prepare(const TensorView&) {}

bool serves(int device) {
  constexpr int kKnown = 64;
  static std::atomic<int8_t> known[kKnown] = {};  // 0: not asked yet; 1: yes; -1: no
  if (device < 0 || device >= kKnown) return false;
  int8_t answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    answer = device < device_count() && runs_on(Arch::sm80, device_info(device)) ? 1 : -1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer > 0;
}

bool takes_vector(const TensorView& vector) { return vector.contiguous(); }
bool takes_head_dims(int64_t D, int64_t Dv) { return D <= cuda::kMostHeadDim && Dv <= cuda::kMostHeadDim; }
bool takes_offsets(const TensorView& q, const TensorView& k) {
  return q.dtype == k.dtype && q.contiguous() && k.contiguous();
}

TensorView scratch_floats(const TensorView& like, std::initializer_list<int64_t> shape, py::object* owner) {
  TensorView view;
  *owner = new_tensor(like, DType::f32, shape, &view);
  return view;
}

}  // namespace llmfast
