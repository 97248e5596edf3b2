#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings_cuda/bindings.h"
#include "optim/adamw_cuda.h"

namespace py = pybind11;

namespace llmfast {
namespace {

using Views = std::vector<TensorView>;

Stream stream_on(const TensorView& tensor, uint64_t handle) {
  return {tensor.device, reinterpret_cast<void*>(handle)};
}

void step(const Views& params, const Views& grads, const Views& exp_avgs, const Views& exp_avg_sqs,
          const Views& masters, const std::vector<double>& steps, const std::vector<int64_t>& group_of,
          const std::vector<std::array<double, 5>>& groups, float grad_scale, const TensorView& scale_on_device,
          uint64_t stream) {
  const size_t count = params.size();
  for (size_t size : {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), masters.size(), steps.size(), group_of.size()})
    require(size == count, "adamw_step: lists of different lengths");
  for (int64_t group : group_of)
    require(group >= 0 && group < static_cast<int64_t>(groups.size()), "group_of: no such group");
  std::vector<AdamWGroup> hyper;
  for (const auto& g : groups) hyper.push_back({g[0], g[1], g[2], g[3], g[4]});
  if (count == 0) return;
  adamw_step({static_cast<int64_t>(count), params.data(), grads.data(), exp_avgs.data(), exp_avg_sqs.data(),
              masters.data(), nullptr, group_of.data(), hyper.data(), grad_scale},
             steps.data(), scale_on_device, stream_on(params[0], stream));
}

}  // namespace

void bind_optim(py::module_& m) {
  m.def("is_dense", &is_dense);
  m.def("adamw_step", &step, WithoutGil());
  m.def("norm_pieces",
        [](const Views& grads) { return norm_pieces(grads.data(), static_cast<int64_t>(grads.size())); });
  m.def(
      "clip_norm",
      [](const Views& grads, double grad_scale, double max_norm, const TensorView& numbers,
         const TensorView& sums, uint64_t stream) {
        clip_norm(grads.data(), static_cast<int64_t>(grads.size()), grad_scale, max_norm, numbers, sums,
                  stream_on(numbers, stream));
      },
      WithoutGil());
}

}  // namespace llmfast
