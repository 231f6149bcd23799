// Tests of csrc/cpu/dot*.h, simd.h, bf16.h, peak.h and of the AMX emulation, for the target of the compile flags.
// One executable per target, one test per name given on the command line; tests/test_dot.py compiles and runs them.
#include "../../csrc/cpu/peak.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

using namespace trmfast;
using namespace trmfast::TRMFAST_NAMESPACE;

namespace {

__attribute__((format(printf, 4, 5), noreturn)) void fail(const char* file, int line, const char* what,
                                                          const char* format, ...) {
  std::fprintf(stderr, "%s:%d: CHECK(%s) ", file, line, what);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::_Exit(1);
}

// CHECK(condition) or CHECK(condition, format, arguments...)
#define CHECK(condition, ...)                                                                                          \
  do {                                                                                                                 \
    if (!(condition)) fail(__FILE__, __LINE__, #condition, " " __VA_ARGS__);                                           \
  } while (0)

#if defined(__SANITIZE_ADDRESS__)
constexpr int kGuard = 0; // the sanitizer's own red zones are stricter
#else
constexpr int kGuard = 128;
#endif

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T> T cast(float x);
template <> float cast<float>(float x) { return x; }
template <> bf16 cast<bf16>(float x) { return to_bf16(x); }

uint32_t raw(float x) { return bits_of(x); }
uint32_t raw(bf16 x) { return x.bits; }

// `size` elements, NaN to begin with, between guard zones of NaN that must survive.
template <class T> struct Buffer {
  explicit Buffer(long size) : size(size) {
    const long bytes = (size + 2 * kGuard) * static_cast<long>(sizeof(T));
    memory = static_cast<T*>(::operator new(bytes, std::align_val_t(64)));
    data = memory + kGuard;
    for (long i = -kGuard; i < size + kGuard; ++i) data[i] = cast<T>(kNaN);
  }
  ~Buffer() {
    for (int i = 0; i < kGuard; ++i) {
      CHECK(raw(memory[i]) == raw(cast<T>(kNaN)), "written before a buffer");
      CHECK(raw(data[size + i]) == raw(cast<T>(kNaN)), "written after a buffer");
    }
    ::operator delete(memory, std::align_val_t(64));
  }
  Buffer(const Buffer&) = delete;

  long size;
  T *memory, *data;
};

std::mt19937 generator(20240229);

float random_normal() {
  static std::normal_distribution<float> normal;
  return normal(generator);
}

int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// The place of b[k][n] in a panel.
template <class T> long panel_index(int k, int n);
template <> long panel_index<float>(int k, int n) { return k * 32 + n; }
template <> long panel_index<bf16>(int k, int n) { return k / 2 * 64 + n * 2 + k % 2; }

// Operands of one product with NaN in every element that must not be used.
template <class T> struct Operands {
  Operands(int rows, int depth, int extra_lda)
      : rows(rows), depth(depth), lda(depth + extra_lda), a((rows - 1) * lda + depth), b(32L * depth) {
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < depth; ++k) a.data[r * lda + k] = cast<T>(random_normal());
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 32; ++n) b.data[panel_index<T>(k, n)] = cast<T>(random_normal());
  }

  int rows, depth;
  long lda;
  Buffer<T> a, b;
};

