// Operands of int8 products, q = x / scale rounded to -127..127, symmetric, with one scale for what a sum runs over: a
// token's channels, or for mlp_t a channel's tokens.  trmfast/int8.py defines the same numbers bit for bit.
//
//   inverse = 127 / max|x|, cut to 16 bits of mantissa;   q = round to even(x * inverse);   scale = 1 / inverse
//
// x has 8 bits of mantissa, so x * inverse is exact, and adding a large power of two rounds it alike with and without
// fused multiply-adds.  Below 2^-100 everything is 0; a NaN or an infinity makes the scale NaN.
#pragma once

#include "dot_int8.h"
#include "pack.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

constexpr float kLeastScaled = 0x1p-100f, kMostScaled = 0x1.fffffep127f;
constexpr float kRounding = 0x1.8p23f; // added to v, |v| < 2^22: the low bits are v, rounded to even
constexpr int32_t kRoundingBits = 0x4b400000;
constexpr uint32_t kAbsolute = 0x7fffffffu, kSixteenBits = 0xffffff00u;

struct RowScale {
  float inverse, scale;
};

TRMFAST_INLINE RowScale row_scale(float most) {
  if (!(most >= kLeastScaled && most <= kMostScaled)) return {0.0f, most - most};
  float inverse = 127.0f / most;
  uint32_t bits;
  __builtin_memcpy(&bits, &inverse, sizeof bits);
  bits &= kSixteenBits;
  __builtin_memcpy(&inverse, &bits, sizeof bits);
  return {inverse, 1.0f / inverse};
}

// The largest lane.
TRMFAST_INLINE int32_t largest_lane(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

TRMFAST_INLINE vi larger_lanes(vi a, vi b) { return a > b ? a : b; }

// The low byte of every lane.
TRMFAST_INLINE void store_bytes(uint8_t* to, vi v) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(kAll, (__m512i)v);
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes bytes = __builtin_convertvector((vu)v, Bytes);
#endif
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

// q + 128 of one row; returns the scale.  Bits of absolute values compare as integers, a NaN above all.
TRMFAST_INLINE float quantize_row(const bf16* x, int columns, uint8_t* q) {
  typedef int16_t Halves __attribute__((vector_size(4 * kLanes)));
  Halves largest = {};
  int j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
    Halves bits;
    __builtin_memcpy(&bits, x + j, sizeof bits);
    bits &= 0x7fff;
    largest = bits > largest ? bits : largest;
  }
  int32_t most = largest_lane(larger_lanes((vi)((vu)largest << 16), (vi)largest & (int32_t)0xffff0000));
  for (; j < columns; ++j) {
    const int32_t bits = (x[j].bits & 0x7fff) << 16;
    most = bits > most ? bits : most;
  }
  float absolute;
  __builtin_memcpy(&absolute, &most, sizeof absolute);
  const RowScale found = row_scale(absolute);
  const vf inverse = broadcast(found.inverse), rounding = broadcast(kRounding + 128.0f);
  for (j = 0; j + kLanes <= columns; j += kLanes) store_bytes(q + j, (vi)fma(load(x + j), inverse, rounding));
  if (j < columns) {
    uint8_t rest[kLanes];
    store_bytes(rest, (vi)fma(load(x + j, columns - j), inverse, rounding));
    __builtin_memcpy(q + j, rest, static_cast<size_t>(columns - j));
  }
  return found.scale;
}

