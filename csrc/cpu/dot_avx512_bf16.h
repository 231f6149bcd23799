// Matrix product of bf16, AVX512-BF16 (VDPBF16PS): 14 rows x 2 zmm, two depths an instruction, fp32 accumulation.
//
// Registers: 28 accumulators + 2 vectors of b + 1 broadcast row of a = 31 of 32. One step (two depths) is 28 VDPBF16PS,
// 14 dword broadcasts and 2 vector loads, 2 prefetches and 6 scalar operations: 14 cycles of two product ports, which
// need 18 loads and 3.7 operations a cycle. Sums round to nearest even twice an instruction; denormals, in and out, are
// zero.
//
// Measured on one core of a Zen 5 server (benchmarks/dot.cpp, gcc 12, share of the register peak of about 535 GFLOP/s):
// 97 and 388 rows x depth 512: panels from L2 94-97 %, from L3 94-95 % with prefetch of the next panel, 84-91 %
// without.
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