template <class T> void check_product(int rows, int depth, int extra_lda, int extra_ldc, bool accumulate,
                                      bool prefetch) {
  const Operands<T> in(rows, depth, extra_lda);
  const long ldc = 32 + extra_ldc;
  Buffer<float> c((rows - 1) * ldc + 32);
  std::vector<float> before(c.size, kNaN);
  if (accumulate) {
    for (int r = 0; r < rows; ++r)
      for (int n = 0; n < 32; ++n) before[r * ldc + n] = c.data[r * ldc + n] = 10 * random_normal();
  }
  Prefetch next;
  if (prefetch) next = {in.b.data, 32L * depth * static_cast<long>(sizeof(T))};
  Dot<T>::run(in.a.data, in.lda, in.b.data, depth, rows, c.data, ldc, accumulate, next);

  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < 32; ++n) {
      double expected = accumulate ? before[r * ldc + n] : 0, magnitude = std::fabs(expected);
      for (int k = 0; k < depth; ++k) {
        const double product = static_cast<double>(to_float(in.a.data[r * in.lda + k])) *
                               static_cast<double>(to_float(in.b.data[panel_index<T>(k, n)]));
        expected += product;
        magnitude += std::fabs(product);
      }
      // The rounding errors of depth + 2 additions and, without fused multiply-adds, of a product, at their worst.
      const double bound = (depth + 3) * 0x1p-24 * magnitude;
      const double error = std::fabs(c.data[r * ldc + n] - expected);
      CHECK(error <= bound, "rows %d depth %d accumulate %d [%d][%d]: %g, off by %g, allowed %g", rows, depth,
            accumulate, r, n, static_cast<double>(c.data[r * ldc + n]), error, bound);
    }
    for (int n = 32; n < ldc && r + 1 < rows; ++n) {
      CHECK(bits_of(c.data[r * ldc + n]) == bits_of(kNaN), "rows %d: wrote between the rows of c", rows);
    }
  }
}

template <class T> void products() {
  constexpr int step = Dot<T>::kDepthStep;
  for (int rows = 1; rows <= Dot<T>::kRows; ++rows) {
    for (int steps : {1, 2, 3, 5, 11}) {
      for (bool accumulate : {false, true}) {
        check_product<T>(rows, steps * step, random_int(0, 40), random_int(0, 40), accumulate, random_int(0, 1));
      }
    }
  }
  for (int i = 0; i < 100; ++i) {
    check_product<T>(random_int(1, Dot<T>::kRows), random_int(1, 600 / step) * step, random_int(0, 3), random_int(0, 3),
                     random_int(0, 1), random_int(0, 1));
  }
  Dot<T>::release();
}

void product_float() { products<float>(); }
void product_bf16() { products<bf16>(); }

// A row's sums do not depend on the rows that are computed with it, nor on prefetching, bit for bit: recomputed values
// must be the same however the rows are divided.
template <class T> void same_for_any_rows() {
  const int rows = Dot<T>::kRows, depth = 3 * 32;
  const Operands<T> in(rows, depth, 6);
  std::vector<float> together(rows * 32, kNaN), alone(rows * 32, kNaN);
  Dot<T>::run(in.a.data, in.lda, in.b.data, depth, rows, together.data(), 32, false, Prefetch{in.b.data, 64 * depth});
  for (int r = 0; r < rows; ++r) {
    Dot<T>::run(in.a.data + r * in.lda, in.lda, in.b.data, depth, 1, alone.data() + r * 32, 32, false);
  }
  Dot<T>::release();
  CHECK(std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)) == 0);
}

void rows_are_independent() {
  same_for_any_rows<float>();
  same_for_any_rows<bf16>();
}

// ---- bf16 ----

// Nearest bf16, ties to even, by search among neighbours in double.
uint16_t nearest_bf16(float x) {
  if (std::isinf(x)) return x > 0 ? 0x7f80 : 0xff80;
  const uint16_t low = static_cast<uint16_t>(bits_of(x) >> 16); // towards zero
  const uint16_t high = static_cast<uint16_t>(low + 1);
  const double below = from_bits(static_cast<uint32_t>(low) << 16);
  // Above the largest finite value the next one would be 2^128.
  const double above =
      (high & 0x7fff) == 0x7f80 ? std::copysign(0x1p128, x) : from_bits(static_cast<uint32_t>(high) << 16);
  const double to_low = std::fabs(x - below), to_high = std::fabs(above - x);
  if (to_low != to_high) return to_low < to_high ? low : high;
  return low % 2 == 0 ? low : high;
}

void check_rounding(float x) {
  const bf16 scalar = to_bf16(x);
  float in[kLanes];
  bf16 vector[kLanes];
  for (float& lane : in) lane = x;
  store(vector, load(in));
  if (std::isnan(x)) {
    CHECK(std::isnan(to_float(scalar)) && std::isnan(to_float(vector[0])), "NaN %08x", bits_of(x));
    return;
  }
  CHECK(scalar.bits == nearest_bf16(x), "%a: %04x, expected %04x", static_cast<double>(x), scalar.bits,
        nearest_bf16(x));
  uint16_t expected = scalar.bits;
#ifdef __AVX512BF16__
  if (std::fpclassify(x) == FP_SUBNORMAL) expected &= 0x8000;
#endif
  for (bf16 lane : vector) CHECK(lane.bits == expected, "%a: vector %04x", static_cast<double>(x), lane.bits);
}

