// Matrix product, AVX-512F/BW: 14 rows x 2 zmm.
//
// Registers: 28 accumulators + 2 vectors of b + 1 broadcast row of a = 31 of 32; the mask of bf16's odd half is a mask
// register. One depth is 28 multiply-adds, 14 broadcasts and 2 loads: 14 cycles of two multiply-add ports. bf16 adds a
// shift or a masked move to each broadcast and load, on other ports where there are any (Zen), or else (Intel) for 44
// operations on two ports, so 64 % of peak by count.
//
// Measured on one core of a Zen 5 server (benchmarks/dot.cpp, gcc 12, share of the register peak of about 268 GFLOP/s):
// float, panels from L2 94-97 %, from L3 93-96 % with prefetch of the next panel, 86-92 % without; bf16 95-97 and 84-92
// %.
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
