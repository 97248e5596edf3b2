// The emulated machine's mbarriers, bulk copies and warpgroup products. Everything asynchronous happens as late as its
// wait allows: a load when a thread first waits for its mbarrier, a store when its thread waits for the group, a product
// when the warpgroup waits. Shared memory that is written again too early, or registers that are read too early, are then
// wrong results.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>

#include "ptx/emulated/machine.h"
#include "simd/scalar.h"

namespace llmfast {
namespace {

// What a TensorMap holds here.
struct Map {
  const char* data;
  uint32_t size[5];
  uint32_t stride[5];  // elements; enough for tests
  uint16_t box[5];
  uint8_t dims, element_bytes;
  uint8_t swizzle;
};
static_assert(sizeof(Map) <= sizeof(TensorMap));

Map read(const TensorMap& map) {
  Map m;
  std::memcpy(&m, map.opaque, sizeof(Map));
  return m;
}

}  // namespace

TensorMap make_tensor_map(const MappedTensor& t) {
  Map m = {};
  m.data = static_cast<const char*>(t.data);
  m.dims = static_cast<uint8_t>(t.dims);
  m.element_bytes = static_cast<uint8_t>(size_of(t.dtype));
  m.swizzle = static_cast<uint8_t>(t.swizzle);
  bool fits = can_map(t) && t.dims >= 2 && t.dims <= 5 && t.box[0] * m.element_bytes % 16 == 0 &&
              (t.swizzle == Swizzle::none || t.box[0] * m.element_bytes <= static_cast<int>(t.swizzle));
  for (int i = 0; i < t.dims; ++i) {
    fits = fits && t.box[i] >= 1 && t.box[i] <= 256;
    m.size[i] = static_cast<uint32_t>(t.size[i]);
    m.stride[i] = static_cast<uint32_t>(t.stride[i]);
    m.box[i] = static_cast<uint16_t>(t.box[i]);
  }
  if (!fits) throw std::runtime_error("make_tensor_map: the copy engine cannot address this tensor or box");
  TensorMap map = {};
  std::memcpy(map.opaque, &m, sizeof(Map));
  return map;
}

namespace emulated {
namespace {

constexpr int kWarpgroup = 128, kMostThreads = 1024;
constexpr uint32_t kSharedBase = 1024;

struct Load {
  uint32_t to;
  Map map;               // or
  const char* from;      // bytes of memory
  int at[5], bytes;
};

struct MBarrier {
  int arrivals = 0, pending = 0, parity = 0;
  int64_t bytes = 0;  // still expected; negative while copies are ahead of the expectation
  std::vector<int> waiting;
  std::vector<Load> loads;
};

struct Store {
  uint32_t from;
  Map map;
  char* to;
  int at[5], bytes, group;
  bool add;
};

struct Stores {
  std::vector<Store> all;
  int groups = 0;
};

struct Products {
  std::vector<WarpgroupProduct> all;
  int groups = 0;
};

struct Rendezvous {
  int arrived = 0, youngest = 0;
  std::vector<int> waiting;
};

struct Hopper {
  std::map<uint32_t, MBarrier> barriers;
  Stores stores[kMostThreads];
  Products products[kMostThreads];
  Rendezvous waits[kMostThreads / kWarpgroup];
};

Hopper& hopper() {
  static Hopper h;
  return h;
}

MBarrier& barrier_at(uint32_t address, const char* instruction) {
  shared_pointer(address, 8, instruction);
  const auto found = hopper().barriers.find(address);
  if (found == hopper().barriers.end()) fail(std::string(instruction) + " of an mbarrier that was not initialised");
  return found->second;
}

void complete_if_done(MBarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.parity ^= 1;
  b.pending = b.arrivals;
  wake(b.waiting);
}

// The swizzle exchanges 16-byte chunks by address: bits 4.. ^= bits 7.. .
uint32_t swizzled(uint32_t address, int swizzle) {
  const uint32_t bits = swizzle == 128 ? 7 : swizzle == 64 ? 3 : swizzle == 32 ? 1 : 0;
  return address ^ ((address >> 7 & bits) << 4);
}

int box_bytes(const Map& map) {
  int bytes = map.element_bytes;
  for (int i = 0; i < map.dims; ++i) bytes *= map.box[i];
  return bytes;
}

// body(shared address of an element, its address in the tensor or nullptr) for every element of the box.
template <class Body>
void for_each_element(const Map& map, const int* at, uint32_t box, const Body& body) {
  int index[5] = {};
  for (int i = 0, count = box_bytes(map) / map.element_bytes; i < count; ++i) {
    const char* element = map.data;
    for (int d = 0; d < map.dims; ++d) {
      const int64_t position = int64_t{at[d]} + index[d];
      if (position < 0 || position >= map.size[d]) element = nullptr;
      if (element) element += position * map.stride[d] * map.element_bytes;
    }
    body(swizzled(box + i * map.element_bytes, map.swizzle), const_cast<char*>(element));
    for (int d = 0; d < map.dims && ++index[d] == map.box[d]; ++d) index[d] = 0;
  }
}

char* shared_byte(uint32_t address) { return static_cast<char*>(shared_memory()) + (address - kSharedBase); }

void require_box(uint32_t address, int bytes, int swizzle, const char* instruction) {
  const uint32_t period = swizzle == 128 ? 1024 : swizzle == 64 ? 512 : swizzle == 32 ? 256 : 128;
  shared_pointer(address, 16, instruction);
  shared_pointer(address + bytes - 16, 16, instruction);
  if (address % period != 0)
    fail(std::string(instruction) + ": a box at a shared address that is no multiple of " + std::to_string(period));
}

void deliver(MBarrier& b) {
  for (const Load& load : b.loads) {
    if (load.from) {
      std::memcpy(shared_byte(load.to), load.from, load.bytes);
    } else {
      for_each_element(load.map, load.at, load.to, [&](uint32_t to, const char* from) {
        if (from) std::memcpy(shared_byte(to), from, load.map.element_bytes);
        else std::memset(shared_byte(to), 0, load.map.element_bytes);
      });
    }
    b.bytes -= load.bytes;
    counters().bytes_loaded += load.bytes;
  }
  b.loads.clear();
  complete_if_done(b);
}

void perform(const Store& store) {
  if (!store.to) {
    for_each_element(store.map, store.at, store.from, [&](uint32_t from, char* to) {
      if (to) std::memcpy(to, shared_byte(from), store.map.element_bytes);
    });
  } else if (store.add) {
    for (int i = 0; i < store.bytes; i += 4) {
      float sum, more;
      std::memcpy(&sum, store.to + i, 4);
      std::memcpy(&more, shared_byte(store.from + i), 4);
      sum += more;
      std::memcpy(store.to + i, &sum, 4);
    }
  } else {
    std::memcpy(store.to, shared_byte(store.from), store.bytes);
  }
  counters().bytes_stored += store.bytes;
}

float element(uint32_t address, bool is_bf16) {
  uint16_t bits;
  std::memcpy(&bits, shared_pointer(address, 2, "warpgroup product"), 2);
  return is_bf16 ? LLMFAST_TARGET::to_float(bf16{bits}) : LLMFAST_TARGET::to_float(fp16{bits});
}
float half(uint32_t pair, int index, bool is_bf16) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * index);
  return is_bf16 ? LLMFAST_TARGET::to_float(bf16{bits}) : LLMFAST_TARGET::to_float(fp16{bits});
}

// Element (mn, k) of an operand behind a descriptor.
float operand_element(uint64_t descriptor, bool mn_major, int mn, int k, bool is_bf16) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const int mode = static_cast<int>(descriptor >> 62), row_bytes = mode == 1 ? 128 : mode == 2 ? 64 : 32;
  if (mode == 0) fail("a warpgroup product of an operand without swizzle is not emulated");
  const uint32_t at = mn_major ? start + mn / (row_bytes / 2) * leading + k / 8 * stride + k % 8 * row_bytes +
                                     mn % (row_bytes / 2) * 2
                               : start + mn / 8 * stride + mn % 8 * row_bytes + k * 2;
  return element(swizzled(at, row_bytes), is_bf16);
}

