// The register-only peak of int8 products, as peak.h has it for floats: operations are multiplications and additions.
#pragma once

#include "dot_int8.h"
#include "peak.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

#if defined(__AMX_BF16__) || defined(__AMXBF16__) || defined(TRMFAST_EMULATE_AMX)
// TDPBUSD on four accumulators of 16 x 16.
template <>
struct Peak<int8_t> {
  static constexpr double kFlops = 4.0 * 2 * 16 * 16 * 64;
  static constexpr long kIterations = TilePeak::kIterations;

  static void run(long iterations) {
    alignas(64) uint8_t bytes[16 * 64];
    for (int i = 0; i < 16 * 64; ++i) bytes[i] = static_cast<uint8_t>(i);
    configure_tiles(32);
    finish_stores();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, bytes, 64);
    _tile_loadd(5, bytes, 64);
    _tile_loadd(6, bytes, 64);
    _tile_loadd(7, bytes, 64);
    for (long n = 0; n < iterations; ++n) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    Dot<int8_t>::release();
  }
};
#else
template <>
struct Peak<int8_t> {
  using Step = Int8VectorDot::Step;
  static constexpr int kAccumulators = kLanes == 16 ? 28 : kLanes == 8 ? 12 : 8;
  static constexpr double kFlops = 2.0 * kAccumulators * kLanes * 4 / Step::kParts;
  static constexpr long kIterations = 20000;

  __attribute__((noinline)) static void run(long iterations) {
    vu row = vu{} + 0x01020304u, columns = vu{} + 0x04030201u;
    TRMFAST_OPAQUE(row);
    TRMFAST_OPAQUE(columns);
    vi acc[kAccumulators] = {};
#pragma GCC unroll 1
    for (long n = 0; n < iterations; ++n) {
#pragma GCC unroll 32
      for (int i = 0; i < kAccumulators; ++i) {
        acc[i] = Step::multiply_add(row, columns, acc[i]);
        TRMFAST_OPAQUE(acc[i]);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) TRMFAST_OPAQUE(acc[i]);
  }
};
#endif

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