void bf16_rounding() {
  for (uint32_t high = 0; high < 0x10000; ++high) {
    for (uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      check_rounding(from_bits(high << 16 | low));
    const bf16 value{static_cast<uint16_t>(high)};
    const bf16 back = to_bf16(to_float(value));
    if (std::isnan(to_float(value))) {
      CHECK(std::isnan(to_float(back)) && (back.bits & 0x8000) == (value.bits & 0x8000));
    } else {
      CHECK(back.bits == value.bits, "%04x came back as %04x", value.bits, back.bits);
    }
    bf16 lanes[kLanes];
    for (bf16& lane : lanes) lane = value;
    float wide[kLanes];
    store(wide, load(lanes));
    for (float lane : wide) CHECK(bits_of(lane) == high << 16);
  }
}

// ---- simd ----

float apply(vf (*function)(vf), float x) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = x;
  store(lanes, function(load(lanes)));
  for (float lane : lanes) CHECK(bits_of(lane) == bits_of(lanes[0]));
  return lanes[0];
}

vf exp_(vf v) { return exp(v); }
vf sigmoid_(vf v) { return sigmoid(v); }
vf silu_(vf v) { return silu(v); }
vf rsqrt_(vf v) { return rsqrt(v); }

double ulp(double x) { return x == 0 ? 0x1p-149 : std::ldexp(1.0, std::max(std::ilogb(x) - 23, -149)); }

// The largest error in ulp of `function` over [low, high], every `step`-th float.
double worst_error(vf (*function)(vf), double (*exact)(double), float low, float high, uint32_t step) {
  double worst = 0;
  float at = 0;
  auto visit = [&](float x) {
    const double expected = exact(x);
    const double error = std::fabs(static_cast<double>(apply(function, x)) - expected) / ulp(expected);
    if (!(error <= worst)) {
      worst = error;
      at = x;
    }
  };
  if (low < 0) {
    for (uint32_t bits = bits_of(-0.0f); bits <= bits_of(low); bits += step) visit(from_bits(bits));
  }
  for (uint32_t bits = bits_of(low < 0 ? 0.0f : low); bits <= bits_of(high); bits += step) visit(from_bits(bits));
  std::printf("%.2f ulp at %a\n", worst, static_cast<double>(at));
  return worst;
}

double exact_exp(double x) { return std::exp(x); }
double exact_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double exact_silu(double x) { return x / (1 + std::exp(-x)); }
double exact_rsqrt(double x) { return 1 / std::sqrt(x); }

void exp_accuracy() {
  CHECK(worst_error(exp_, exact_exp, -104, 88.72f, 1009) <= 1.5);
  CHECK(apply(exp_, 0.0f) == 1);
  CHECK(apply(exp_, -0.0f) == 1);
  CHECK(apply(exp_, -kInfinity) == 0);
  CHECK(apply(exp_, -1e30f) == 0);
  CHECK(apply(exp_, -104.0f) == 0);
  CHECK(apply(exp_, kInfinity) == kInfinity);
  CHECK(apply(exp_, 1e30f) == kInfinity);
  CHECK(apply(exp_, 88.73f) == kInfinity);
  CHECK(std::isfinite(apply(exp_, 88.72f)));
  CHECK(std::isnan(apply(exp_, kNaN)));
  CHECK(std::isnan(apply(exp_, -kNaN)));
}

void sigmoid_and_silu_accuracy() {
  CHECK(worst_error(sigmoid_, exact_sigmoid, -87, 1e30f, 1009) <= 4);
  CHECK(worst_error(silu_, exact_silu, -87, 1e30f, 1009) <= 4);
  CHECK(apply(sigmoid_, -kInfinity) == 0);
  CHECK(apply(sigmoid_, kInfinity) == 1);
  CHECK(std::fabs(apply(silu_, -200.0f)) == 0);
  CHECK(apply(silu_, 200.0f) == 200);
  CHECK(apply(silu_, kInfinity) == kInfinity);
  CHECK(std::isnan(apply(sigmoid_, kNaN)));
  CHECK(std::isnan(apply(silu_, kNaN)));
}