void multiply(int first_thread, size_t index) {
  Hopper& h = hopper();
  const WarpgroupProduct& first = h.products[first_thread].all[index];
  static float A[64][16], B[256][16];
  for (int t = 0; t < kWarpgroup; ++t) {
    const WarpgroupProduct& mine = h.products[first_thread + t].all[index];
    if (mine.N != first.N || mine.a != first.a || mine.b != first.b || mine.add != first.add ||
        mine.a_in_registers != first.a_in_registers)
      fail("threads of a warpgroup disagree about a product");
    if (!mine.a_in_registers) continue;
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 2; ++i)
        A[16 * (t / 32) + t % 32 / 4 + 8 * (r % 2)][2 * (t % 4) + 8 * (r / 2) + i] =
            half(mine.a_registers[r], i, mine.is_bf16);
  }
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 64 && !first.a_in_registers; ++m)
      A[m][k] = operand_element(first.a, first.a_mn_major, m, k, first.is_bf16);
    for (int n = 0; n < first.N; ++n) B[n][k] = operand_element(first.b, first.b_mn_major, n, k, first.is_bf16);
  }
  for (int t = 0; t < kWarpgroup; ++t) {
    const WarpgroupProduct& mine = h.products[first_thread + t].all[index];
    for (int i = 0; i < mine.N / 2; ++i) {
      const int m = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), n = 8 * (i / 4) + 2 * (t % 4) + i % 2;
      float sum = mine.add ? mine.d[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += A[m][k] * B[n][k];
      mine.d[i] = sum;
    }
  }
  ++counters().warpgroup_products;
}

}  // namespace

