// What kernels assume of the vector and tile vocabulary of the amx target, against plain loops over the definitions.
// test_instructions.py builds it on the emulated instructions, and on the machine's own where it has them, so that the
// emulation and the hardware are held to the same expectations.
//   instructions            runs all checks; exit status 0 if they hold
//   instructions MISTAKE    commits a programming error that the emulation must catch (it aborts)
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "core/isa.h"
#include "simd/dot_bf16.h"
#include "simd/math.h"
#include "simd/tile_amx.h"
#include "simd/vec.h"

namespace llmfast::LLMFAST_TARGET {
namespace {

int failures = 0;

void check(bool holds, const char* what, double detail = 0) {
  if (holds) return;
  std::printf("FAILED: %s (%g)\n", what, detail);
  ++failures;
}

uint32_t random_bits() {
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}
float random_float() { return static_cast<float>(random_bits()) / 8388608.0f - 1; }
bf16 small_integer() { return from_float<bf16>(static_cast<float>(random_bits() % 17) - 8); }
float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
const float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

// ---- vectors -------------------------------------------------------------------------------------------------------

void vectors() {
  float a[16], b[16], c[16], out[17];
  for (int i = 0; i < 16; ++i) a[i] = random_float(), b[i] = random_float(), c[i] = random_float();
  const auto lanes = [&](Vec v) { v.store(out); };
  const Vec x = Vec::load(a), y = Vec::load(b), z = Vec::load(c);
  lanes(fma(x, y, z));
  for (int i = 0; i < 16; ++i) check(out[i] == std::fma(a[i], b[i], c[i]), "fma rounds once", i);
  lanes(fnma(x, y, z));
  for (int i = 0; i < 16; ++i) check(out[i] == std::fma(-a[i], b[i], c[i]), "fnma", i);
  lanes(max(Vec::set(kNan), y));
  for (int i = 0; i < 16; ++i) check(out[i] == b[i], "max with NaN gives the second operand", i);
  lanes(min(x, y));
  for (int i = 0; i < 16; ++i) check(out[i] == std::fmin(a[i], b[i]), "min", i);
  lanes(select(lt(x, y), z, x));
  for (int i = 0; i < 16; ++i) check(out[i] == (a[i] < b[i] ? c[i] : a[i]), "select", i);
  check(any(gt(x, Vec::set(-2))) && !any(gt(x, Vec::set(2))) && !any(eq(Vec::set(kNan), Vec::set(kNan))), "any");
  lanes(scale_exp2(x, Vec::iota() * Vec::set(-8)));
  for (int i = 0; i < 16; ++i) check(out[i] == std::ldexp(a[i], -8 * i), "scale_exp2", i);
  lanes(round_even(Vec::iota() * Vec::set(0.5f)));
  for (int i = 0; i < 16; ++i) check(out[i] == std::nearbyint(0.5f * i), "round_even", i);
  lanes(exp(Vec::iota() - Vec::set(8)));
  for (int i = 0; i < 16; ++i) check(std::fabs(out[i] / std::exp(i - 8.0) - 1) < 1e-6, "exp", i);
  double sum = 0;
  float largest = a[0];
  for (float value : a) sum += value, largest = value > largest ? value : largest;
  check(std::fabs(reduce_add(x) - sum) < 1e-5 && reduce_max(x) == largest, "reduce");
  Vec rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = Vec::set(100.0f * i) + Vec::iota();
  lanes(sum_each(rows));
  for (int i = 0; i < 16; ++i) check(out[i] == 1600.0f * i + 120.0f, "sum_each", i);
  transpose(rows);
  for (int i = 0; i < 16; ++i) {
    lanes(rows[i]);
    for (int j = 0; j < 16; ++j) check(out[j] == 100.0f * j + i, "transpose", i);
  }
}

void narrowing() {
  // Denormals: AVX512_BF16 gives zero, so they are not listed.
  const uint32_t values[16] = {0x3f800000, 0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0xbf818000,
                               0x7f7fffff, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0x80000000,
                               0x00000000, 0x00800000, 0x477fffff, 0xc2f6e979};
  float given[16];
  for (int i = 0; i < 16; ++i) given[i] = from_bits(values[i]);
  bf16 half[17];
  half[16].bits = 0x1234;
  Vec::load(given).store(half);
  for (int i = 0; i < 16; ++i) check(half[i].bits == from_float<bf16>(given[i]).bits, "narrowing to bf16", i);
  Vec::set(1).store_n(half, 5);
  check(half[4].bits == 0x3f80 && half[5].bits == from_float<bf16>(given[5]).bits, "store_n");
  check(half[16].bits == 0x1234, "store");
  fp16 small[16];
  Vec::load(given).store(small);
  for (int i = 0; i < 16; ++i)
    check(small[i].bits == from_float<fp16>(given[i]).bits || std::isnan(given[i]), "narrowing to fp16", i);
}

// A masked access may touch nothing beyond its lanes, not even a page that is not there.
void page_end() {
  char* pages = static_cast<char*>(mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(pages + 4096, 4096, PROT_NONE);
  float out[16];
  for (int n = 0; n <= 15; ++n) {
    float* floats = reinterpret_cast<float*>(pages + 4096) - n;
    bf16* halves = reinterpret_cast<bf16*>(pages + 4096) - n;
    Vec::set(3).store_n(floats, n);
    Vec::load_n(floats, n).store(out);
    for (int i = 0; i < 16; ++i) check(out[i] == (i < n ? 3 : 0), "load_n of float32 at the end of a page", n);
    Vec::set(5).store_n(halves, n);
    Vec::load_n(halves, n).store(out);
    for (int i = 0; i < 16; ++i) check(out[i] == (i < n ? 5 : 0), "load_n of bf16 at the end of a page", n);
  }
  munmap(pages, 8192);
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

void packing() {
  alignas(64) bf16 dst[kBlockElements];
  bf16 src[40 * 50];
  for (bf16& value : src) value.bits = static_cast<uint16_t>(random_bits());
  for (int64_t outer : {1, 15, 16, 31, 32})
    for (int64_t inner : {1, 2, 17, 32}) {
      const auto at = [&](int64_t o, int64_t i) { return o < outer && i < inner ? src[o * 50 + i].bits : 0; };
      const auto expect = [&](const char* what, auto value) {
        for (int r = 0; r < 32; ++r)
          for (int k = 0; k < 32; ++k) {
            const bool is_b = what[0] == 'b';
            const int64_t position = is_b ? r / 16 * 512 + k / 2 * 32 + r % 16 * 2 + k % 2 : r * 32 + k;
            check(dst[position].bits == value(r, k), what, r * 100 + k);
          }
      };
      a_block_from_rows(dst, src, 50, outer, inner);
      expect("a_block_from_rows", [&](int m, int k) { return at(m, k); });
      a_block_from_columns(dst, src, 50, inner, outer);
      expect("a_block_from_columns", [&](int m, int k) { return at(k, m); });
      b_block_from_rows(dst, src, 50, outer, inner);
      expect("b_block_from_rows", [&](int n, int k) { return at(k, n); });
      b_block_from_columns(dst, src, 50, inner, outer);
      expect("b_block_from_columns", [&](int n, int k) { return at(n, k); });
    }
}

// Small integers make every sum exact, whatever the order of additions: this checks what is multiplied with what.
void vector_products() {
  constexpr int kRows = 14;
  alignas(64) bf16 by_rows[kRows * kBlock], by_columns[kRows * kBlock], b[kBlockElements];
  bf16 rows[kRows * 32], columns[32 * kRows];
  for (bf16& value : b) value = small_integer();
  for (int m = 0; m < kRows; ++m)
    for (int k = 0; k < 32; ++k) rows[m * 32 + k] = columns[k * kRows + m] = small_integer();
  a_rows_from_rows<kRows>(by_rows, rows, 32, kRows - 1, 31);
  a_rows_from_columns<kRows>(by_columns, columns, kRows, kRows - 1, 31);
  for (int i = 0; i < kRows * 32; ++i) {
    const uint16_t expected = i / 32 < kRows - 1 && i % 32 < 31 ? rows[i].bits : 0;
    check(by_rows[i].bits == expected, "a_rows_from_rows", i);
    check(by_columns[i].bits == expected, "a_rows_from_columns", i);
  }
  Vec sums[kRows][kBlockVecs];
  for (auto& row : sums) row[0] = row[1] = Vec::set(3);
  dot_block<kRows>(sums, by_rows, b);
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < 32; ++n) {
      float expected = 3, lanes[16];
      for (int k = 0; k < 32; ++k)
        expected += to_float(by_rows[m * 32 + k]) * to_float(b[n / 16 * 512 + k / 2 * 32 + n % 16 * 2 + k % 2]);
      sums[m][n / 16].store(lanes);
      check(lanes[n % 16] == expected, "dot_block", m * 100 + n);
    }
}

void tile_products() {
  alignas(64) bf16 a[kTileElements], b[kTileElements];
  float sums[16 * 20], before[16 * 20];
  for (bf16& value : a) value = small_integer();
  for (bf16& value : b) value = small_integer();
  for (int i = 0; i < 16 * 20; ++i) before[i] = sums[i] = static_cast<float>(random_bits() % 100);
  TileConfig config;
  tile_load<0>(sums, 80);
  tile_stream_load<4>(a, 64);
  tile_load<6>(b, 64);
  tile_dot<0, 4, 6>();
  tile_store<0>(sums, 80);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 20; ++n) {
      float expected = before[m * 20 + n];
      for (int k = 0; n < 16 && k < 32; ++k)
        expected += to_float(a[m * 32 + k]) * to_float(b[k / 2 * 32 + n * 2 + k % 2]);
      check(sums[m * 20 + n] == expected, "tile_dot", m * 100 + n);
    }

  for (bf16& value : a) value = from_float<bf16>(1.5f);
  for (bf16& value : b) value = from_float<bf16>(from_bits(0x00400000));  // a denormal
  a[5 * 32].bits = 0x7f80;                                                // infinity times (denormal taken as) zero
  tile_zero<7>();
  tile_load<5>(a, 64);
  tile_load<6>(b, 64);
  tile_dot<7, 5, 6>();
  tile_store<7>(sums, 80);
  for (int m = 0; m < 16; ++m) {
    const float value = sums[m * 20];
    check(m == 5 ? std::isnan(value) : value == 0, "tile_dot takes denormals as zero", m);
  }
}

// The stored tile must be what vector code wrote just before the load, and what it reads after the store.
void barriers() {
  alignas(64) float tile[16 * 16];
  TileConfig config;
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 256; i += 16) Vec::set(static_cast<float>(round * 1000 + i)).store(tile + i);
    tile_load<3>(tile, 64);
    for (int i = 0; i < 256; i += 16) Vec::zero().store(tile + i);
    tile_store<3>(tile, 64);
    for (int i = 0; i < 256; i += 16) check(tile[i + 5] == static_cast<float>(round * 1000 + i), "barriers", i);
  }
}

