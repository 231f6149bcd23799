// Tests of csrc/cpu/bf16.h and simd.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "../../csrc/cpu/swiglu.h"
#include "numbers.h"

namespace {

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

float apply(vf (*function)(vf), float x) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = x;
  store(lanes, function(load(lanes)));
  for (float lane : lanes) CHECK(bits_of(lane) == bits_of(lanes[0]));
  return lanes[0];
}

vf exp_(vf v) { return exp(v); }
vf exp2_for_bf16_(vf v) { return exp2_for_bf16(v); }
template <class T> vf sigmoid_(vf v) { return sigmoid<T>(v); }
template <class T> vf silu_(vf v) { return silu<T>(v); }
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
double exact_exp2(double x) { return std::exp2(x); }
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

// An error relative to the result in units of at least 2^-24.
constexpr double kRelative = 0x1p24;

void exp2_accuracy() {
  CHECK(worst_error(exp2_for_bf16_, exact_exp2, -149, 127.9f, 1009) <= 7.6e-5 * kRelative);
  CHECK(to_float(to_bf16(apply(exp2_for_bf16_, 0.0f))) == 1);
  CHECK(apply(exp2_for_bf16_, -151.0f) == 0);
  CHECK(apply(exp2_for_bf16_, -1e30f) == 0);
  CHECK(apply(exp2_for_bf16_, -kInfinity) == 0);
  CHECK(apply(exp2_for_bf16_, 128.5f) == kInfinity);
  CHECK(apply(exp2_for_bf16_, kInfinity) == kInfinity);
  CHECK(std::isnan(apply(exp2_for_bf16_, kNaN)));
}

template <class T> void sigmoid_and_silu_accuracy(double sigmoid_error, double silu_error) {
  CHECK(worst_error(sigmoid_<T>, exact_sigmoid, -87, 1e30f, 1009) <= sigmoid_error);
  CHECK(worst_error(silu_<T>, exact_silu, -87, 1e30f, 1009) <= silu_error);
  CHECK(apply(sigmoid_<T>, -kInfinity) == 0);
  CHECK(apply(sigmoid_<T>, kInfinity) == 1);
  CHECK(apply(sigmoid_<T>, 1000.0f) == 1);
  CHECK(std::fabs(apply(silu_<T>, -200.0f)) == 0);
  CHECK(std::fabs(apply(silu_<T>, 200.0f) - 200) <= 200 * (sizeof(T) == 2 ? 0x1p-14f : 0.0f));
  CHECK(apply(silu_<T>, kInfinity) == kInfinity);
  CHECK(std::isnan(apply(sigmoid_<T>, kNaN)));
  CHECK(std::isnan(apply(silu_<T>, kNaN)));
}

void sigmoid_and_silu_accuracy() {
  sigmoid_and_silu_accuracy<float>(4, 4);
  // exp2_for_bf16 of v log2(e), |v| up to 87: the rounding of that product, half a unit of 2^-17, and that of log2(e).
  constexpr double kExponential = 7.5e-5 + (0x1p-18 + 126 * 0x1p-26) * 0.7;
  sigmoid_and_silu_accuracy<bf16>(kExponential * kRelative, (kExponential + 0x1p-14) * kRelative);
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
  CHECK(max(broadcast(1), broadcast(2))[0] == 2 && min(broadcast(1), broadcast(2))[0] == 1);
  CHECK(max(broadcast(kNaN), broadcast(2))[0] == 2 && std::isnan(max(broadcast(2), broadcast(kNaN))[0]));
  CHECK(min(broadcast(kNaN), broadcast(2))[0] == 2 && std::isnan(min(broadcast(2), broadcast(kNaN))[0]));
  CHECK(fma(broadcast(3), broadcast(5), broadcast(7))[0] == 22);
}

} // namespace
