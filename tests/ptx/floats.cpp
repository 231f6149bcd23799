// Floating point.  Approximate instructions give the nearest float32, which is within the bounds of every GPU.
#include "warp.h"

#include <cmath>
#include <functional>
#include <limits>

namespace trmfast {
namespace ptx {
namespace {

// Denormals become zero of the same sign.
float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// Of two numbers of which one is NaN the other; -0 is less than 0.
float least(float a, float b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}

float largest(float a, float b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

// a * b + c of numbers of 16 bits, rounded to odd, so that rounding to 16 bits is the only rounding that counts.
float fma_to_odd(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, addend = c;
  double sum = product + addend;
  const double rest = sum - product, error = (product - (sum - rest)) + (addend - rest);
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  if (error != 0 && std::isfinite(sum) && !(bits & 1)) sum = std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
  // float32 has more than two bits more than bf16 and half; rounded to odd it keeps what these need.
  float narrow = static_cast<float>(sum);
  const double lost = sum - narrow;
  uint32_t low;
  std::memcpy(&low, &narrow, sizeof low);
  if (lost != 0 && std::isfinite(narrow) && !(low & 1))
    narrow = std::nextafter(narrow, lost > 0 ? std::numeric_limits<float>::infinity()
                                             : -std::numeric_limits<float>::infinity());
  return narrow;
}

uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
  return float_to_bf16(fma_to_odd(bf16_to_float(a), bf16_to_float(b), bf16_to_float(c)));
}

uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c) {
  return float_to_f16(fma_to_odd(f16_to_float(a), f16_to_float(b), f16_to_float(c)));
}

// The product of two halves is exact in float32.
uint16_t mul_f16(uint16_t a, uint16_t b) { return float_to_f16(f16_to_float(a) * f16_to_float(b)); }

// Both halves of a register.
template <uint16_t (*kFunction)(uint16_t, uint16_t)> uint32_t both(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t x, int i) { return static_cast<uint16_t>(x >> 16 * i); };
  return static_cast<uint32_t>(kFunction(half(a, 1), half(b, 1))) << 16 | kFunction(half(a, 0), half(b, 0));
}

template <uint16_t (*kFunction)(uint16_t, uint16_t, uint16_t)> uint32_t both(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [](uint32_t x, int i) { return static_cast<uint16_t>(x >> 16 * i); };
  return static_cast<uint32_t>(kFunction(half(a, 1), half(b, 1), half(c, 1))) << 16 |
         kFunction(half(a, 0), half(b, 0), half(c, 0));
}

// float32 has twice as many bits as a half and two more: rounding a sum twice is rounding it once.
uint16_t add_f16(uint16_t a, uint16_t b) { return float_to_f16(f16_to_float(a) + f16_to_float(b)); }

#define UNARY(...)                                                                                                     \
  [](Warp& w, const Op& op, Mask m) {                                                                                  \
    map<float, float>(w, op, m, [](float a) { return static_cast<float>(__VA_ARGS__); });                              \
  }
#define BINARY(...)                                                                                                    \
  [](Warp& w, const Op& op, Mask m) {                                                                                  \
    map<float, float, float>(w, op, m, [](float a, float b) { return __VA_ARGS__; });                                  \
  }

struct LessOrUnordered {
  bool operator()(float a, float b) const { return !(a >= b); }
};

template <class F> Form comparison(F) {
  return {"p=rr", [](Warp& w, const Op& op, Mask m) { set_predicate(w, op.dst[0], m, test<float>(w, op, F())); }};
}

} // namespace

