#include "core/check.h"

namespace llmfast {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    case DType::boolean: return "bool";
  }
  return "?";
}

static std::string list(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

std::string describe(const TensorView& tensor) {
  if (!tensor.defined) return "None";
  return std::string(name_of(tensor.dtype)) + list(tensor.shape, tensor.ndim) + " strides " +
         list(tensor.stride, tensor.ndim);
}

[[noreturn]] static void fail(const char* name, const TensorView& tensor, const std::string& expected) {
  throw std::invalid_argument(std::string(name) + ": got " + describe(tensor) + ", expected " + expected);
}

void require_shape(const TensorView& tensor, const char* name, std::initializer_list<int64_t> shape) {
  bool same = tensor.ndim == static_cast<int>(shape.size());
  int i = 0;
  for (int64_t size : shape) same = same && tensor.shape[i++] == size;
  if (!same) fail(name, tensor, "shape " + list(shape.begin(), static_cast<int>(shape.size())));
}

void require_contiguous(const TensorView& tensor, const char* name) {
  if (!tensor.contiguous()) fail(name, tensor, "a contiguous tensor");
}

void require_dtype(const TensorView& tensor, const char* name, DType dtype) {
  if (tensor.dtype != dtype) fail(name, tensor, name_of(dtype));
}

void require_floating(const TensorView& tensor, const char* name) {
  if (!is_floating(tensor.dtype)) fail(name, tensor, "float32, bfloat16 or float16");
}

}  // namespace llmfast
