#include "core/workspace.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "core/memory.h"

namespace llmfast {
namespace {

std::atomic<size_t> total_bytes{0};

struct Buffer {
  void* data = nullptr;
  size_t capacity = 0;

  void release() {
    std::free(data);
    total_bytes -= capacity;
    data = nullptr;
    capacity = 0;
  }
  ~Buffer() { release(); }
};

thread_local Buffer buffers[static_cast<int>(Slot::count)];

}  // namespace

void* workspace_bytes(Slot slot, size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (bytes > buffer.capacity) {
    buffer.release();
    const size_t alignment = bytes >= kLargePage ? kLargePage : 4096;
    const size_t capacity = (bytes + bytes / 8 + alignment - 1) / alignment * alignment;
    if (posix_memalign(&buffer.data, alignment, capacity) != 0) throw std::bad_alloc();
    ask_for_large_pages(buffer.data, capacity);
    buffer.capacity = capacity;
    total_bytes += capacity;
  }
  return buffer.data;
}

size_t workspace_total_bytes() { return total_bytes; }

}  // namespace llmfast
