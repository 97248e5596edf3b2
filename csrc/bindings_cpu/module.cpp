// The module `llmfast._cpu`: the ops of bindings/, what only the CPU has, the machine, the dispatch tables, the workspace.
#include <omp.h>
#include <algorithm>
#include <pybind11/stl.h>

#include "bindings_cpu/bindings.h"
#include "core/dispatch.h"
#include "core/memory.h"
#include "core/workspace.h"

namespace py = pybind11;
using namespace llmfast;

static py::list implementations(const std::string& op) {
  py::list rows;
  for (const OpInfo& info : op_registry()) {
    if (op != info.name) continue;
    for (const RowInfo& row : info.rows) {
      py::list dtypes;
      for (DType dtype : {DType::f32, DType::bf16, DType::f16})
        if (row.dtypes & set_of(dtype)) dtypes.append(name_of(dtype));
      py::dict entry;
      const bool requested = !row.requested || row.requested();
      const std::string why_not = why_unavailable(row.isa);
      entry["isa"] = row.name;
      entry["dtypes"] = dtypes;
      entry["available"] = row.isa <= active_isa() && requested;
      entry["why_not"] = why_not.empty() && !requested ? "only on request" : why_not;
      entry["calls"] = row.calls->load();
      rows.append(entry);
    }
    return rows;
  }
  throw py::value_error("op: no native op named '" + op + "'");
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "llmfast's CPU kernels. Private: call them through llmfast.ops.";
  m.attr("emulated") = is_emulated();
  m.def("ops", [] {
    std::vector<std::string> names;
    for (const OpInfo& info : op_registry()) names.push_back(info.name);
    std::sort(names.begin(), names.end());
    return names;
  });
  m.def("implementations", &implementations);
  m.def("cpu_name", &cpu_name);
  m.def("cpu_features", &cpu_features);
  m.def("detected_isa", [] { return name_of(detected_isa()); });
  m.def("active_isa", [] { return name_of(active_isa()); });
  m.def("set_isa_cap", [](const std::string& name) {
    Isa isa;
    if (!parse_isa(name, &isa)) throw py::value_error("isa: got '" + name + "', expected ref, avx2, avx512, avx512bf16 or amx");
    set_isa_cap(isa);
  });
  m.def("max_threads", [] { return omp_get_max_threads(); });
  m.def("workspace_bytes", &workspace_total_bytes);
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("float32_is_split", &float32_is_split);
  m.def("split_float32", &split_float32);
  m.def("ask_for_large_pages", &prepare);
  bind_ops(m);
  bind_block(m);
  bind_linear_cross_entropy_joint(m);
  bind_optim(m);
}
