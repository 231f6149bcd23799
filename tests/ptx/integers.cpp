// Integer arithmetic, bits and comparisons.
#include "warp.h"

#include <algorithm>
#include <bitset>
#include <functional>

namespace trmfast {
namespace ptx {
namespace {

template <class T> constexpr int kWidth = 8 * sizeof(T);

template <class T> T shift_left(T a, uint32_t b) {
  return b >= kWidth<T> ? T(0) : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << b);
}

template <class T> T shift_right(T a, uint32_t b) { // arithmetic for signed types
  return static_cast<T>(a >> std::min<uint32_t>(b, kWidth<T> - 1)) &
         (std::is_signed<T>::value || b < kWidth<T> ? T(-1) : T(0));
}

template <class T> T bit_field(T a, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  T out = 0;
  const uint32_t last = std::min<uint32_t>(position + length - 1, kWidth<T> - 1);
  const bool sign = std::is_signed<T>::value && length != 0 && (a >> last & 1);
  for (uint32_t i = 0; i < kWidth<T>; ++i) {
    const bool inside = i < length && position + i < kWidth<T>;
    const uint32_t bit = inside ? static_cast<uint32_t>(static_cast<uint32_t>(a) >> (position + i) & 1) : sign;
    out = static_cast<T>(static_cast<uint32_t>(out) | bit << i);
  }
  return out;
}

uint32_t insert_field(uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  for (uint32_t i = 0; i < length && position + i < 32; ++i)
    b = (b & ~(1u << (position + i))) | (a >> i & 1) << (position + i);
  return b;
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> 4 * i & 0xf;
    uint32_t byte = bytes >> 8 * (s & 7) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0; // replicates the sign
    out |= byte << 8 * i;
  }
  return out;
}

#define BINARY(T, ...)                                                                                                 \
  [](Warp& w, const Op& op, Mask m) { map<T, T, T>(w, op, m, [](T a, T b) { return static_cast<T>(__VA_ARGS__); }); }
#define UNARY(T, ...)                                                                                                  \
  [](Warp& w, const Op& op, Mask m) { map<T, T>(w, op, m, [](T a) { return static_cast<T>(__VA_ARGS__); }); }
#define TERNARY(T, ...)                                                                                                \
  [](Warp& w, const Op& op, Mask m) {                                                                                  \
    map<T, T, T, T>(w, op, m, [](T a, T b, T c) { return static_cast<T>(__VA_ARGS__); });                              \
  }
#define SHIFT(T, ...)                                                                                                  \
  [](Warp& w, const Op& op, Mask m) {                                                                                  \
    map<T, T, uint32_t>(w, op, m, [](T a, uint32_t b) { return static_cast<T>(__VA_ARGS__); });                        \
  }
#define PREDICATES(...)                                                                                                \
  [](Warp& w, const Op& op, Mask m) {                                                                                  \
    const Mask a = w.predicates[op.src[0]], b = w.predicates[op.src[op.num_src - 1]];                                  \
    (void)b;                                                                                                           \
    set_predicate(w, op.dst[0], m, __VA_ARGS__);                                                                       \
  }

template <class T> void check_divisor(Warp& w, const Op& op, Mask m) {
  for (int i = 0; i < kLanes; ++i)
    if ((m >> i & 1) && w.reg<T>(op.src[1])[i] == 0) throw Fault("lane " + std::to_string(i) + " divides by zero");
}

// The smallest number divided by -1 stays what it is.
template <class T> bool is_minus_one(T b) { return std::is_signed<T>::value && b == static_cast<T>(-1); }

template <class T> void divide(Warp& w, const Op& op, Mask m) {
  check_divisor<T>(w, op, m);
  map<T, T, T>(w, op, m, [](T a, T b) {
    return is_minus_one(b) ? static_cast<T>(0u - static_cast<std::make_unsigned_t<T>>(a))
                           : static_cast<T>(a / (b ? b : 1));
  });
}

template <class T> void remainder(Warp& w, const Op& op, Mask m) {
  check_divisor<T>(w, op, m);
  map<T, T, T>(w, op, m, [](T a, T b) { return is_minus_one(b) ? T(0) : static_cast<T>(a % (b ? b : 1)); });
}

template <class T, class F> void compare(Table& t, const std::string& name, const char* type, const char* operands) {
  t["setp." + name + "." + type].push_back(
      {operands, [](Warp& w, const Op& op, Mask m) { set_predicate(w, op.dst[0], m, test<T>(w, op, F())); }});
}

template <class T> void comparisons(Table& t, const char* type, const char* operands) {
  compare<T, std::equal_to<T>>(t, "eq", type, operands);
  compare<T, std::not_equal_to<T>>(t, "ne", type, operands);
  if (type[0] == 'b') return;
  compare<T, std::less<T>>(t, "lt", type, operands);
  compare<T, std::less_equal<T>>(t, "le", type, operands);
  compare<T, std::greater<T>>(t, "gt", type, operands);
  compare<T, std::greater_equal<T>>(t, "ge", type, operands);
}

using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

} // namespace