// A panel from `depth` rows of up to 32 columns, with a scale for each column and the start of its sums.
TRMFAST_INLINE void quantize_panel(const bf16* x, long stride, int depth, int columns, int8_t* panel, float* scales,
                                   int32_t* starts) {
  for (int j = 0; j < kPanel; j += kLanes) {
    const int n = larger(0, smaller(kLanes, columns - j));
    vi bits = {};
    for (int k = 0; k < depth; ++k) bits = larger_lanes((vi)((vu)load_lanes(x + k * stride + j, n) & kAbsolute), bits);
    const vf most = (vf)bits;
    const vi valid = (most >= broadcast(kLeastScaled)) & (most <= broadcast(kMostScaled));
    const vf cut = (vf)((vu)(127.0f / most) & kSixteenBits);
    const vf inverse = valid ? cut : vf{};
    store(scales + j, valid ? 1.0f / cut : most - most);
    vi sum = {};
    for (int k = 0; k < padded_depth<int8_t>(depth); k += 4) {
      vu quads = {};
      for (int i = 0; i < smaller(4, depth - k); ++i) {
        const vi q = (vi)fma(load_lanes(x + (k + i) * stride + j, n), inverse, broadcast(kRounding)) - kRoundingBits;
        sum += q;
        quads |= ((vu)q & 0xffu) << (8 * i);
      }
      __builtin_memcpy(panel + static_cast<long>(k) * kPanel + j * 4, &quads, sizeof quads);
    }
    sum *= -128;
    __builtin_memcpy(starts + j, &sum, sizeof sum);
  }
}

// ---- weights: one scale per output channel, max|w| / 127
// -------------------------------------------------------------

struct WeightRow {
  const float* w; // or null: zeros
  int columns;
  float scale;

  WeightRow() = default;
  WeightRow(const float* w, int columns) : w(w), columns(columns), scale(0.0f) {
    if (!w) return;
    vi bits = {};
    for (int j = 0; j < columns; j += kLanes)
      bits = larger_lanes((vi)((vu)load_lanes(w + j, smaller(kLanes, columns - j)) & kAbsolute), bits);
    const int32_t largest = largest_lane(bits);
    float most;
    __builtin_memcpy(&most, &largest, sizeof most);
    scale = most >= kLeastScaled && most <= kMostScaled ? most / 127.0f : most - most;
  }

  // Elements j.. of the row, zero beyond it.
  vi quantized(int j) const {
    if (!w || j >= columns || scale == 0.0f) return vi{};
    const vf ratio = load_lanes(w + j, smaller(kLanes, columns - j)) / broadcast(scale);
    return (vi)(ratio + broadcast(kRounding)) - kRoundingBits;
  }
};

// Panels of W^T with a scale and a start for each column.
struct Int8Matrix {
  int8_t* panels = nullptr;
  float* scales = nullptr;
  int32_t* starts = nullptr;
};

// One panel: column j is row row(j) of W, or zero where that is null.
template <class Row>
void pack_int8_panel(Row row, int depth, int8_t* panel, float* scales, int32_t* starts) {
  const int padded = padded_depth<int8_t>(depth);
  for (int half = 0; half < kPanel; half += 16) {
    WeightRow rows[16];
    int32_t sums[16] = {};
    for (int j = 0; j < 16; ++j) {
      rows[j] = WeightRow(row(half + j), depth);
      scales[half + j] = rows[j].scale;
    }
    for (int d = 0; d < padded; d += 64) {
      uint32_t in[16][16], out[16][16];
      for (int j = 0; j < 16; ++j) {
        vi sum = {};
        for (int i = 0; i < 64; i += kLanes) {
          const vi q = rows[j].quantized(d + i);
          sum += q;
          store_bytes(reinterpret_cast<uint8_t*>(in[j]) + i, q);
        }
        for (int i = 0; i < kLanes; ++i) sums[j] += sum[i];
      }
      transpose_16x16(in, out[0], 16);
      for (int i = 0; i < smaller(64, padded - d) / 4; ++i)
        __builtin_memcpy(panel + (d + 4L * i) * kPanel + half * 4, out[i], sizeof out[i]);
    }
    for (int j = 0; j < 16; ++j) starts[half + j] = -128 * sums[j];
  }
}

// Rows of W as they multiply from the left: q + 128, to_stride bytes apart.
inline void pack_int8_row(const float* w, int columns, uint8_t* to, long to_stride, float* scale) {
  const WeightRow row(w, columns);
  *scale = row.scale;
  for (int j = 0; j < static_cast<int>(to_stride); j += kLanes) store_bytes(to + j, row.quantized(j) + 128);
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