void add_floats(Table& t) {
  for (const char* rounding : {"", ".rn"}) {
    const std::string s = std::string(rounding) + ".f32";
    t["add" + s] = {{"r=rr", BINARY(a + b)}};
    t["sub" + s] = {{"r=rr", BINARY(a - b)}};
    t["mul" + s] = {{"r=rr", BINARY(a * b)}};
  }
  t["fma.rn.f32"] = {{"r=rrr", [](Warp& w, const Op& op, Mask m) {
                        map<float, float, float, float>(w, op, m,
                                                        [](float a, float b, float c) { return std::fma(a, b, c); });
                      }}};
  t["fma.rn.ftz.f32"] = {{"r=rrr", [](Warp& w, const Op& op, Mask m) {
                            map<float, float, float, float>(w, op, m, [](float a, float b, float c) {
                              return flush(std::fma(flush(a), flush(b), flush(c)));
                            });
                          }}};
  t["mul.f16"] = {
      {"h=hh", [](Warp& w, const Op& op, Mask m) { map<uint16_t, uint16_t, uint16_t>(w, op, m, mul_f16); }}};
  t["add.f16x2"] = {
      {"r=rr", [](Warp& w, const Op& op, Mask m) { map<uint32_t, uint32_t, uint32_t>(w, op, m, both<add_f16>); }}};
  t["mul.f16x2"] = {
      {"r=rr", [](Warp& w, const Op& op, Mask m) { map<uint32_t, uint32_t, uint32_t>(w, op, m, both<mul_f16>); }}};
  t["fma.rn.bf16"] = {{"h=hhh", [](Warp& w, const Op& op, Mask m) {
                         map<uint16_t, uint16_t, uint16_t, uint16_t>(w, op, m, fma_bf16);
                       }}};
  t["fma.rn.bf16x2"] = {{"r=rrr", [](Warp& w, const Op& op, Mask m) {
                           map<uint32_t, uint32_t, uint32_t, uint32_t>(w, op, m, both<fma_bf16>);
                         }}};
  t["fma.rn.f16x2"] = {{"r=rrr", [](Warp& w, const Op& op, Mask m) {
                          map<uint32_t, uint32_t, uint32_t, uint32_t>(w, op, m, both<fma_f16>);
                        }}};
  t["add.f64"] = {
      {"d=dd", [](Warp& w, const Op& op, Mask m) { map<double, double, double>(w, op, m, std::plus<double>()); }}};
  t["sub.f64"] = {
      {"d=dd", [](Warp& w, const Op& op, Mask m) { map<double, double, double>(w, op, m, std::minus<double>()); }}};
  t["div.full.f32"] = t["div.rn.f32"] = {{"r=rr", BINARY(a / b)}};
  t["neg.f32"] = {{"r=r", UNARY(-a)}};
  t["abs.f32"] = {{"r=r", UNARY(std::fabs(a))}};
  t["abs.ftz.f32"] = {{"r=r", UNARY(flush(std::fabs(a)))}};
  t["min.f32"] = {{"r=rr", BINARY(least(a, b))}};
  t["max.f32"] = {{"r=rr", BINARY(largest(a, b))}};

  t["ex2.approx.f32"] = {{"r=r", UNARY(std::exp2(static_cast<double>(a)))}};
  t["ex2.approx.ftz.f32"] = {{"r=r", UNARY(flush(static_cast<float>(std::exp2(static_cast<double>(flush(a))))))}};
  t["rcp.approx.ftz.f32"] = {{"r=r", UNARY(flush(1.0f / flush(a)))}};
  t["rsqrt.approx.f32"] = {{"r=r", UNARY(1.0 / std::sqrt(static_cast<double>(a)))}};
  t["rsqrt.approx.ftz.f32"] = {
      {"r=r", UNARY(flush(static_cast<float>(1.0 / std::sqrt(static_cast<double>(flush(a))))))}};
  t["tanh.approx.f32"] = {{"r=r", UNARY(std::tanh(static_cast<double>(a)))}};

  t["setp.eq.f32"] = {comparison(std::equal_to<float>())};
  t["setp.lt.f32"] = {comparison(std::less<float>())};
  t["setp.le.f32"] = {comparison(std::less_equal<float>())};
  t["setp.gt.f32"] = {comparison(std::greater<float>())};
  t["setp.ge.f32"] = {comparison(std::greater_equal<float>())};
  t["setp.ltu.f32"] = {comparison(LessOrUnordered())};
  t["setp.neu.f32"] = {comparison(std::not_equal_to<float>())}; // true if one is NaN
}

} // namespace ptx
} // namespace trmfast
