// Rows of elements for memory-bound kernels: eight at a time, float32 in registers, any floating dtype in memory.
//
// The dtype is a field, known when a kernel is compiled (TypedRows) or not: kernels take up to four tensors of three
// dtypes each, and there is code for the combinations that matter. Code for all of them works, but where it is long it
// outgrows the instruction caches. Loading and widening are separate steps, so that a thread can issue all loads of a
// row before it waits for the first.
#pragma once
#include <initializer_list>

#include "core/rows.h"
#include "ptx/convert.h"
#include "ptx/memory.h"

namespace llmfast::cuda {

constexpr int kEight = 8;

// Eight elements as they lie in memory; 16-bit elements fill the first four words.
struct Eight {
  uint32_t word[8];
};

// Which eight elements of a row: two quads of neighbours, most often neighbours themselves. Where float32 rows take part
// a thread's quads are as far apart as the threads' first quads reach, so that a warp's access of 16 bytes a lane is one
// piece of memory: 32 bytes a lane would touch every sector twice.
struct Columns {
  int first, second;

  __device__ __forceinline__ Columns(int index) : first(index), second(index + 4) {}
  // Of thread `t` of `threads`, in the k-th strip of 8 * threads columns.
  __device__ __forceinline__ Columns(int k, int threads, int t, bool apart)
      : first(k * threads * kEight + (apart ? 4 : 8) * t), second(first + (apart ? 4 * threads : 4)) {}

  __device__ __forceinline__ bool together() const { return second == first + 4; }
  __device__ __forceinline__ int at(int j) const { return j < 4 ? first + j : second + j - 4; }
};

// A row of C elements, or nothing (data == nullptr).
struct RowPointer {
  char* data;
  int C;
  DType dtype;
  bool aligned;        // every eighth element is at a multiple of 16 bytes
  bool whole = false;  // C is known to be a multiple of eight

  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
};

// Of a floating dtype.
__host__ __device__ constexpr int element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

template <class T, bool kReadOnce>
__device__ __forceinline__ T load_once(const char* from) {
  return kReadOnce ? load_streaming<T>(from) : load<T>(from);
}

template <bool kReadOnce = false>
__device__ __forceinline__ Eight load_eight(const RowPointer& row, Columns columns) {
  Eight raw = {};
  const int bytes = element_bytes(row.dtype);
  const auto from = [&](int column) { return row.data + static_cast<int64_t>(column) * bytes; };
  if (bytes == 2 && row.aligned && columns.together() && columns.second + 4 <= row.C) {
    const Bytes16 all = load_once<Bytes16, kReadOnce>(from(columns.first));
#pragma unroll
    for (int j = 0; j < 4; ++j) raw.word[j] = all.word[j];
    return raw;
  }
#pragma unroll
  for (int quad = 0; quad < 2; ++quad) {
    const int column = quad ? columns.second : columns.first;
    if (row.aligned && column + 4 <= row.C) {
      if (bytes == 4) {
        const Bytes16 four = load_once<Bytes16, kReadOnce>(from(column));
#pragma unroll
        for (int j = 0; j < 4; ++j) raw.word[4 * quad + j] = four.word[j];
      } else {
        const Bytes8 four = load_once<Bytes8, kReadOnce>(from(column));
#pragma unroll
        for (int j = 0; j < 2; ++j) raw.word[2 * quad + j] = four.word[j];
      }
      continue;
    }
    if (row.whole) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + j >= row.C) continue;
      if (bytes == 4) {
        raw.word[4 * quad + j] = load<uint32_t>(from(column + j));
      } else {
        raw.word[2 * quad + j / 2] |= static_cast<uint32_t>(load<uint16_t>(from(column + j))) << 16 * (j % 2);
      }
    }
  }
  return raw;
}

__device__ __forceinline__ void widen(const Eight& raw, DType dtype, float (&value)[kEight]) {
  if (dtype == DType::f32) {
#pragma unroll
    for (int j = 0; j < kEight; ++j) value[j] = __uint_as_float(raw.word[j]);
  } else if (dtype == DType::bf16) {
#pragma unroll
    for (int j = 0; j < 4; ++j) unpack_pair<bf16>(raw.word[j], value[2 * j], value[2 * j + 1]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) unpack_pair<fp16>(raw.word[j], value[2 * j], value[2 * j + 1]);
  }
}

// Zeros beyond the row; `otherwise` everywhere if there is none.
__device__ __forceinline__ void load_floats(const RowPointer& row, Columns columns, float otherwise,
                                            float (&value)[kEight]) {
  if (row) {
    widen(load_eight(row, columns), row.dtype, value);
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j) value[j] = otherwise;
  }
}

