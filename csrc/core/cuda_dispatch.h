// Dispatch tables of the CUDA module: for each op one row per target, best first. The first row whose target runs on
// the stream's device, whose dtype is listed and whose supports() holds, runs there.
#pragma once
#include <atomic>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/cuda_stream.h"
#include "core/dispatch.h"

// Declares a function that a .cu file defines.
#define LLMFAST_DECLARE_CUDA(declaration) \
  namespace llmfast::cuda { declaration; }
// A row of a table that is there only where _sm90a.cu files are compiled.
#ifdef LLMFAST_SM90A
#define LLMFAST_SM90A_ROW(...) {Arch::sm90a, __VA_ARGS__},
#else
#define LLMFAST_SM90A_ROW(...)
#endif

namespace llmfast {

enum class Arch { sm80, sm90a };

const char* name_of(Arch arch);
bool parse_arch(const std::string& name, Arch* arch);
bool runs_on(Arch arch, const DeviceInfo& device);  // sm80: 8.0 and up; sm90a: 9.0 alone

// The best target that may be used; at first LLMFAST_CUDA_ARCH, if set. It never makes more run than the device can.
Arch arch_cap();
void set_arch_cap(Arch cap);

struct CudaRowInfo {
  Arch arch;
  DTypeSet dtypes;
  std::atomic<int64_t>* calls;
};

struct CudaOpInfo {
  const char* name;
  std::vector<CudaRowInfo> rows;
};

std::vector<CudaOpInfo>& cuda_op_registry();  // filled by the tables' constructors

template <class Params>
struct CudaRow {
  Arch arch;
  DTypeSet dtypes;
  bool (*supports)(const Params&);  // nullptr: every shape
  void (*run)(const Params&, const Stream&);
};

template <class Params>
class CudaTable {
 public:
  CudaTable(const char* name, std::initializer_list<CudaRow<Params>> rows)
      : name_(name), rows_(rows), calls_(rows.size()) {
    CudaOpInfo info{name, {}};
    for (size_t i = 0; i < rows_.size(); ++i) info.rows.push_back({rows_[i].arch, rows_[i].dtypes, &calls_[i]});
    cuda_op_registry().push_back(info);
  }

  // `dtype` is the element type that decides the kernel.
  void operator()(DType dtype, const Params& params, const Stream& stream) const {
    const DeviceInfo& device = device_info(stream.device);
    const Arch cap = arch_cap();
    for (size_t i = 0; i < rows_.size(); ++i) {
      const CudaRow<Params>& row = rows_[i];
      if (row.arch > cap || !runs_on(row.arch, device) || !(row.dtypes & set_of(dtype))) continue;
      if (row.supports && !row.supports(params)) continue;
      calls_[i].fetch_add(1, std::memory_order_relaxed);
      const OnDevice current(stream.device);
      row.run(params, stream);
      return;
    }
    throw std::invalid_argument(std::string(name_) + ": no CUDA kernel for " + name_of(dtype) + " of this shape on " +
                                device.name);
  }

 private:
  const char* name_;
  std::vector<CudaRow<Params>> rows_;
  mutable std::vector<std::atomic<int64_t>> calls_;
};

}  // namespace llmfast
