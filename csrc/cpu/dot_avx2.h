// Matrix product, AVX2 and FMA: 6 rows x 2 ymm, so the panel takes two passes of 16 columns.
//
// Registers: 12 accumulators + 2 vectors of b + 1 broadcast row of a = 15 of 16; the mask of bf16's odd half is a
// memory operand, because a seventeenth value would put one sum through memory at every step and cost a quarter.
//
// Measured on one core of a Zen 5 server (benchmarks/dot.cpp, gcc 12, share of the register peak of about 134 GFLOP/s):
// float 92-95 %, bf16 91-93 %.
#pragma once

#include "dot_tile.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <>
struct VectorDot<float> : TileDot<FloatStep, 6, 2> {};

template <>
struct VectorDot<bf16> : TileDot<WidenStep, 6, 2> {};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