__device__ __forceinline__ Eight narrow(const float (&value)[kEight], DType dtype) {
  Eight raw = {};
  if (dtype == DType::f32) {
#pragma unroll
    for (int j = 0; j < kEight; ++j) raw.word[j] = __float_as_uint(value[j]);
  } else if (dtype == DType::bf16) {
#pragma unroll
    for (int j = 0; j < 4; ++j) raw.word[j] = pack_pair<bf16>(value[2 * j], value[2 * j + 1]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) raw.word[j] = pack_pair<fp16>(value[2 * j], value[2 * j + 1]);
  }
  return raw;
}

// Elements beyond the row are not written.
__device__ __forceinline__ void store_eight(const RowPointer& row, Columns columns, const Eight& raw) {
  const int bytes = element_bytes(row.dtype);
  const auto to = [&](int column) { return row.data + static_cast<int64_t>(column) * bytes; };
  if (bytes == 2 && row.aligned && columns.together() && columns.second + 4 <= row.C) {
    store(to(columns.first), Bytes16{{raw.word[0], raw.word[1], raw.word[2], raw.word[3]}});
    return;
  }
#pragma unroll
  for (int quad = 0; quad < 2; ++quad) {
    const int column = quad ? columns.second : columns.first;
    const int wide = 4 * quad, narrow = 2 * quad;  // the quad's first word
    if (row.aligned && column + 4 <= row.C) {
      if (bytes == 4)
        store(to(column), Bytes16{{raw.word[wide], raw.word[wide + 1], raw.word[wide + 2], raw.word[wide + 3]}});
      else store(to(column), Bytes8{{raw.word[narrow], raw.word[narrow + 1]}});
      continue;
    }
    if (row.whole) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (column + j >= row.C) continue;
      if (bytes == 4) store(to(column + j), raw.word[wide + j]);
      else store(to(column + j), static_cast<uint16_t>(raw.word[narrow + j / 2] >> 16 * (j % 2)));
    }
  }
}

__device__ __forceinline__ void store_floats(const RowPointer& row, Columns columns, const float (&value)[kEight]) {
  store_eight(row, columns, narrow(value, row.dtype));
}

namespace {

// The rows of a tensor as a kernel takes them, fewer than 2^31. C is the last dimension.
struct RowSet {
  char* data = nullptr;
  Rows rows;
  int C = 0;
  DType dtype = DType::f32;
  bool aligned = false;

  explicit RowSet(const TensorView& t) : rows(t, t.defined ? t.ndim - 1 : 0) {
    if (!t.defined) return;
    data = t.as<char>();
    C = static_cast<int>(t.shape[t.ndim - 1]);
    dtype = t.dtype;
    aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int i = 0; i < rows.dims; ++i) aligned = aligned && rows.stride[i] * size_of(dtype) % 16 == 0;
  }

  // As rows.offset(), with 32-bit division: the 64-bit one is a function call.
  __device__ __forceinline__ int64_t offset(uint32_t index) const {
    int64_t elements = 0;
    for (int i = rows.dims - 1; i > 0; --i) {
      const uint32_t size = static_cast<uint32_t>(rows.size[i]);
      elements += index % size * rows.stride[i];
      index /= size;
    }
    return rows.dims > 0 ? elements + index * rows.stride[0] : elements;
  }
  __device__ __forceinline__ RowPointer row(uint32_t index) const {
    return {data ? data + offset(index) * element_bytes(dtype) : nullptr, C, dtype, aligned};
  }
};

inline bool any_float32(std::initializer_list<const TensorView*> tensors) {
  for (const TensorView* t : tensors)
    if (t->defined && t->dtype == DType::f32) return true;
  return false;
}

// How a kernel reads its rows: as they may come, or, with code for one dtype alone and without tails, as most come.
struct AnyRows {
  static bool hold(const RowSet&) { return true; }
  __device__ static RowPointer row(const RowSet& rows, uint32_t index) { return rows.row(index); }
};
// At one distance from each other, aligned, of a multiple of eight elements.
struct AlignedRows {
  static bool hold(const RowSet& s) { return !s.data || (s.rows.dims <= 1 && s.aligned && s.C % kEight == 0); }
  __device__ static RowPointer row(const RowSet& s, uint32_t index) { return row_of(s, index, s.dtype); }

  __device__ static RowPointer row_of(const RowSet& s, uint32_t index, DType dtype) {
    const int64_t offset = s.rows.dims > 0 ? index * s.rows.stride[0] * element_bytes(dtype) : 0;
    return {s.data ? s.data + offset : nullptr, s.C, dtype, true, true};
  }
};
// And of one dtype.
template <DType kDType>
struct TypedRows {
  static bool hold(const RowSet& s) { return AlignedRows::hold(s) && (!s.data || s.dtype == kDType); }
  __device__ static RowPointer row(const RowSet& s, uint32_t index) { return AlignedRows::row_of(s, index, kDType); }
};

}  // namespace
}  // namespace llmfast::cuda
