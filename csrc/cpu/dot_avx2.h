// Matrix product, AVX2 and FMA: 6 rows x 2 ymm, so the panel takes two passes of 16 columns.
//
// Registers: 12 accumulators + 2 columns of b + 1 broadcast row of a = 15 of 16 (bf16: + 1 for the mask of the odd
// half).
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
