#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings_cpu/bindings.h"
#include "optim/adamw.h"

namespace py = pybind11;

namespace llmfast {
namespace {

using Views = std::vector<TensorView>;

void step(const Views& params, const Views& grads, const Views& exp_avgs, const Views& exp_avg_sqs,
          const Views& masters, const Views& steps, const std::vector<int64_t>& group_of,
          const std::vector<std::array<double, 5>>& groups, float grad_scale) {
  const size_t count = params.size();
  for (size_t size : {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), masters.size(), steps.size(), group_of.size()})
    require(size == count, "adamw_step: lists of different lengths");
  for (int64_t group : group_of)
    require(group >= 0 && group < static_cast<int64_t>(groups.size()), "group_of: no such group");
  std::vector<AdamWGroup> hyper;
  for (const auto& g : groups) hyper.push_back({g[0], g[1], g[2], g[3], g[4]});
  adamw_step({static_cast<int64_t>(count), params.data(), grads.data(), exp_avgs.data(), exp_avg_sqs.data(),
              masters.data(), steps.data(), group_of.data(), hyper.data(), grad_scale});
}

}  // namespace

void bind_optim(py::module_& m) {
  m.def("is_dense", &is_dense);
  m.def("adamw_step", &step, WithoutGil());
  m.def(
      "grad_norm", [](const Views& grads) { return grad_norm(grads.data(), static_cast<int64_t>(grads.size())); },
      WithoutGil());
}

}  // namespace llmfast