int mistake(const char* name) {
  alignas(64) float data[512] = {};
  if (!std::strcmp(name, "unaligned_stream")) Vec::zero().stream(data + 1);
  if (!std::strcmp(name, "no_configuration")) tile_load<0>(data, 64);
  if (!std::strcmp(name, "after_release")) {
    { TileConfig config; }
    tile_zero<0>();
  }
  if (!std::strcmp(name, "nested_configuration")) {
    TileConfig outer;
    TileConfig inner;
  }
  if (!std::strcmp(name, "reserved_bytes")) {
    TileShapes shapes = {};
    shapes.palette = 1;
    shapes.rows[9] = 16;
    tile_configure(shapes);
  }
  return 0;
}

}  // namespace
}  // namespace llmfast::LLMFAST_TARGET

int main(int argc, char** argv) {
  using namespace llmfast::LLMFAST_TARGET;
  if (llmfast::detected_isa() != llmfast::Isa::amx) {  // also asks for the permission to use tiles
    std::printf("this machine is short of AMX: %s\n", llmfast::why_unavailable(llmfast::Isa::amx).c_str());
    return 2;
  }
  if (argc > 1) return mistake(argv[1]);
  vectors();
  narrowing();
  page_end();
  packing();
  vector_products();
  tile_products();
  barriers();
  return failures != 0;
}
