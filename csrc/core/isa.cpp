#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef LLMFAST_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llmfast {
namespace {

struct Features {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false, avx512bf16 = false;
  bool amx_tile = false, amx_bf16 = false;
  bool os_saves_ymm = false, os_saves_zmm = false, os_permits_amx = false;
  char brand[49] = "unknown";
};

#ifdef LLMFAST_X86
uint64_t xgetbv0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile state only to processes that ask for it (arch_prctl, since 5.16).
bool request_amx_permission() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

Features detect() {
  Features f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c >> 27 & 1;
  f.fma = c >> 12 & 1;
  f.f16c = c >> 29 & 1;
  const uint64_t saved = osxsave ? xgetbv0() : 0;
  f.os_saves_ymm = (saved & 0x6) == 0x6;
  f.os_saves_zmm = (saved & 0xe6) == 0xe6;
  const bool os_saves_tiles = (saved & 0x60000) == 0x60000;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    f.avx2 = b >> 5 & 1;
    f.avx512f = b >> 16 & 1;
    f.avx512dq = b >> 17 & 1;
    f.avx512bw = b >> 30 & 1;
    f.avx512vl = b >> 31 & 1;
    f.amx_bf16 = d >> 22 & 1;
    f.amx_tile = d >> 24 & 1;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512bf16 = a >> 5 & 1;
  }
  f.os_permits_amx = f.amx_tile && os_saves_tiles && request_amx_permission();
  if (__get_cpuid(0x80000000, &a, &b, &c, &d) && a >= 0x80000004)
    for (uint32_t leaf = 0; leaf < 3; ++leaf) {
      __get_cpuid(0x80000002 + leaf, &a, &b, &c, &d);
      const uint32_t words[4] = {a, b, c, d};
      std::memcpy(f.brand + 16 * leaf, words, 16);
    }
  f.brand[48] = 0;
  return f;
}
#else
Features detect() { return {}; }
#endif

const Features& features() {
  static const Features f = detect();
  return f;
}

bool has_avx2() { return features().avx2 && features().fma && features().f16c && features().os_saves_ymm; }

#ifdef LLMFAST_EMULATED
constexpr bool kEmulated = true;  // needs AVX2
#else
constexpr bool kEmulated = false;
#endif

bool has_avx512() {
  const Features& f = features();
  return has_avx2() && (kEmulated || (f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq && f.os_saves_zmm));
}

bool has_avx512bf16() { return has_avx512() && (kEmulated || features().avx512bf16); }

bool has_amx() {
  const Features& f = features();
  return has_avx512bf16() && (kEmulated || (f.amx_tile && f.amx_bf16 && f.os_permits_amx));
}

Isa cap_from_environment() {
  Isa cap = Isa::amx;
  if (const char* text = std::getenv("LLMFAST_CPU_ISA")) parse_isa(text, &cap);
  return cap;
}

std::atomic<Isa>& cap() {
  static std::atomic<Isa> value{cap_from_environment()};
  return value;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::ref: return "ref";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::amx: return "amx";
  }
  return "?";
}

bool parse_isa(const std::string& name, Isa* isa) {
  for (Isa candidate : {Isa::ref, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx})
    if (name == name_of(candidate)) {
      *isa = candidate;
      return true;
    }
  return false;
}

Isa detected_isa() {
  static const Isa best = has_amx()          ? Isa::amx
                          : has_avx512bf16() ? Isa::avx512bf16
                          : has_avx512()     ? Isa::avx512
                          : has_avx2()       ? Isa::avx2
                                             : Isa::ref;
  return best;
}

Isa active_isa() {
  const Isa limit = cap().load(std::memory_order_relaxed);
  return limit < detected_isa() ? limit : detected_isa();
}

void set_isa_cap(Isa value) { cap().store(value, std::memory_order_relaxed); }

bool is_emulated() { return kEmulated; }

std::string why_unavailable(Isa isa) {
  if (isa <= active_isa()) return "";
  if (isa <= detected_isa()) return std::string("capped at ") + name_of(active_isa());
  const Features& f = features();
  if (isa == Isa::amx && f.amx_tile && !f.os_permits_amx) return "the operating system does not grant AMX tile state";
  if (isa == Isa::avx512 && f.avx512f && !f.os_saves_zmm) return "the operating system does not save AVX-512 registers";
  return "the processor lacks it";
}

std::vector<std::string> cpu_features() {
  const Features& f = features();
  std::vector<std::string> names;
  const struct {
    const char* name;
    bool present;
  } all[] = {{"avx2", f.avx2},           {"fma", f.fma},           {"f16c", f.f16c},         {"avx512f", f.avx512f},
             {"avx512bw", f.avx512bw},   {"avx512vl", f.avx512vl}, {"avx512dq", f.avx512dq}, {"avx512bf16", f.avx512bf16},
             {"amx_tile", f.amx_tile},   {"amx_bf16", f.amx_bf16}};
  for (const auto& feature : all)
    if (feature.present) names.push_back(feature.name);
  return names;
}

std::string cpu_name() { return features().brand; }

}  // namespace llmfast