void add_integers(Table& t) {
  for (const char* type : {"s32", "u32"}) {
    const std::string s = std::string(".") + type;
    t["add" + s] = {{"r=rr", BINARY(u32, a + b)}};
    t["sub" + s] = {{"r=rr", BINARY(u32, a - b)}};
    t["mul.lo" + s] = {{"r=rr", BINARY(u32, a * b)}};
    t["mad.lo" + s] = {{"r=rrr", TERNARY(u32, a * b + c)}};
  }
  for (const char* type : {"s64", "u64"}) {
    const std::string s = std::string(".") + type;
    t["add" + s] = {{"d=dd", BINARY(u64, a + b)}};
    t["sub" + s] = {{"d=dd", BINARY(u64, a - b)}};
    t["mul.lo" + s] = {{"d=dd", BINARY(u64, a * b)}};
    t["mad.lo" + s] = {{"d=ddd", TERNARY(u64, a * b + c)}};
  }
  t["add.s16"] = {{"h=hh", BINARY(u16, a + b)}};
  t["sub.s16"] = {{"h=hh", BINARY(u16, a - b)}};
  t["mul.lo.s16"] = {{"h=hh", BINARY(u16, u32(a) * b)}};
  t["mad.lo.s16"] = {{"h=hhh", TERNARY(u16, u32(a) * b + c)}};
  t["mul.hi.u16"] = {{"h=hh", BINARY(u16, u32(a) * b >> 16)}};
  t["mul.wide.u16"] = {{"r=hh", [](Warp& w, const Op& op, Mask m) {
                          map<u32, u16, u16>(w, op, m, [](u16 a, u16 b) { return u32(a) * b; });
                        }}};
  t["mul.wide.s16"] = {{"r=hh", [](Warp& w, const Op& op, Mask m) {
                          map<i32, i16, i16>(w, op, m, [](i16 a, i16 b) { return i32(a) * b; });
                        }}};
  t["mad.wide.u16"] = {{"r=hhr", [](Warp& w, const Op& op, Mask m) {
                          map<u32, u16, u16, u32>(w, op, m, [](u16 a, u16 b, u32 c) { return u32(a) * b + c; });
                        }}};
  t["mul.hi.s32"] = {{"r=rr", BINARY(i32, static_cast<i64>(a) * b >> 32)}};
  t["mul.hi.u32"] = {{"r=rr", BINARY(u32, static_cast<u64>(a) * b >> 32)}};
  t["mul.wide.s32"] = {{"d=rr", [](Warp& w, const Op& op, Mask m) {
                          map<i64, i32, i32>(w, op, m, [](i32 a, i32 b) { return static_cast<i64>(a) * b; });
                        }}};
  t["mul.wide.u32"] = {{"d=rr", [](Warp& w, const Op& op, Mask m) {
                          map<u64, u32, u32>(w, op, m, [](u32 a, u32 b) { return static_cast<u64>(a) * b; });
                        }}};
  t["mad.wide.s32"] = {{"d=rrd", [](Warp& w, const Op& op, Mask m) {
                          map<u64, i32, i32, u64>(w, op, m, [](i32 a, i32 b, u64 c) {
                            return static_cast<u64>(static_cast<i64>(a) * b) + c;
                          });
                        }}};
  t["mad.wide.u32"] = {{"d=rrd", [](Warp& w, const Op& op, Mask m) {
                          map<u64, u32, u32, u64>(w, op, m,
                                                  [](u32 a, u32 b, u64 c) { return static_cast<u64>(a) * b + c; });
                        }}};
  t["div.s32"] = {{"r=rr", divide<i32>}};
  t["div.u32"] = {{"r=rr", divide<u32>}};
  t["div.s64"] = {{"d=dd", divide<i64>}};
  t["rem.s32"] = {{"r=rr", remainder<i32>}};
  t["rem.u32"] = {{"r=rr", remainder<u32>}};
  t["min.s32"] = {{"r=rr", BINARY(i32, a < b ? a : b)}};
  t["min.u32"] = {{"r=rr", BINARY(u32, a < b ? a : b)}};
  t["max.s32"] = {{"r=rr", BINARY(i32, a > b ? a : b)}};
  t["max.u32"] = {{"r=rr", BINARY(u32, a > b ? a : b)}};
  t["neg.s32"] = {{"r=r", UNARY(u32, 0u - a)}};
  t["neg.s64"] = {{"d=d", UNARY(u64, 0ull - a)}};
  t["abs.s32"] = {{"r=r", UNARY(u32, a >> 31 ? 0u - a : a)}};

  t["and.b16"] = {{"h=hh", BINARY(u16, a & b)}};
  t["or.b16"] = {{"h=hh", BINARY(u16, a | b)}};
  t["xor.b16"] = {{"h=hh", BINARY(u16, a ^ b)}};
  t["and.b32"] = {{"r=rr", BINARY(u32, a & b)}};
  t["or.b32"] = {{"r=rr", BINARY(u32, a | b)}};
  t["xor.b32"] = {{"r=rr", BINARY(u32, a ^ b)}};
  t["and.b64"] = {{"d=dd", BINARY(u64, a & b)}};
  t["or.b64"] = {{"d=dd", BINARY(u64, a | b)}};
  t["xor.b64"] = {{"d=dd", BINARY(u64, a ^ b)}};
  t["not.b32"] = {{"r=r", UNARY(u32, ~a)}};
  t["popc.b32"] = {{"r=r", UNARY(u32, std::bitset<32>(a).count())}};
  t["not.b64"] = {{"d=d", UNARY(u64, ~a)}};
  t["and.pred"] = {{"p=pp", PREDICATES(a & b)}};
  t["or.pred"] = {{"p=pp", PREDICATES(a | b)}};
  t["xor.pred"] = {{"p=pp", PREDICATES(a ^ b)}};
  t["not.pred"] = {{"p=p", PREDICATES(~a)}};

  t["shl.b16"] = {{"h=hr", SHIFT(u16, shift_left(a, b))}};
  t["shl.b32"] = {{"r=rr", SHIFT(u32, shift_left(a, b))}};
  t["shl.b64"] = {{"d=dr", SHIFT(u64, shift_left(a, b))}};
  t["shr.u16"] = t["shr.b16"] = {{"h=hr", SHIFT(u16, shift_right(a, b))}};
  t["shr.u32"] = t["shr.b32"] = {{"r=rr", SHIFT(u32, shift_right(a, b))}};
  t["shr.u64"] = t["shr.b64"] = {{"d=dr", SHIFT(u64, shift_right(a, b))}};
  t["shr.s16"] = {{"h=hr", SHIFT(i16, shift_right(a, b))}};
  t["shr.s32"] = {{"r=rr", SHIFT(i32, shift_right(a, b))}};
  t["shr.s64"] = {{"d=dr", SHIFT(i64, shift_right(a, b))}};
  t["bfe.s32"] = {{"r=rrr", TERNARY(i32, bit_field(a, static_cast<u32>(b), static_cast<u32>(c)))}};
  t["bfe.u32"] = {{"r=rrr", TERNARY(u32, bit_field(a, b, c))}};
  t["bfi.b32"] = {
      {"r=rrrr", [](Warp& w, const Op& op, Mask m) { map<u32, u32, u32, u32, u32>(w, op, m, insert_field); }}};
  t["shf.l.wrap.b32"] = {{"r=rrr", TERNARY(u32, (u64(b) << 32 | a) << (c & 31) >> 32)}};
  t["prmt.b32"] = {{"r=rrr", TERNARY(u32, permute(a, b, c))}};

  comparisons<i16>(t, "s16", "p=hh");
  comparisons<u16>(t, "u16", "p=hh");
  comparisons<u16>(t, "b16", "p=hh");
  comparisons<i32>(t, "s32", "p=rr");
  comparisons<u32>(t, "u32", "p=rr");
  comparisons<u32>(t, "b32", "p=rr");
  comparisons<i64>(t, "s64", "p=dd");
  comparisons<u64>(t, "u64", "p=dd");
  comparisons<u64>(t, "b64", "p=dd");
}

} // namespace ptx
} // namespace trmfast
