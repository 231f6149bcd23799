// Moves, selection and conversions.
#include "warp.h"

#include <cmath>

namespace trmfast {
namespace ptx {

uint16_t float_to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float f16_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits<float>(sign | 0x7f800000u | magnitude << 13);
  // Exponents of the two formats differ by 112; the product is exact, also for denormals.
  return from_bits<float>(sign | to_bits(from_bits<float>(magnitude << 13) * 0x1p112f));
}

uint16_t float_to_f16(float x) {
  const uint32_t bits = to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) // a multiple of the smallest denormal, rounded by the addition
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f)));
  const uint32_t rebased = (bits & 0x7fffffffu) - (112u << 23);
  return static_cast<uint16_t>(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13);
}

namespace {

template <class T> void move(Warp& w, const Op& op, Mask m) {
  map<T, T>(w, op, m, [](T a) { return a; });
}

template <class T> void select(Warp& w, const Op& op, Mask m) {
  Bits<T>* out = w.reg<T>(op.dst[0]);
  const Bits<T>*a = w.reg<T>(op.src[0]), *b = w.reg<T>(op.src[1]);
  const Mask p = w.predicates[op.src[2]];
  for (int i = 0; i < kLanes; ++i)
    if (m >> i & 1) out[i] = p >> i & 1 ? a[i] : b[i];
}

void pack(Warp& w, const Op& op, Mask m) { // the first operand is the low half
  map<uint32_t, uint16_t, uint16_t>(
      w, op, m, [](uint16_t low, uint16_t high) { return static_cast<uint32_t>(high) << 16 | low; });
}

void unpack(Warp& w, const Op& op, Mask m) {
  uint32_t *low = w.reg<uint32_t>(op.dst[0]), *high = w.reg<uint32_t>(op.dst[1]);
  const uint32_t* in = w.reg<uint32_t>(op.src[0]);
  for (int i = 0; i < kLanes; ++i) {
    if (!(m >> i & 1)) continue;
    const uint32_t bits = in[i];
    low[i] = bits & 0xffff;
    high[i] = bits >> 16;
  }
}

void pack_wide(Warp& w, const Op& op, Mask m) {
  map<uint64_t, uint32_t, uint32_t>(
      w, op, m, [](uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; });
}

void unpack_wide(Warp& w, const Op& op, Mask m) {
  uint32_t *low = w.reg<uint32_t>(op.dst[0]), *high = w.reg<uint32_t>(op.dst[1]);
  const uint64_t* in = w.reg<uint64_t>(op.src[0]);
  for (int i = 0; i < kLanes; ++i) {
    if (!(m >> i & 1)) continue;
    low[i] = static_cast<uint32_t>(in[i]);
    high[i] = static_cast<uint32_t>(in[i] >> 32);
  }
}

#define CONVERT(TO, FROM, ...)                                                                                         \
  [](Warp& w, const Op& op, Mask m) {                                                                                  \
    map<TO, FROM>(w, op, m, [](FROM a) -> TO { return static_cast<TO>(__VA_ARGS__); });                                \
  }
#define CONVERT_PAIR(...)                                                                                              \
  [](Warp& w, const Op& op, Mask m) { /* the first operand is the high half */                                         \
                                      map<uint32_t, float, float>(w, op, m, [](float high, float low) {                \
                                        return static_cast<uint32_t>(__VA_ARGS__(high)) << 16 | __VA_ARGS__(low);      \
                                      });                                                                              \
  }

} // namespace

void add_moves(Table& t) {
  for (const char* type : {"b16", "u16", "s16"}) t[std::string("mov.") + type] = {{"h=h", move<uint16_t>}};
  for (const char* type : {"b32", "u32", "s32", "f32"}) t[std::string("mov.") + type] = {{"r=r", move<uint32_t>}};
  for (const char* type : {"b64", "u64", "s64"}) t[std::string("mov.") + type] = {{"d=d", move<uint64_t>}};
  t["mov.b32"].push_back({"r=hh", pack});
  t["mov.b32"].push_back({"hh=r", unpack});
  t["mov.b64"].push_back({"d=rr", pack_wide});
  t["mov.b64"].push_back({"rr=d", unpack_wide});
  t["mov.pred"] = {
      {"p=p", [](Warp& w, const Op& op, Mask m) { set_predicate(w, op.dst[0], m, w.predicates[op.src[0]]); }}};
  for (const char* type : {"b16", "u16", "s16"}) t[std::string("selp.") + type] = {{"h=hhp", select<uint16_t>}};
  for (const char* type : {"b32", "u32", "s32", "f32"}) t[std::string("selp.") + type] = {{"r=rrp", select<uint32_t>}};
  for (const char* type : {"b64", "u64", "s64", "f64"}) t[std::string("selp.") + type] = {{"d=ddp", select<uint64_t>}};

  t["cvt.u16.u32"] = {{"h=r", CONVERT(uint16_t, uint32_t, a)}};
  t["cvt.u32.u16"] = {{"r=h", CONVERT(uint32_t, uint16_t, a)}};
  t["cvt.s16.s8"] = {{"h=h", CONVERT(int16_t, uint16_t, static_cast<int8_t>(a & 0xff))}};
  t["cvt.s32.s8"] = {{"r=r", CONVERT(int32_t, uint32_t, static_cast<int8_t>(a & 0xff))}};
  t["cvt.s32.s16"] = {{"r=h", CONVERT(int32_t, int16_t, a)}};
  t["cvt.u32.u64"] = {{"r=d", CONVERT(uint32_t, uint64_t, a)}};
  t["cvt.u64.u16"] = {{"d=h", CONVERT(uint64_t, uint16_t, a)}};
  t["cvt.u64.u32"] = {{"d=r", CONVERT(uint64_t, uint32_t, a)}};
  t["cvt.s64.s32"] = {{"d=r", CONVERT(int64_t, int32_t, a)}};
  t["cvt.rn.f32.s32"] = {{"r=r", CONVERT(float, int32_t, a)}};
  t["cvt.rn.f32.u32"] = {{"r=r", CONVERT(float, uint32_t, a)}};
  t["cvt.f64.f32"] = {{"d=r", CONVERT(double, float, a)}};
  t["cvt.rn.f32.f64"] = {{"r=d", CONVERT(float, double, a)}};
  t["cvt.f32.bf16"] = {{"r=h", CONVERT(float, uint16_t, bf16_to_float(a))}};
  t["cvt.f32.f16"] = {{"r=h", CONVERT(float, uint16_t, f16_to_float(a))}};
  t["cvt.rn.bf16.f32"] = {{"h=r", CONVERT(uint16_t, float, float_to_bf16(a))}};
  t["cvt.rn.f16.f32"] = {{"h=r", CONVERT(uint16_t, float, float_to_f16(a))}};
  t["cvt.rn.bf16x2.f32"] = {{"r=rr", CONVERT_PAIR(float_to_bf16)}};
  t["cvt.rn.f16x2.f32"] = {{"r=rr", CONVERT_PAIR(float_to_f16)}};
}

} // namespace ptx
} // namespace trmfast
