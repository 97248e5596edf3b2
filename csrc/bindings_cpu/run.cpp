#include "bindings/run.h"

#include "bindings_cpu/bindings.h"
#include "core/memory.h"
#include "core/workspace.h"

namespace py = pybind11;

namespace llmfast {
namespace {

template <class... Params>
void call(void (*op)(const Params&...), const Params&... params) {
  const KernelScope scope;
  op(params...);
}

}  // namespace

void run(const AttentionArguments& a) { call<AttentionArguments>(attention_forward, a); }
void run(const AttentionArguments& a, const AttentionGradients& g) {
  call<AttentionArguments, AttentionGradients>(attention_backward, a, g);
}
void run(const EmbeddingParams& p) { call(embedding_forward, p); }
void run(const EmbeddingBackwardParams& p) { call(embedding_backward, p); }
void run(const FfnParams& p) { call(ffn_forward, p); }
void run(const FfnBackwardParams& p) { call(ffn_backward, p); }
void run(const LinearParams& p) { call(linear_forward, p); }
void run(const LinearBackwardParams& p) { call(linear_backward, p); }
void run(const LinearCrossEntropyParams& p) { call(linear_cross_entropy_forward, p); }
void run(const LinearCrossEntropyBackwardParams& p) { call(linear_cross_entropy_backward, p); }
void run(const LossReductionParams& p) { call(reduce_losses, p); }
void run(const LossGradientParams& p) { call(spread_loss_gradient, p); }
void run(const NormParams& p) { call(norm_forward, p); }
void run(const NormBackwardParams& p) { call(norm_backward, p); }
void run(const RotaryParams* tensors, int count) {
  const KernelScope scope;
  for (int i = 0; i < count; ++i) rotary(tensors[i]);
}

void prepare(const TensorView& fresh) {
  if (fresh.defined) ask_for_large_pages(fresh.data, fresh.numel() * size_of(fresh.dtype));
}

bool serves(int) { return true; }
bool takes_vector(const TensorView&) { return true; }
bool takes_head_dims(int64_t, int64_t) { return true; }
bool takes_offsets(const TensorView&, const TensorView&) { return true; }

TensorView scratch_floats(const TensorView&, std::initializer_list<int64_t> shape, py::object*) {
  TensorView view;
  view.ndim = static_cast<int>(shape.size());
  view.defined = true;
  int64_t count = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.shape[i] = shape.begin()[i];
    view.stride[i] = count;
    count *= view.shape[i];
  }
  view.data = workspace<float>(Slot::block, count);  // no op uses that slot
  return view;
}

}  // namespace llmfast
