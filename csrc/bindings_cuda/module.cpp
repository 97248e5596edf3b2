// The module `llmfast._cuda`: the ops of bindings/, AdamW, the devices and the dispatch tables.
#include <algorithm>
#include <pybind11/stl.h>

#include "bindings_cuda/bindings.h"
#include "core/cuda_dispatch.h"
#ifdef LLMFAST_EMULATE_CUDA
#include "ptx/emulated/machine.h"
#endif

namespace py = pybind11;
using namespace llmfast;

static std::string why_unavailable(Arch arch) {
  if (arch > arch_cap()) return "capped by LLMFAST_CUDA_ARCH";
  const int devices = device_count();
  for (int i = 0; i < devices; ++i)
    if (runs_on(arch, device_info(i))) return "";
  if (devices == 0) return why_no_device();
  return "no device of compute capability " + std::string(arch == Arch::sm80 ? "8.0 or later" : "9.0");
}

static py::list implementations(const std::string& op) {
  py::list rows;
  for (const CudaOpInfo& info : cuda_op_registry()) {
    if (op != info.name) continue;
    for (const CudaRowInfo& row : info.rows) {
      py::list dtypes;
      for (DType dtype : {DType::f32, DType::bf16, DType::f16})
        if (row.dtypes & set_of(dtype)) dtypes.append(name_of(dtype));
      const std::string why_not = why_unavailable(row.arch);
      py::dict entry;
      entry["isa"] = name_of(row.arch);
      entry["dtypes"] = dtypes;
      entry["available"] = why_not.empty();
      entry["why_not"] = why_not;
      entry["calls"] = row.calls->load();
      rows.append(entry);
    }
  }
  return rows;
}

static py::list devices() {
  py::list all;
  for (int i = 0; i < device_count(); ++i) {
    const DeviceInfo& info = device_info(i);
    py::dict entry;
    entry["name"] = info.name;
    entry["capability"] = py::make_tuple(info.major, info.minor);
    entry["multiprocessors"] = info.multiprocessors;
    entry["supported"] = runs_on(Arch::sm80, info);
    all.append(entry);
  }
  return all;
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "llmfast's CUDA kernels. Private: call them through llmfast.ops.";
  m.def("ops", [] {
    std::vector<std::string> names;
    for (const CudaOpInfo& info : cuda_op_registry()) names.push_back(info.name);
    std::sort(names.begin(), names.end());
    return names;
  });
  m.def("implementations", &implementations);
  m.def("devices", &devices);
  m.def("arch_cap", [] { return name_of(arch_cap()); });
  m.def("set_arch_cap", [](const std::string& name) {
    Arch arch;
    if (!parse_arch(name, &arch)) throw std::invalid_argument("arch: got '" + name + "', expected sm80 or sm90a");
    set_arch_cap(arch);
  });
  m.def("why_no_device", &why_no_device);
#ifdef LLMFAST_EMULATE_CUDA
  m.attr("emulated") = true;
  m.def("reset_counters", [] { emulated::counters() = {}; });
  m.def("counters", [] {
    const emulated::Counters& c = emulated::counters();
    py::dict counts;
    counts["launches"] = c.launches;
    counts["bytes_loaded"] = c.bytes_loaded;
    counts["bytes_stored"] = c.bytes_stored;
    counts["mma"] = c.mma;
    counts["warpgroup_products"] = c.warpgroup_products;
    counts["ldmatrix_conflicts"] = c.ldmatrix_conflicts;
    return counts;
  });
#else
  m.attr("emulated") = false;
#endif
  bind_ops(m);
  bind_attention_ways(m);
  bind_optim(m);
}
