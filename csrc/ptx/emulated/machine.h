// A GPU for tests: runs a kernel's blocks one after another, each thread of a block as a fiber of its own on the
// calling host thread. A fiber runs until it has to wait for others, so nothing but barriers and warp instructions
// orders the threads, and which one runs next is LLMFAST_EMULATE_ORDER: forward (default), reverse, or a number that
// seeds a random choice. A missing barrier is then a wrong result in one order or another.
//
// Reported as an error that ends the launch (std::runtime_error from run()):
//   - threads that wait for others which never come (divergent or unequal barriers, lanes missing at a warp
//     instruction)
//   - __syncthreads met at different lines, lanes of a warp that meet at different instructions
//   - misaligned addresses, shared addresses out of bounds, writes around the dynamic shared memory
//   - cp.async never waited for; its destination holds NaN until the wait, as does dynamic shared memory at the start
//   - bulk copies (hopper.cpp) that nobody waits for; a load's destination holds NaN until a thread waits for its
//     mbarrier, stores read shared memory and warpgroup products read their operands as late as their wait
// Not seen: races on global memory between blocks, unordered accesses that no order of whole stretches exposes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "core/tensor_map.h"

namespace llmfast::emulated {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Of all launches since reset_counters().
struct Counters {
  int64_t launches = 0;
  int64_t bytes_loaded = 0, bytes_stored = 0;  // by ptx/memory.h and cp.async
  int64_t mma = 0;                             // m16n8k16 products
  int64_t warpgroup_products = 0;              // m64 x N x k16
  int64_t ldmatrix_conflicts = 0;              // extra passes because rows of one matrix share banks
};
Counters& counters();

void run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// ---- for the running thread -----------------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& what);  // ends the launch

// Barrier 0 waits for all threads that have not exited; `threads` counts those of the others. Without `wait` it only
// arrives.
void meet_block(int barrier, int threads, bool wait, const char* file, int line);

// Lanes of a warp that meet at an instruction: each brings the address of its operands.
struct Meeting {
  const char* instruction;
  uint32_t mask, arrived;
  void* brought[32];
};
Meeting* arrive(uint32_t mask, const char* instruction, void* operands);  // waits; not null for the last lane to come
void release(Meeting* meeting);

// Once all lanes in `mask` are here, one of them runs act(lanes) on everybody's operands, and all go on.
template <class Operands, class Act>
void meet_warp(uint32_t mask, const char* instruction, Operands& mine, const Act& act) {
  if (Meeting* meeting = arrive(mask, instruction, &mine)) {
    act(reinterpret_cast<Operands* const*>(meeting->brought));
    release(meeting);
  }
}

void* shared_memory();
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address, int bytes, const char* instruction);  // checks bounds and alignment

void copy_async(uint32_t to, const void* from, int size, int valid);
void copy_async_commit();
void copy_async_wait(int youngest);

// ---- compute capability 9.0: hopper.cpp; semantics as in ptx/mbarrier.h, ptx/bulk_copy.h, ptx/warpgroup.h ------------

void mbarrier_init(uint32_t barrier, int arrivals);
void mbarrier_arrive(uint32_t barrier, int bytes_expected);
void mbarrier_wait(uint32_t barrier, int parity);

void bulk_load(uint32_t to, const TensorMap& map, uint32_t barrier, std::initializer_list<int> at);
void bulk_load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier);
void bulk_store(const TensorMap& map, uint32_t from, std::initializer_list<int> at);
void bulk_store_bytes(void* to, uint32_t from, int bytes, bool add_floats);
void bulk_commit();
void bulk_wait(int youngest);

struct WarpgroupProduct {
  float* d;
  int N;
  uint32_t a_registers[4];
  uint64_t a, b;  // descriptors
  bool a_in_registers, a_mn_major, b_mn_major, add, is_bf16;
  int group;
};
void warpgroup_product(const WarpgroupProduct& product);
void warpgroup_commit();
void warpgroup_wait(int youngest);

// What the machine and its Hopper part ask of each other.
int running_thread();
void wait_in(std::vector<int>& waiting, const std::string& where);  // until wake(waiting)
void wake(std::vector<int>& waiting);
void hopper_block_starts();
void hopper_thread_exits(int thread);
std::string hopper_block_ends();  // what is wrong, or ""

void require_aligned(const void* pointer, size_t bytes, const char* instruction);

template <class T>
T load(const void* from) {
  require_aligned(from, sizeof(T), "load");
  counters().bytes_loaded += sizeof(T);
  T value;
  __builtin_memcpy(&value, from, sizeof(T));
  return value;
}
template <class T>
void store(void* to, T value) {
  require_aligned(to, sizeof(T), "store");
  counters().bytes_stored += sizeof(T);
  __builtin_memcpy(to, &value, sizeof(T));
}

}  // namespace llmfast::emulated

extern llmfast::emulated::Dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running thread
