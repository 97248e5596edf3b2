#include "rotary/rotary_checks.h"

#include "core/check.h"

namespace llmfast {
namespace {

void require_table(const TensorView& table, const char* name, const RotaryParams& p) {
  require_floating(table, name);
  require(table.ndim == 2 || table.ndim == 3, "cos and sin must be [T, R/2] or [B, T, R/2]");
  const int64_t half = p.cos.shape[p.cos.ndim - 1];
  require(2 * half <= p.x.shape[3], "cos and sin: R is larger than the head");
  if (table.ndim == 2) {
    require_shape(table, name, {p.x.shape[2], half});
  } else {
    require_shape(table, name, {table.shape[0] == 1 ? 1 : p.x.shape[0], p.x.shape[2], half});
  }
  require(half <= 1 || table.stride[table.ndim - 1] == 1, "cos and sin must have contiguous rows");
}

}  // namespace

bool check_rotary(const RotaryParams& p) {
  require(p.x.ndim == 4, "x must be [B, H, T, D]");
  require_floating(p.x, "x");
  require_shape(p.out, "out", {p.x.shape[0], p.x.shape[1], p.x.shape[2], p.x.shape[3]});
  require_dtype(p.out, "out", p.x.dtype);
  if (p.x.numel() == 0) return false;
  require(p.x.shape[3] == 1 || (p.x.stride[3] == 1 && p.out.stride[3] == 1), "x and out must have contiguous heads");
  require_table(p.cos, "cos", p);
  require_table(p.sin, "sin", p);
  require_dtype(p.sin, "sin", p.cos.dtype);
  return true;
}

}  // namespace llmfast
