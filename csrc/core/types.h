// Element types that cross the native boundary, and the plain view of a tensor that every op receives.
// No torch, no allocation: a view is a pointer with sizes; whoever made it keeps the memory alive.
#pragma once
#include <cstdint>

// For functions that CUDA kernels call too.
#ifdef __CUDACC__
#define LLMFAST_HOST_DEVICE __host__ __device__
#else
#define LLMFAST_HOST_DEVICE
#endif

namespace llmfast {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum class DType : uint8_t { f32, bf16, f16, i32, i64, boolean };

LLMFAST_HOST_DEVICE constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::i64: return 8;
    case DType::boolean: return 1;
  }
  return 0;
}

constexpr bool is_floating(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16; }

const char* name_of(DType dtype);

// body(T{}) with the element type of a floating dtype.
template <class Body>
inline void visit_float(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(fp16{});
    default: return body(float{});
  }
}

// The same where only the 16-bit ones are served.
template <class Body>
inline void visit_half(DType dtype, const Body& body) {
  if (dtype == DType::bf16) body(bf16{});
  else body(fp16{});
}

constexpr int kMaxDims = 6;

// A strided tensor; strides count elements. `data == nullptr` with ndim 0 stands for an absent optional tensor.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  bool defined = false;
  int16_t device = 0;  // which CUDA device
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace llmfast
