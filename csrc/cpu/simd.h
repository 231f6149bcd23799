// One SIMD vector type per translation unit, as wide as the unit's compile flags allow, on GCC/Clang vector extensions:
// 16 floats with AVX-512, 8 with AVX2, 4 otherwise (SSE2, NEON). vf and vi support the usual operators and
// `mask ? a : b` with mask = a comparison of two vectors. Everything is always inlined into a namespace of the unit's
// own, because the same code compiled for another target must never be merged with it by the linker.
#pragma once

#include <cstdint>

#include "bf16.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef TRMFAST_NAMESPACE
#define TRMFAST_NAMESPACE native
#endif

#define TRMFAST_INLINE static inline __attribute__((always_inline))
#define TRMFAST_MEMBER inline __attribute__((always_inline))

// Makes the compiler forget where the value of a vector comes from.
#if defined(__AVX512F__)
#define TRMFAST_OPAQUE(vector) asm volatile("" : "+v"(vector))
#elif defined(__x86_64__)
#define TRMFAST_OPAQUE(vector) asm volatile("" : "+x"(vector))
#elif defined(__aarch64__)
#define TRMFAST_OPAQUE(vector) asm volatile("" : "+w"(vector))
#else
#define TRMFAST_OPAQUE(vector) asm volatile("" : "+m"(vector))
#endif

namespace trmfast {
namespace TRMFAST_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vu16 __attribute__((vector_size(2 * kLanes))); // the bits of kLanes bf16

#if defined(__AVX512F__)
// GCC 12 warns of an uninitialised operand inside the unmasked forms of some intrinsics; with a constant full mask the
// masked forms compile to the same instructions.
constexpr __mmask16 kAll = 0xffff;
#endif

// Subtracting zero changes no value, not even -0 (adding it would), so that this is only a broadcast.
TRMFAST_INLINE vf broadcast(float value) { return value - vf{}; }

// ---- loads and stores, all unaligned -------------------------------------------------------------------------------

TRMFAST_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

TRMFAST_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

TRMFAST_INLINE vf from_bf16_bits(vu16 bits) {
#if defined(__AVX512F__)
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(kAll, (__m256i)bits) << 16);
#elif defined(__AVX2__)
  return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)bits) << 16);
#else
  return (vf)(__builtin_convertvector(bits, vu) << 16);
#endif
}

// Round to nearest even, NaN stays NaN. With AVX512-BF16 the instruction treats denormal inputs as zero; the other
// targets keep them.
TRMFAST_INLINE vu16 to_bf16_bits(vf v) {
#if defined(__AVX512BF16__)
  return (vu16)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet_nan = (bits >> 16) | 0x40u;
  const vu result = v == v ? rounded : quiet_nan;
#if defined(__AVX512F__)
  return (vu16)_mm512_maskz_cvtepi32_epi16(kAll, (__m512i)result);
#else
  return __builtin_convertvector(result, vu16);
#endif
#endif
}

TRMFAST_INLINE vf load(const bf16* p) {
  vu16 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return from_bf16_bits(bits);
}

TRMFAST_INLINE void store(bf16* p, vf v) {
  const vu16 bits = to_bf16_bits(v);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// The first n of kLanes elements, 0 <= n <= kLanes; nothing beyond them is touched and absent lanes read as zero.
TRMFAST_INLINE vf load(const float* p, int n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
#else
  vf v = {};
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) v[i] = p[i];
  }
  return v;
#endif
}

TRMFAST_INLINE void store(float* p, vf v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
#else
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) p[i] = v[i];
  }
#endif
}

TRMFAST_INLINE vf load(const bf16* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return from_bf16_bits((vu16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
#else
  vu16 bits = {};
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) bits[i] = p[i].bits;
  }
  return from_bf16_bits(bits);
#endif
}

TRMFAST_INLINE void store(bf16* p, vf v, int n) {
  const vu16 bits = to_bf16_bits(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), (__m256i)bits);
#else
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) p[i].bits = bits[i];
  }
#endif
}

