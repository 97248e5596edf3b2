// Dispatch tables: for each op one row per target, best first. The first row whose ISA is active, whose dtype is listed,
// whose supports() holds, and that was requested if it runs on request only, runs. `ref` supports everything, so a table
// always has an answer.
#pragma once
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "core/float32_products.h"
#include "core/isa.h"
#include "core/types.h"

// Declares a function in every namespace it is compiled for: VEC in those of `_vec.cpp` files, ROUND in those of
// `_round.cpp` files, BF16 in those of `_bf16.cpp` files, MM in VEC's, BF16's and amx_split, as `_mm.cpp` files need it.
#ifdef LLMFAST_X86
#define LLMFAST_DECLARE_VEC(declaration)      \
  namespace llmfast::ref { declaration; }     \
  namespace llmfast::avx2 { declaration; }    \
  namespace llmfast::avx512 { declaration; }
#define LLMFAST_DECLARE_BF16(declaration)         \
  namespace llmfast::avx512bf16 { declaration; } \
  namespace llmfast::amx { declaration; }
#define LLMFAST_DECLARE_MM(declaration) \
  LLMFAST_DECLARE_VEC(declaration)      \
  LLMFAST_DECLARE_BF16(declaration)     \
  namespace llmfast::amx_split { declaration; }
#define LLMFAST_DECLARE_ROUND(declaration) \
  LLMFAST_DECLARE_VEC(declaration)         \
  namespace llmfast::avx512bf16 { declaration; }
// Rows for a function that exists in every vector target.
#define LLMFAST_VEC_ROWS(function, dtypes) \
  {Isa::avx512, dtypes, nullptr, avx512::function}, {Isa::avx2, dtypes, nullptr, avx2::function}, \
  {Isa::ref, dtypes, nullptr, ref::function}
// The same for a function of a `_round.cpp` file.
#define LLMFAST_ROUND_ROWS(function, dtypes) \
  {Isa::avx512bf16, dtypes, nullptr, avx512bf16::function}, LLMFAST_VEC_ROWS(function, dtypes)
// Rows of an op that has functions for the bf16 targets, too, which take parameters that supports() holds for.
#define LLMFAST_BF16_AND_VEC_ROWS(function, supports)                                                      \
  {Isa::amx, kBF16, supports, amx::function}, {Isa::avx512bf16, kBF16, supports, avx512bf16::function}, \
  LLMFAST_VEC_ROWS(function, kAllFloat)
// Rows of a `_mm.cpp` file: the bf16 targets' and, for float32 on request, amx_split's before the others.
#define LLMFAST_MM_ROWS_OF(function, dtypes)                                                                            \
  {Isa::amx, kBF16, nullptr, amx::function}, {Isa::amx, kF32, nullptr, amx_split::function, "amx_split", &float32_is_split}, \
  {Isa::avx512bf16, kBF16, nullptr, avx512bf16::function}, LLMFAST_VEC_ROWS(function, dtypes)
#else
#define LLMFAST_DECLARE_VEC(declaration) \
  namespace llmfast::ref { declaration; }
#define LLMFAST_DECLARE_ROUND(declaration) LLMFAST_DECLARE_VEC(declaration)
#define LLMFAST_DECLARE_BF16(declaration)
#define LLMFAST_VEC_ROWS(function, dtypes) {Isa::ref, dtypes, nullptr, ref::function}
#define LLMFAST_ROUND_ROWS(function, dtypes) LLMFAST_VEC_ROWS(function, dtypes)
#define LLMFAST_DECLARE_MM(declaration) LLMFAST_DECLARE_VEC(declaration)
#define LLMFAST_BF16_AND_VEC_ROWS(function, supports) LLMFAST_VEC_ROWS(function, kAllFloat)
#define LLMFAST_MM_ROWS_OF(function, dtypes) LLMFAST_VEC_ROWS(function, dtypes)
#endif
#define LLMFAST_MM_ROWS(function) LLMFAST_MM_ROWS_OF(function, kAllFloat)

namespace llmfast {

using DTypeSet = uint8_t;  // bit i: DType(i)
constexpr DTypeSet set_of(DType dtype) { return static_cast<DTypeSet>(1u << static_cast<int>(dtype)); }
constexpr DTypeSet kF32 = set_of(DType::f32), kBF16 = set_of(DType::bf16), kF16 = set_of(DType::f16);
constexpr DTypeSet kAllFloat = kF32 | kBF16 | kF16, kHalf = kBF16 | kF16;

struct RowInfo {
  Isa isa;
  const char* name;
  DTypeSet dtypes;
  bool (*requested)();
  std::atomic<int64_t>* calls;
};

struct OpInfo {
  const char* name;
  std::vector<RowInfo> rows;
};

std::vector<OpInfo>& op_registry();  // filled by the tables' constructors, in link order

template <class Params>
struct Row {
  Isa isa;
  DTypeSet dtypes;
  bool (*supports)(const Params&);  // nullptr: every shape
  void (*run)(const Params&);
  const char* name = nullptr;      // if not that of `isa`
  bool (*requested)() = nullptr;   // nullptr: always
};

template <class Params>
class DispatchTable {
 public:
  DispatchTable(const char* name, std::initializer_list<Row<Params>> rows) : rows_(rows), calls_(rows.size()) {
    OpInfo info{name, {}};
    for (size_t i = 0; i < rows_.size(); ++i) {
      const Row<Params>& row = rows_[i];
      info.rows.push_back({row.isa, row.name ? row.name : name_of(row.isa), row.dtypes, row.requested, &calls_[i]});
    }
    op_registry().push_back(info);
  }

  // `dtype` is the element type that decides the kernel (that of the matrix operands).
  void operator()(DType dtype, const Params& params) const {
    const Isa active = active_isa();
    for (size_t i = 0; i < rows_.size(); ++i) {
      const Row<Params>& row = rows_[i];
      if (row.isa > active || !(row.dtypes & set_of(dtype)) || (row.supports && !row.supports(params))) continue;
      if (row.requested && !row.requested()) continue;
      calls_[i].fetch_add(1, std::memory_order_relaxed);
      row.run(params);
      return;
    }
  }

 private:
  std::vector<Row<Params>> rows_;
  mutable std::vector<std::atomic<int64_t>> calls_;
};

}  // namespace llmfast