// ---- mbarriers ------------------------------------------------------------------------------------------------------

void mbarrier_init(uint32_t address, int arrivals) {
  shared_pointer(address, 8, "mbarrier.init");
  MBarrier& b = hopper().barriers[address];
  b = {};
  b.arrivals = b.pending = arrivals;
}

void mbarrier_arrive(uint32_t address, int bytes) {
  MBarrier& b = barrier_at(address, "mbarrier.arrive");
  if (b.pending == 0) fail("more threads arrive at an mbarrier than it expects");
  b.bytes += bytes;
  --b.pending;
  complete_if_done(b);
}

void mbarrier_wait(uint32_t address, int parity) {
  for (;;) {
    MBarrier& b = barrier_at(address, "mbarrier.try_wait");
    if (b.parity != parity) return;
    deliver(b);
    if (b.parity != parity) return;
    wait_in(b.waiting, "mbarrier at byte " + std::to_string(address - kSharedBase) + ", parity " +
                           std::to_string(parity) + ", " + std::to_string(b.pending) + " arrivals and " +
                           std::to_string(b.bytes) + " bytes missing");
  }
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

void bulk_load(uint32_t to, const TensorMap& tensor, uint32_t barrier, std::initializer_list<int> at) {
  const Map map = read(tensor);
  if (static_cast<int>(at.size()) != map.dims) fail("bulk load: a coordinate for each dimension");
  const int bytes = box_bytes(map);
  require_box(to, bytes, map.swizzle, "bulk load");
  std::memset(shared_byte(to), 0xff, bytes);
  Load load{to, map, nullptr, {}, bytes};
  std::copy(at.begin(), at.end(), load.at);
  MBarrier& b = barrier_at(barrier, "bulk load");
  b.loads.push_back(load);
  if (!b.waiting.empty()) wake(b.waiting);  // they deliver it
}

void bulk_load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  if (bytes <= 0 || bytes % 16 != 0) fail("bulk load of a number of bytes that is no multiple of 16");
  require_aligned(from, 16, "bulk load");
  shared_pointer(to, 16, "bulk load");
  shared_pointer(to + bytes - 16, 16, "bulk load");
  std::memset(shared_byte(to), 0xff, bytes);
  MBarrier& b = barrier_at(barrier, "bulk load");
  b.loads.push_back({to, {}, static_cast<const char*>(from), {}, bytes});
  if (!b.waiting.empty()) wake(b.waiting);
}