void rsqrt_accuracy() {
  CHECK(worst_error(rsqrt_, exact_rsqrt, 1e-37f, 1e38f, 1009) <= 1.5);
  for (float x : {1e-5f, 0.25f, 1.0f, 3.0f}) CHECK(apply(rsqrt_, x) == 1.0f / std::sqrt(x));
}

template <class T> void check_partial() {
  for (int n = 0; n <= kLanes; ++n) {
    Buffer<T> in(n), out(n);
    for (int i = 0; i < n; ++i) in.data[i] = cast<T>(static_cast<float>(i + 1));
    const vf v = load(in.data, n);
    for (int i = 0; i < kLanes; ++i) CHECK(v[i] == (i < n ? static_cast<float>(i + 1) : 0.0f));
    store(out.data, v, n);
    for (int i = 0; i < n; ++i) CHECK(raw(out.data[i]) == raw(in.data[i]));
  }
}

void partial_loads_and_stores() {
  check_partial<float>();
  check_partial<bf16>();
}

void lanes_and_comparisons() {
  float lanes[kLanes];
  for (int round = 0; round < 200; ++round) {
    double total = 0, magnitude = 0;
    float largest = -kInfinity;
    for (float& lane : lanes) {
      lane = random_normal();
      total += lane;
      magnitude += std::fabs(lane);
      largest = std::max(largest, lane);
    }
    CHECK(std::fabs(sum(load(lanes)) - total) <= magnitude * 5 * 0x1p-24);
    CHECK(max_of(load(lanes)) == largest);
  }
  CHECK(bits_of(broadcast(-0.0f)[0]) == bits_of(-0.0f));
  CHECK(broadcast_int(-7)[kLanes - 1] == -7);
  CHECK(max(broadcast(1), broadcast(2))[0] == 2 && min(broadcast(1), broadcast(2))[0] == 1);
  CHECK(max(broadcast(kNaN), broadcast(2))[0] == 2 && std::isnan(max(broadcast(2), broadcast(kNaN))[0]));
  CHECK(min(broadcast(kNaN), broadcast(2))[0] == 2 && std::isnan(min(broadcast(2), broadcast(kNaN))[0]));
  CHECK(fma(broadcast(3), broadcast(5), broadcast(7))[0] == 22);
}

void peak_is_positive() {
  CHECK(peak_gflops<float>(0.001) > 0);
  CHECK(peak_gflops<bf16>(0.001) > 0);
}

// ---- AMX, emulated ----

#ifdef TRMFAST_EMULATE_AMX

long config_loads() { return amx_emulated::state().config_loads; }

void run_rows(int rows) {
  const Operands<bf16> in(rows, 32, 0);
  std::vector<float> c(rows * 32);
  Dot<bf16>::run(in.a.data, in.lda, in.b.data, 32, rows, c.data(), 32, false);
}

void configures_only_when_rows_change() {
  const long start = config_loads();
  for (int rows : {32, 32, 32}) run_rows(rows);
  CHECK(config_loads() == start + 1);
  for (int rows : {7, 7, 32}) run_rows(rows);
  CHECK(config_loads() == start + 3);
  std::thread([] {
    run_rows(32);
    CHECK(config_loads() == 1, "a thread has tiles of its own");
    Dot<bf16>::release();
  }).join();
  Dot<bf16>::release();
  CHECK(!amx_emulated::state().configured);
  Dot<bf16>::release(); // harmless
  run_rows(32);
  CHECK(config_loads() == start + 4);
  Dot<bf16>::release();
}

// Products of 1 x 1 tiles of dwords whose results tell the order of the additions and the treatment of denormals.
float tile_product(float c, float a_even, float a_odd, float b_even, float b_odd) {
  amx_emulated::Config config = {};
  config.palette = 1;
  for (int t : {0, 1, 2}) {
    config.rows[t] = 1;
    config.column_bytes[t] = 4;
  }
  const bf16 a[2] = {to_bf16(a_even), to_bf16(a_odd)}, b[2] = {to_bf16(b_even), to_bf16(b_odd)};
  _tile_loadconfig(&config);
  _tile_loadd(0, &c, 4);
  _tile_loadd(1, a, 4);
  _tile_loadd(2, b, 4);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, &c, 4);
  _tile_release();
  return c;
}

