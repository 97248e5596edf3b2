#include "attention/attention.h"
#include "bindings/run.h"
#include "bindings_cpu/bindings.h"
#include "block/block.h"

namespace py = pybind11;

namespace llmfast {
namespace {

BlockWeights read_weights(const py::tuple& tensors) {
  require(tensors.size() == kBlockWeights, "weights: expected one tensor or None for each of a block's parameters");
  BlockWeights weights;
  auto* view = reinterpret_cast<TensorView*>(&weights);
  for (py::handle tensor : tensors) *view++ = tensor.cast<TensorView>();
  return weights;
}

BlockInputs read_inputs(const py::tuple& tensors, int64_t cached) {
  const auto at = [&](int i) { return tensors[i].cast<TensorView>(); };
  require(tensors.size() == 8, "inputs: expected x, stream, cos, sin, mask, cu_seqlens, cache_k, cache_v");
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), cached};
}

}  // namespace

void bind_block(py::module_& m) {
  py::class_<BlockSettings>(m, "BlockSettings")
      .def(py::init([](int64_t heads, int64_t kv_heads, int64_t head_dim, py::object left, bool centred, float eps1,
                       float eps2, float eps_qk, float scale, int activation) {
        return BlockSettings{heads, kv_heads, head_dim, left.is_none() ? kUnbounded : left.cast<int64_t>(), centred, eps1,
                             eps2, eps_qk, scale, static_cast<Activation>(activation)};
      }));
  m.def("block_saved_bytes", [](const BlockSettings& settings, const py::tuple& weights, const py::tuple& inputs) {
    return block_saved_bytes(settings, read_weights(weights), read_inputs(inputs, 0));
  });
  m.def("block_forward", [](const BlockSettings& settings, const py::tuple& weights, const py::tuple& inputs,
                            int64_t cached, const TensorView& out, const TensorView& stream_out,
                            const TensorView& saved) {
    const BlockParams params{settings, read_weights(weights), read_inputs(inputs, cached), out, stream_out, saved};
    for (const TensorView* fresh : {&out, &stream_out, &saved}) prepare(*fresh);
    py::gil_scoped_release release;
    block_forward(params);
  });
  m.def("block_backward",
        [](const BlockSettings& settings, const py::tuple& weights, const py::tuple& inputs, const TensorView& stream_out,
           const TensorView& saved, const TensorView& grad_out, const TensorView& grad_stream_out,
           const TensorView& grad_x, const TensorView& grad_stream, const py::tuple& grads) {
          const BlockBackwardParams params{settings,        read_weights(weights), read_inputs(inputs, 0),
                                           stream_out,      saved,                 grad_out,
                                           grad_stream_out, grad_x,                grad_stream,
                                           read_weights(grads)};
          prepare(grad_x);
          prepare(grad_stream);
          for (py::handle grad : grads) prepare(grad.cast<TensorView>());
          py::gil_scoped_release release;
          block_backward(params);
        });
}

}  // namespace llmfast
