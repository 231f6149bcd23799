// Matrix product, AVX-512F/BW: 14 rows x 2 zmm.
//
// Registers: 28 accumulators + 2 columns of b + 1 broadcast row of a = 31 of 32 (bf16: + 1 for the mask of the odd
// half).
#pragma once

#include "dot_tile.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

template <>
struct VectorDot<float> : TileDot<FloatStep, 14, 2> {};

template <>
struct VectorDot<bf16> : TileDot<WidenStep, 14, 2> {};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
