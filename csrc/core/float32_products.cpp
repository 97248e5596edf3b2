#include "core/float32_products.h"

#include <atomic>

namespace llmfast {
namespace {

std::atomic<bool> split_products{false};

}  // namespace

bool float32_is_split() { return split_products.load(std::memory_order_relaxed); }
void split_float32(bool split) { split_products.store(split, std::memory_order_relaxed); }

}  // namespace llmfast
