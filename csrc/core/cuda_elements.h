// Rows of elements for memory-bound kernels: eight at a time, float32 in registers, any floating dtype in memory.
//
// The dtype is run-time data: these kernels take up to four tensors of three dtypes each, and a branch that a whole
// grid takes the same way costs a cycle where a 16-byte access costs dozens. Loading and widening are separate steps,
// so that a thread can issue all loads of a row before it waits for the first.
#pragma once
#include "core/rows.h"
#include "ptx/convert.h"
#include "ptx/memory.h"

namespace llmfast::cuda {

constexpr int kEight = 8;

// Eight neighbours as they lie in memory; 16-bit elements fill the first four words.
struct Eight {
  uint32_t word[8];
};

// A row of C elements, or nothing (data == nullptr).
struct RowPointer {
  char* data;
  int C;
  DType dtype;
  bool aligned;  // every eighth element is at a multiple of 16 bytes

  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
};

template <bool kReadOnce = false>
__device__ __forceinline__ Eight load_eight(const RowPointer& row, int index) {
  Eight raw = {};
  const int bytes = static_cast<int>(size_of(row.dtype));
  const char* from = row.data + static_cast<int64_t>(index) * bytes;
  if (row.aligned && index + kEight <= row.C) {
    const Bytes16 low = kReadOnce ? load_streaming<Bytes16>(from) : load<Bytes16>(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) raw.word[j] = low.word[j];
    if (bytes == 4) {
      const Bytes16 high = kReadOnce ? load_streaming<Bytes16>(from + 16) : load<Bytes16>(from + 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) raw.word[4 + j] = high.word[j];
    }
    return raw;
  }
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    if (index + j >= row.C) continue;
    if (bytes == 4) {
      raw.word[j] = load<uint32_t>(from + 4 * j);
    } else {
      raw.word[j / 2] |= static_cast<uint32_t>(load<uint16_t>(from + 2 * j)) << 16 * (j % 2);
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
__device__ __forceinline__ void load_floats(const RowPointer& row, int index, float otherwise, float (&value)[kEight]) {
  if (row) {
    widen(load_eight(row, index), row.dtype, value);
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
__device__ __forceinline__ void store_eight(const RowPointer& row, int index, const Eight& raw) {
  const int bytes = static_cast<int>(size_of(row.dtype));
  char* to = row.data + static_cast<int64_t>(index) * bytes;
  if (row.aligned && index + kEight <= row.C) {
    store(to, Bytes16{{raw.word[0], raw.word[1], raw.word[2], raw.word[3]}});
    if (bytes == 4) store(to + 16, Bytes16{{raw.word[4], raw.word[5], raw.word[6], raw.word[7]}});
    return;
  }
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    if (index + j >= row.C) continue;
    if (bytes == 4) {
      store(to + 4 * j, raw.word[j]);
    } else {
      store(to + 2 * j, static_cast<uint16_t>(raw.word[j / 2] >> 16 * (j % 2)));
    }
  }
}

__device__ __forceinline__ void store_floats(const RowPointer& row, int index, const float (&value)[kEight]) {
  store_eight(row, index, narrow(value, row.dtype));
}

// How many of the eight elements at `index` are in a row of C.
__device__ __forceinline__ int elements_at(int index, int C) {
  const int rest = C - index;
  return rest < 0 ? 0 : rest < kEight ? rest : kEight;
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
    return {data ? data + offset(index) * size_of(dtype) : nullptr, C, dtype, aligned};
  }
};

}  // namespace
}  // namespace llmfast::cuda
