// Matrix product on 4-lane vectors (SSE2, NEON, or whatever the compiler makes of them): 4 rows x 8 columns, four
// passes; with the 32 registers of AArch64, 4 rows x 16 columns, two passes.
//
// Registers: 8 accumulators + 2 columns of b + 1 row of a + 1 product (SSE2 has no fused multiply-add) = 12 of 16;
// AArch64: 16 + 4 + 1 of 32.
//
// Measured on one core of a Zen 5 server with SSE2 (benchmarks/dot.cpp, gcc 12, share of the register peak of about 66
// GFLOP/s): float 62-64 %, bf16 53 %; a broadcast is a load and a shuffle there.
#pragma once

#include "dot_tile.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

#if defined(__aarch64__)
constexpr int kPortableVectors = 4;
#else
constexpr int kPortableVectors = 2;
#endif

template <>
struct VectorDot<float> : TileDot<FloatStep, 4, kPortableVectors> {};

template <>
struct VectorDot<bf16> : TileDot<WidenStep, 4, kPortableVectors> {};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
