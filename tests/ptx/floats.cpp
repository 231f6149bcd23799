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

// a * b + c with one rounding to bf16: the sum in float64 is rounded to odd, so that the second rounding is right.
uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
  const double product = static_cast<double>(bf16_to_float(a)) * bf16_to_float(b), addend = bf16_to_float(c);
  double sum = product + addend;
  const double rest = sum - product, error = (product - (sum - rest)) + (addend - rest);
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  if (error != 0 && std::isfinite(sum) && !(bits & 1)) sum = std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
  // float32 has more than twice as many bits as bf16 and two more; rounded to odd it keeps what bf16 needs.
  float narrow = static_cast<float>(sum);
  const double lost = sum - narrow;
  uint32_t low;
  std::memcpy(&low, &narrow, sizeof low);
  if (lost != 0 && std::isfinite(narrow) && !(low & 1))
    narrow = std::nextafter(narrow, lost > 0 ? std::numeric_limits<float>::infinity()
                                             : -std::numeric_limits<float>::infinity());
  return float_to_bf16(narrow);
}

// float32 has twice as many bits as a half and two more: rounding a sum twice is rounding it once.
uint32_t add_f16x2(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t x, int i) { return f16_to_float(static_cast<uint16_t>(x >> 16 * i)); };
  return static_cast<uint32_t>(float_to_f16(half(a, 1) + half(b, 1))) << 16 | float_to_f16(half(a, 0) + half(b, 0));
}

uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [](uint32_t x, int i) { return static_cast<uint16_t>(x >> 16 * i); };
  return static_cast<uint32_t>(fma_bf16(half(a, 1), half(b, 1), half(c, 1))) << 16 |
         fma_bf16(half(a, 0), half(b, 0), half(c, 0));
}

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
  t["add.f16x2"] = {
      {"r=rr", [](Warp& w, const Op& op, Mask m) { map<uint32_t, uint32_t, uint32_t>(w, op, m, add_f16x2); }}};
  t["fma.rn.bf16"] = {{"h=hhh", [](Warp& w, const Op& op, Mask m) {
                         map<uint16_t, uint16_t, uint16_t, uint16_t>(w, op, m, fma_bf16);
                       }}};
  t["fma.rn.bf16x2"] = {{"r=rrr", [](Warp& w, const Op& op, Mask m) {
                           map<uint32_t, uint32_t, uint32_t, uint32_t>(w, op, m, fma_bf16x2);
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