void bulk_store(const TensorMap& tensor, uint32_t from, std::initializer_list<int> at) {
  const Map map = read(tensor);
  if (static_cast<int>(at.size()) != map.dims) fail("bulk store: a coordinate for each dimension");
  require_box(from, box_bytes(map), map.swizzle, "bulk store");
  Stores& stores = hopper().stores[running_thread()];
  Store store{from, map, nullptr, {}, box_bytes(map), stores.groups, false};
  std::copy(at.begin(), at.end(), store.at);
  stores.all.push_back(store);
}

void bulk_store_bytes(void* to, uint32_t from, int bytes, bool add_floats) {
  if (bytes <= 0 || bytes % 16 != 0) fail("bulk store of a number of bytes that is no multiple of 16");
  require_aligned(to, 16, "bulk store");
  shared_pointer(from, 16, "bulk store");
  shared_pointer(from + bytes - 16, 16, "bulk store");
  Stores& stores = hopper().stores[running_thread()];
  stores.all.push_back({from, {}, static_cast<char*>(to), {}, bytes, stores.groups, add_floats});
}

void bulk_commit() { ++hopper().stores[running_thread()].groups; }

void bulk_wait(int youngest) {
  Stores& stores = hopper().stores[running_thread()];
  const auto due = [&](const Store& store) { return store.group < stores.groups - youngest; };
  for (const Store& store : stores.all)
    if (due(store)) perform(store);
  stores.all.erase(std::remove_if(stores.all.begin(), stores.all.end(), due), stores.all.end());
}

// ---- products -------------------------------------------------------------------------------------------------------

void warpgroup_product(const WarpgroupProduct& product) {
  Products& mine = hopper().products[running_thread()];
  mine.all.push_back(product);
  mine.all.back().group = mine.groups;
  if (!product.add) std::fill(product.d, product.d + product.N / 2, std::nanf(""));  // until it has run
}

void warpgroup_commit() { ++hopper().products[running_thread()].groups; }

void warpgroup_wait(int youngest) {
  Hopper& h = hopper();
  const int first = running_thread() / kWarpgroup * kWarpgroup;
  Rendezvous& meeting = h.waits[first / kWarpgroup];
  if (meeting.arrived > 0 && meeting.youngest != youngest) fail("threads of a warpgroup wait for different groups");
  meeting.youngest = youngest;
  if (++meeting.arrived < kWarpgroup) return wait_in(meeting.waiting, "warpgroup_wait");
  const Products& leader = h.products[first];
  for (int t = 1; t < kWarpgroup; ++t)
    if (h.products[first + t].all.size() != leader.all.size() || h.products[first + t].groups != leader.groups)
      fail("threads of a warpgroup have issued different numbers of products");
  size_t done = 0;
  for (; done < leader.all.size() && leader.all[done].group < leader.groups - youngest; ++done) multiply(first, done);
  for (int t = 0; t < kWarpgroup; ++t) {
    auto& all = h.products[first + t].all;
    all.erase(all.begin(), all.begin() + static_cast<ptrdiff_t>(done));
  }
  meeting.arrived = 0;
  wake(meeting.waiting);
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

void hopper_block_starts() {
  Hopper& h = hopper();
  h.barriers.clear();
  for (Stores& stores : h.stores) stores = {};
  for (Products& products : h.products) products = {};
  for (Rendezvous& wait : h.waits) wait = {};
}

void hopper_thread_exits(int thread) {
  if (!hopper().stores[thread].all.empty()) fail("a thread exits with bulk stores that it never waited for");
  if (!hopper().products[thread].all.empty()) fail("a thread exits with warpgroup products that it never waited for");
}

std::string hopper_block_ends() {
  for (const auto& [address, barrier] : hopper().barriers)
    if (!barrier.loads.empty())
      return "a block ends while bulk loads are under way to the mbarrier at byte " +
             std::to_string(address - kSharedBase);
  return "";
}

}  // namespace emulated
}  // namespace llmfast
