// bfloat16: the upper 16 bits of a float. Scalar conversions; the vector ones are in simd.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace trmfast {

struct bf16 {
  uint16_t bits;
};

static inline float to_float(bf16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

static inline float to_float(float value) { return value; }

// Round to nearest, ties to even. Overflow rounds to infinity; a NaN stays a (quiet) NaN with its sign and upper
// payload.
static inline bf16 to_bf16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  if ((wide & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((wide >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16)};
}

} // namespace trmfast