// Loads and stores of n lanes, for loops in which n is nearly always kLanes.
template <class T>
TRMFAST_INLINE vf load_lanes(const T* p, int n) {
  return n == kLanes ? load(p) : load(p, n);
}
template <class T>
TRMFAST_INLINE void store_lanes(T* p, vf v, int n) {
  if (n == kLanes)
    store(p, v);
  else
    store(p, v, n);
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// a * b + c, rounded once where the target has such an instruction.
TRMFAST_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// a > b ? a : b, so b where one of them is NaN (the meaning of x86's maxps; on every target).
TRMFAST_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// a < b ? a : b, so b where one of them is NaN.
TRMFAST_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps(kAll, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// Horizontal results by a tree over halves, in an order that is fixed.
struct Add {
  template <class V>
  TRMFAST_INLINE V apply(V a, V b) {
    return a + b;
  }
};

struct Larger {
  template <class V>
  TRMFAST_INLINE V apply(V a, V b) {
    return a > b ? a : b;
  }
};

template <class Op>
TRMFAST_INLINE float reduce(vf v) {
  typedef float v4 __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  typedef float v8 __attribute__((vector_size(32)));
  const v8 half = Op::apply((v8)_mm512_maskz_extractf64x4_pd(0xf, (__m512d)v, 0),
                            (v8)_mm512_maskz_extractf64x4_pd(0xf, (__m512d)v, 1));
#elif defined(__AVX2__)
  const vf half = v;
#endif
#if defined(__AVX2__)
  const v4 quarter = Op::apply((v4)_mm256_castps256_ps128((__m256)half), (v4)_mm256_extractf128_ps((__m256)half, 1));
#else
  const v4 quarter = v;
#endif
  return Op::apply(Op::apply(quarter[0], quarter[2]), Op::apply(quarter[1], quarter[3]));
}

TRMFAST_INLINE float sum(vf v) { return reduce<Add>(v); }

// The largest lane; unspecified if a lane is NaN.
TRMFAST_INLINE float max_of(vf v) { return reduce<Larger>(v); }

// 1 / sqrt(v) with both operations correctly rounded.
TRMFAST_INLINE vf rsqrt(vf v) {
#if defined(__AVX512F__)
  return 1.0f / (vf)_mm512_maskz_sqrt_ps(kAll, (__m512)v);
#elif defined(__AVX2__)
  return 1.0f / (vf)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return 1.0f / (vf)_mm_sqrt_ps((__m128)v);
#elif defined(__aarch64__)
  return 1.0f / (vf)vsqrtq_f32((float32x4_t)v);
#else
  vf root;
  for (int i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(v[i]);
  return 1.0f / root;
#endif
}

// p * 2^n for integral -150 <= n <= 129 and p in [0.7, 1.42]: denormal and infinite results are right.
TRMFAST_INLINE vf scale_by_power(vf p, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(kAll, (__m512)p, (__m512)n);
#else
  // In two steps, because 2^-150 and 2^128 are not floats.
  const vi exponent = __builtin_convertvector(n, vi);
  const vi first = exponent >> 1, second = exponent - first;
  return p * (vf)((first + 127) << 23) * (vf)((second + 127) << 23);
#endif
}

// e^v. Within 1 ulp (2 without FMA), exact 0 from v < -104 (and -inf) on, inf above 88.72; NaN stays NaN.
// v = n ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r q(r), q the degree-5 polynomial of least relative error, 0.03 ulp.
TRMFAST_INLINE vf exp(vf v) {
  v = max(broadcast(-104.0f), v); // the constant first: NaN passes through
  v = min(broadcast(89.0f), v);
  const vf magic = broadcast(0x1.8p23f); // adding it rounds to an integer
  const vf n = fma(v, broadcast(0x1.715476p0f), magic) - magic;
  vf r = fma(n, broadcast(-0x1.62e400p-1f), v); // ln 2 in two parts; n times the first is exact
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  vf q = broadcast(0x1.6ae6dep-10f);
  q = fma(q, r, broadcast(0x1.1267d8p-7f));
  q = fma(q, r, broadcast(0x1.555824p-5f));
  q = fma(q, r, broadcast(0x1.555418p-3f));
  q = fma(q, r, broadcast(0x1.fffffcp-2f));
  q = fma(q, r, broadcast(0x1p+0f));
  return scale_by_power(fma(q, r, broadcast(1.0f)), n);
}

// 2^v where the result will be rounded to bf16: within 7.5e-5 of it, a fortieth of that rounding. Exact 0 from v < -150
// (and -inf) on, inf from 128 on; NaN stays NaN. v = n + r, and the cubic of least relative error for 2^r: with r from
// 0 to 1 on AVX-512, which has instructions for v - floor(v) and for p 2^floor(v), else from -1/2 to 1/2.
TRMFAST_INLINE vf exp2_for_bf16(vf v) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_maskz_reduce_ps(kAll, (__m512)v, 0x09); // 0 for infinities
  vf p = broadcast(0x1.3f96a4p-4f);
  p = fma(p, r, broadcast(0x1.cefc4cp-3f));
  p = fma(p, r, broadcast(0x1.64444ap-1f));
  p = fma(p, r, broadcast(0x1.fff632p-1f));
  return (vf)_mm512_maskz_scalef_ps(kAll, (__m512)p, (__m512)v);
#else
  v = max(broadcast(-150.0f), v); // the constant first: NaN passes through
  v = min(broadcast(129.0f), v);
  const vf magic = broadcast(0x1.8p23f);
  const vf n = (v + magic) - magic, r = v - n;
  vf p = broadcast(0x1.c3f760p-5f);
  p = fma(p, r, broadcast(0x1.f0de1ap-3f));
  p = fma(p, r, broadcast(0x1.62f31ap-1f));
  return scale_by_power(fma(p, r, broadcast(0x1.fff692p-1f)), n);
#endif
}

// 1 / v for v >= 1 where the result will be rounded to bf16: within 2^-14 of it.
TRMFAST_INLINE vf reciprocal_for_bf16(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_rcp14_ps(kAll, (__m512)v);
#else
  return 1.0f / v;
#endif
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
