// Matrix product of bf16, AVX512-BF16 (VDPBF16PS): 14 rows x 2 zmm, two depths an instruction, fp32 accumulation.
//
// Registers: 28 accumulators + 2 columns of b + 1 broadcast row of a = 31 of 32. One step (two depths) is 28 VDPBF16PS,
// 14 dword broadcasts and 2 vector loads: 14 cycles of two product ports, against 16 loads of at least two a cycle.
// VDPBF16PS rounds to nearest even after each of its two additions and treats denormals, in and out, as zero.
#pragma once

#include "dot_avx512.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

struct PairStep {
  using Element = bf16;
  using Vector = vu;
  static constexpr int kDepth = 2, kParts = 1;

  template <int>
  TRMFAST_INLINE vu broadcast_row(const char* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return vu{} + pair;
  }

  template <int>
  TRMFAST_INLINE vu load_columns(const char* p) {
    vu pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }

  TRMFAST_INLINE vf multiply_add(vu row, vu columns, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)row, (__m512bh)columns);
  }
};

template <>
struct Dot<bf16> : TileDot<PairStep, 14, 2> {};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