void emulation_adds_in_order() {
  CHECK(tile_product(100, 2, 3, 5, 7) == 131);
  // 1 + 2^-24 is a tie and rounds to 1, so adding the two halves one after the other would lose both.
  CHECK(tile_product(1, 0x1p-12f, 0x1p-12f, 0x1p-12f, 0x1p-12f) == 1 + 0x1p-23f);
  CHECK(tile_product(0, 0x1p-70f, 0, 0x1p-70f, 0) == 0);  // the product is denormal
  CHECK(tile_product(1e-40f, 0, 0, 0, 0) == 0);           // so is what is added to
  CHECK(tile_product(0, 0x1p-130f, 0, 0x1p100f, 0) == 0); // and the operand
  CHECK(std::isnan(tile_product(0, kNaN, 0, 1, 0)));
  CHECK(tile_product(0, kInfinity, 0, 1, 0) == kInfinity);
}

amx_emulated::Config config_of(int rows, int column_bytes) {
  amx_emulated::Config config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(rows);
    config.column_bytes[t] = static_cast<uint16_t>(column_bytes);
  }
  return config;
}

// Each of these must abort.
void fault_unconfigured() { _tile_zero(0); }

void fault_released() {
  run_rows(3);
  Dot<bf16>::release();
  _tile_zero(0);
}

void fault_too_many_rows() {
  const auto config = config_of(17, 64);
  _tile_loadconfig(&config);
}

void fault_too_many_columns() {
  const auto config = config_of(16, 68);
  _tile_loadconfig(&config);
}

void fault_shapes_differ() {
  auto config = config_of(16, 64);
  config.rows[4] = 15;
  _tile_loadconfig(&config);
  _tile_dpbf16ps(0, 4, 6);
}

void fault_depths_differ() {
  auto config = config_of(16, 64);
  config.rows[6] = 8;
  _tile_loadconfig(&config);
  _tile_dpbf16ps(0, 4, 6);
}

void fault_same_tile_twice() {
  const auto config = config_of(16, 64);
  _tile_loadconfig(&config);
  _tile_dpbf16ps(0, 4, 4);
}

#endif

struct Test {
  const char* name;
  void (*run)();
};

const Test kTests[] = {
    {"product_float", product_float},
    {"product_bf16", product_bf16},
    {"rows_are_independent", rows_are_independent},
    {"bf16_rounding", bf16_rounding},
    {"exp_accuracy", exp_accuracy},
    {"sigmoid_and_silu_accuracy", sigmoid_and_silu_accuracy},
    {"rsqrt_accuracy", rsqrt_accuracy},
    {"partial_loads_and_stores", partial_loads_and_stores},
    {"lanes_and_comparisons", lanes_and_comparisons},
    {"peak_is_positive", peak_is_positive},
#ifdef TRMFAST_EMULATE_AMX
    {"configures_only_when_rows_change", configures_only_when_rows_change},
    {"emulation_adds_in_order", emulation_adds_in_order},
    {"fault_unconfigured", fault_unconfigured},
    {"fault_released", fault_released},
    {"fault_too_many_rows", fault_too_many_rows},
    {"fault_too_many_columns", fault_too_many_columns},
    {"fault_shapes_differ", fault_shapes_differ},
    {"fault_depths_differ", fault_depths_differ},
    {"fault_same_tile_twice", fault_same_tile_twice},
#endif
};

} // namespace

int main(int argc, char** argv) {
  for (const Test& test : kTests) {
    if (argc == 2 && std::strcmp(argv[1], test.name) == 0) {
      test.run();
      return 0;
    }
  }
  std::fprintf(stderr, "usage: %s TEST, one of:", argv[0]);
  for (const Test& test : kTests) std::fprintf(stderr, " %s", test.name);
  std::fprintf(stderr, "\n");
  return 2;
}
