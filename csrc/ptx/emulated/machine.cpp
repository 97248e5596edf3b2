#undef _FORTIFY_SOURCE  // its longjmp takes a switch to another stack for an error
#include "ptx/emulated/machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

llmfast::emulated::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace llmfast::emulated {
namespace {

constexpr int kWarp = 32, kMostThreads = 1024, kBarriers = 16;
constexpr size_t kMostShared = 232448;  // bytes that a block may have on the largest device we target
constexpr size_t kGuard = 1024;         // bytes watched on either side of dynamic shared memory
constexpr uint32_t kSharedBase = 1024;  // address of its first byte
constexpr size_t kStack = 256 << 10;    // its lowest page is inaccessible
constexpr unsigned char kGuardByte = 0xa5, kPoison = 0xff;

struct Copy {
  void* to;
  const void* from;
  int size, valid, group;
};

struct Thread {
  jmp_buf context;
  bool started = false;  // has a stack that `context` points into
  std::string waits_at;
  std::vector<Copy> copies;
  int groups = 0;  // committed so far
};

struct Barrier {
  const char* file = nullptr;
  int line = 0, threads = 0, arrived = 0;
  std::vector<int> waiting;
};

struct Machine {
  std::mutex mutex;
  Counters counters;
  const std::function<void()>* kernel = nullptr;
  jmp_buf scheduler;
  std::vector<Thread> threads = std::vector<Thread>(kMostThreads);
  char* stacks = nullptr;
  std::vector<char> shared = std::vector<char>(kMostShared + 3 * kGuard);
  size_t shared_bytes = 0;
  Barrier barriers[kBarriers];
  std::vector<std::unique_ptr<Meeting>> meetings[kMostThreads / kWarp];
  std::vector<int> ready;
  int running = 0, alive = 0;
  bool random = false, reverse = false;
  uint32_t random_state = 0;
  std::string error;

  char* shared_start() {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.data()) + 2 * kGuard - 1) / kGuard * kGuard);
  }
};

Machine& machine() {
  static Machine m;
  return m;
}

uint32_t random_below(Machine& m, size_t limit) {
  m.random_state = m.random_state * 1664525u + 1013904223u;
  return static_cast<uint32_t>((static_cast<uint64_t>(m.random_state) * limit) >> 32);
}

// ---- fibers ---------------------------------------------------------------------------------------------------------
// ucontext gives a fiber its stack; _setjmp and _longjmp then switch without its system calls. A fiber outlives its
// thread: it runs the same thread of every block. After an error it is abandoned, and its stack used afresh.

void switch_context(jmp_buf from, jmp_buf to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

void thread_exits(Machine& m);

void fiber() {
  Machine& m = machine();
  for (;;) {
    std::string error;
    try {
      (*m.kernel)();
    } catch (const std::exception& e) {
      error = e.what();
    }
    if (!error.empty()) fail(error);
    thread_exits(m);
    switch_context(m.threads[m.running].context, m.scheduler);
  }
}

void start_fiber(Machine& m, int index) {
  if (!m.stacks) {
    void* memory = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    m.stacks = static_cast<char*>(memory);
    for (int i = 0; i < kMostThreads; ++i) mprotect(m.stacks + i * kStack, 4096, PROT_NONE);
  }
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = m.stacks + index * kStack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber, 0);
  m.threads[index].started = true;
  if (_setjmp(m.scheduler) == 0) setcontext(&context);
}

// Runs thread `index` until it waits or exits.
void resume(Machine& m, int index) {
  m.running = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
  if (m.threads[index].started) {
    switch_context(m.scheduler, m.threads[index].context);
  } else {
    start_fiber(m, index);
  }
}

