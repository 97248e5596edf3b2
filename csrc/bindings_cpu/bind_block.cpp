#include <vector>

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

// false: a tensor is not the CPU's, or of another dtype.
bool try_read_weights(const py::tuple& tensors, DType dtype, BlockWeights* weights) {
  require(tensors.size() == kBlockWeights, "weights: expected one tensor or None for each of a block's parameters");
  auto* view = reinterpret_cast<TensorView*>(weights);
  for (py::handle tensor : tensors) {
    if (!tensor.is_none() && !(try_read_tensor(tensor.ptr(), view) && view->dtype == dtype)) return false;
    ++view;
  }
  return true;
}

// Whether all of `watch` is as it was (see _watch in llmfast/nn/block.py). Nothing here runs Python code.
bool unchanged(const py::tuple& watch) {
  const Py_ssize_t size = PyTuple_GET_SIZE(watch.ptr());
  require(size % 3 == 0, "watch: expected triples");
  for (Py_ssize_t i = 0; i < size; i += 3) {
    PyObject *of = PyTuple_GET_ITEM(watch.ptr(), i), *key = PyTuple_GET_ITEM(watch.ptr(), i + 1);
    PyObject* expected = PyTuple_GET_ITEM(watch.ptr(), i + 2);
    if (key == Py_None) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(of)) != expected) return false;
      continue;
    }
    require(PyDict_Check(of), "watch: expected a dict");
    if (PyUnicode_Check(key)) {
      PyObject* found = PyDict_GetItemWithError(of, key);
      if (found != (expected == Py_Ellipsis ? nullptr : expected)) return false;
    } else if (PyDict_Size(of) != PyLong_AsSsize_t(key)) {
      return false;
    }
  }
  return true;
}

// A model's blocks one after the other, each on what the one before gave, in `out` and `stream_out`; false: nothing was done,
// a weight is not the CPU's or not of out's dtype. layers: (settings, weights, ...) of each; extras: cos, sin, mask, cu_seqlens;
// caches: (k, v) of each, or nothing.
bool blocks_forward(const py::tuple& layers, const TensorView& x, const py::tuple& extras, const py::tuple& caches,
                    int64_t cached, const TensorView& out, const TensorView& stream_out) {
  const auto extra = [&](int i) { return extras[i].cast<TensorView>(); };
  BlockInputs inputs{x, {}, extra(0), extra(1), extra(2), extra(3), {}, {}, cached};
  std::vector<BlockParams> blocks;
  blocks.reserve(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const py::tuple layer = layers[i];
    if (i > 0) {
      inputs.x = out;
      inputs.stream = stream_out;
    }
    if (!caches.empty()) {
      const py::tuple cache = caches[i];
      inputs.cache_k = cache[0].cast<TensorView>();
      inputs.cache_v = cache[1].cast<TensorView>();
    }
    blocks.push_back({layer[0].cast<const BlockSettings&>(), {}, inputs, out, stream_out, {}});
    if (!try_read_weights(layer[1], out.dtype, &blocks.back().weights)) return false;
  }
  prepare(out);
  prepare(stream_out);
  const KernelScope scope;
  for (const BlockParams& block : blocks) block_forward(block);
  return true;
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
  m.def("unchanged", &unchanged);
  m.def("blocks_forward", &blocks_forward);
  m.def("block_saved_bytes", [](const BlockSettings& settings, const py::tuple& weights, const py::tuple& inputs) {
    return block_saved_bytes(settings, read_weights(weights), read_inputs(inputs, 0));
  });
  m.def("block_forward", [](const BlockSettings& settings, const py::tuple& weights, const py::tuple& inputs,
                            int64_t cached, const TensorView& out, const TensorView& stream_out,
                            const TensorView& saved) {
    const BlockParams params{settings, read_weights(weights), read_inputs(inputs, cached), out, stream_out, saved};
    for (const TensorView* fresh : {&out, &stream_out, &saved}) prepare(*fresh);
    const KernelScope scope;
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
          const KernelScope scope;
          block_backward(params);
        });
}

}  // namespace llmfast