// Lets others run until somebody makes the running thread ready again.
void suspend(Machine& m, std::string where) {
  const int self = m.running;
  m.threads[self].waits_at = std::move(where);
  switch_context(m.threads[self].context, m.scheduler);
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

int take_ready(Machine& m) {
  const auto chosen = m.ready.begin() + (m.random ? random_below(m, m.ready.size()) : 0);
  const int index = *chosen;
  m.ready.erase(chosen);
  return index;
}

void open_barrier(Machine& m, Barrier& barrier) {
  m.ready.insert(m.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier = {};
}

void thread_exits(Machine& m) {
  Thread& thread = m.threads[m.running];
  if (!thread.copies.empty()) fail("a thread exits with cp.async copies that it never waited for");
  hopper_thread_exits(m.running);
  thread.groups = 0;
  --m.alive;
  Barrier& all = m.barriers[0];
  if (all.arrived > 0 && all.arrived == m.alive) open_barrier(m, all);
}

std::string deadlock(Machine& m, int threads, const std::vector<bool>& exited) {
  std::map<std::string, int> groups;
  for (int i = 0; i < threads; ++i) ++groups[exited[i] ? "have exited" : "wait at " + m.threads[i].waits_at];
  std::string text = "threads wait for others that never come:";
  for (const auto& [where, count] : groups) text += " " + std::to_string(count) + " " + where + ";";
  return text;
}

void reset(Machine& m) {
  for (Thread& thread : m.threads) thread = Thread{};
  for (Barrier& barrier : m.barriers) barrier = {};
  for (auto& warp : m.meetings) warp.clear();
  m.ready.clear();
  m.error.clear();
}

[[noreturn]] void report(Machine& m, const std::string& error) {
  const std::string text = "emulated kernel, block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
                           ", " + std::to_string(blockIdx.z) + "): " + error;
  reset(m);
  throw std::runtime_error(text);
}

void run_block(Machine& m, int threads) {
  char* shared = m.shared_start();
  std::memset(shared - kGuard, kGuardByte, m.shared_bytes + 2 * kGuard);
  std::memset(shared, kPoison, m.shared_bytes);
  hopper_block_starts();
  for (int i = 0; i < threads; ++i) m.ready.push_back(m.reverse ? threads - 1 - i : i);
  m.alive = threads;
  std::vector<bool> exited(threads, false);
  while (m.alive > 0) {
    if (m.ready.empty()) report(m, deadlock(m, threads, exited));
    const int before = m.alive, index = take_ready(m);
    resume(m, index);
    if (!m.error.empty()) report(m, m.error);
    if (m.alive < before) exited[index] = true;
  }
  const std::string unfinished = hopper_block_ends();
  if (!unfinished.empty()) report(m, unfinished);
  for (size_t i = 0; i < kGuard; ++i)
    for (char* byte : {shared - 1 - i, shared + m.shared_bytes + i})
      if (static_cast<unsigned char>(*byte) != kGuardByte)
        report(m, "a write at byte " + std::to_string(byte - shared) + " of " + std::to_string(m.shared_bytes) +
                      " bytes of dynamic shared memory");
}

void read_order(Machine& m) {
  const char* order = std::getenv("LLMFAST_EMULATE_ORDER");
  const std::string text = order ? order : "forward";
  m.reverse = text == "reverse";
  m.random = text != "reverse" && text != "forward";
  if (m.random) m.random_state = static_cast<uint32_t>(std::strtoul(text.c_str(), nullptr, 10)) * 2654435761u;
}

}  // namespace

Counters& counters() { return machine().counters; }

void run(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> one_launch(m.mutex);
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z, threads = int64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMostThreads || blocks < 1 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
    throw std::runtime_error("emulated kernel: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                             " threads cannot be launched");
  if (shared_bytes > kMostShared)
    throw std::runtime_error("emulated kernel: " + std::to_string(shared_bytes) + " bytes of shared memory a block");
  m.kernel = &kernel;
  m.shared_bytes = shared_bytes;
  read_order(m);
  ++m.counters.launches;
  gridDim = grid;
  blockDim = block;
  for (int64_t i = 0; i < blocks; ++i) {
    const unsigned index = static_cast<unsigned>(m.reverse ? blocks - 1 - i : i);
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    run_block(m, static_cast<int>(threads));
  }
}

void fail(const std::string& what) {
  Machine& m = machine();
  m.error = "thread " + std::to_string(m.running) + ": " + what;
  _longjmp(m.scheduler, 1);
}

void require_aligned(const void* pointer, size_t bytes, const char* instruction) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail(std::string(instruction) + " of " + std::to_string(bytes) + " bytes at an address that is no multiple of it");
}

// ---- barriers and warps ---------------------------------------------------------------------------------------------

void meet_block(int index, int threads, bool wait, const char* file, int line) {
  Machine& m = machine();
  Barrier& barrier = m.barriers[index];
  const std::string here = std::string(file) + ":" + std::to_string(line);
  if (barrier.arrived == 0) {
    barrier.file = file;
    barrier.line = line;
    barrier.threads = threads;
  }
  if (index == 0 && (barrier.line != line || std::strcmp(barrier.file, file) != 0))
    fail("__syncthreads at " + here + " while others wait at " + barrier.file + ":" + std::to_string(barrier.line));
  if (index != 0 && (threads % kWarp != 0 || threads != barrier.threads))
    fail("barrier " + std::to_string(index) + " met with different numbers of threads, or no multiple of 32");
  if (++barrier.arrived == (index == 0 ? m.alive : threads)) {
    open_barrier(m, barrier);
  } else if (wait) {
    barrier.waiting.push_back(m.running);
    suspend(m, index == 0 ? here : "barrier " + std::to_string(index));
  }
}

Meeting* arrive(uint32_t mask, const char* instruction, void* operands) {
  Machine& m = machine();
  const int lane = m.running % kWarp;
  auto& meetings = m.meetings[m.running / kWarp];
  if (!(mask >> lane & 1)) fail(std::string(instruction) + " by a lane that is not in its own mask");
  auto found = std::find_if(meetings.begin(), meetings.end(), [&](const auto& it) { return it->mask == mask; });
  if (found == meetings.end())
    found = meetings.insert(found, std::make_unique<Meeting>(Meeting{instruction, mask, 0, {}}));
  Meeting* meeting = found->get();
  if (std::strcmp(meeting->instruction, instruction) != 0)
    fail(std::string(instruction) + " while other lanes of the warp are at " + meeting->instruction);
  meeting->brought[lane] = operands;
  meeting->arrived |= 1u << lane;
  if (meeting->arrived == mask) return meeting;
  suspend(m, instruction);
  return nullptr;
}

void release(Meeting* meeting) {
  Machine& m = machine();
  const int first = m.running / kWarp * kWarp;
  for (int lane = 0; lane < kWarp; ++lane)
    if (meeting->mask >> lane & 1 && first + lane != m.running) m.ready.push_back(first + lane);
  auto& meetings = m.meetings[m.running / kWarp];
  meetings.erase(std::find_if(meetings.begin(), meetings.end(), [&](const auto& it) { return it.get() == meeting; }));
}

int running_thread() { return machine().running; }

void wait_in(std::vector<int>& waiting, const std::string& where) {
  Machine& m = machine();
  waiting.push_back(m.running);
  suspend(m, where);
}

void wake(std::vector<int>& waiting) {
  Machine& m = machine();
  m.ready.insert(m.ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// ---- shared memory --------------------------------------------------------------------------------------------------

void* shared_memory() { return machine().shared_start(); }

uint32_t shared_address(const void* pointer) {
  Machine& m = machine();
  const ptrdiff_t offset = static_cast<const char*>(pointer) - m.shared_start();
  if (offset < 0 || offset > static_cast<ptrdiff_t>(m.shared_bytes)) fail("shared_address of something else");
  return kSharedBase + static_cast<uint32_t>(offset);
}

void* shared_pointer(uint32_t address, int bytes, const char* instruction) {
  Machine& m = machine();
  if (address < kSharedBase || address - kSharedBase + bytes > m.shared_bytes)
    fail(std::string(instruction) + " at byte " + std::to_string(int64_t{address} - kSharedBase) + " of " +
         std::to_string(m.shared_bytes) + " bytes of dynamic shared memory");
  void* pointer = m.shared_start() + (address - kSharedBase);
  require_aligned(pointer, bytes, instruction);
  return pointer;
}

void copy_async(uint32_t to, const void* from, int size, int valid) {
  Machine& m = machine();
  void* destination = shared_pointer(to, size, "cp.async");
  if (valid < 0 || valid > size)
    fail("cp.async of " + std::to_string(valid) + " of " + std::to_string(size) + " bytes");
  if (valid > 0) require_aligned(from, size, "cp.async");
  std::memset(destination, kPoison, size);
  Thread& thread = m.threads[m.running];
  thread.copies.push_back({destination, from, size, valid, thread.groups});
}

void copy_async_commit() {
  Machine& m = machine();
  ++m.threads[m.running].groups;
}

void copy_async_wait(int youngest) {
  Machine& m = machine();
  Thread& thread = m.threads[m.running];
  const auto arrived = [&](const Copy& copy) { return copy.group < thread.groups - youngest; };
  for (const Copy& copy : thread.copies) {
    if (!arrived(copy)) continue;
    std::memset(copy.to, 0, copy.size);
    if (copy.valid) std::memcpy(copy.to, copy.from, copy.valid);
    m.counters.bytes_loaded += copy.valid;
  }
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), arrived), thread.copies.end());
}

}  // namespace llmfast::emulated
