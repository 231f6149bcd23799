// The measured register-only peak of a target: the denominator of "share of peak". Measure it in the same process as
// what it is compared with, and close in time, because clocks drift. Operands are constant here; with changing operands
// a Xeon's AMX was measured 14 to 17 percent slower at the same instruction mix (apparently its power limit), so 100 %
// is out of reach.
#pragma once

#include <time.h>

#include "dot.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// This thread's CPU time, so other processes cost only caches and clock rate.
inline double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Multiply-adds of the target's Step on as many independent accumulators as its tile has at most, so that their latency
// is covered here too. Operands and sums are neither zero nor denormal, and opaque to the compiler.
template <class Step>
struct VectorPeak {
  static constexpr int kAccumulators = kLanes == 16 ? 28 : kLanes == 8 ? 12 : 8;
  static constexpr double kFlops = 2.0 * kAccumulators * kLanes * Step::kDepth / Step::kParts;
  static constexpr long kIterations = 20000;

  __attribute__((noinline)) static void run(long iterations) {
    // About 1 and 0.001, as a float and as a pair of bf16.
    vu row = vu{} + 0x3f803f80u, columns = vu{} + 0x3a833a83u;
    TRMFAST_OPAQUE(row);
    TRMFAST_OPAQUE(columns);
    vf acc[kAccumulators];
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) acc[i] = broadcast(1.0f + 0.01f * static_cast<float>(i));
#pragma GCC unroll 1
    for (long n = 0; n < iterations; ++n) {
#pragma GCC unroll 32
      for (int i = 0; i < kAccumulators; ++i) {
        acc[i] = Step::multiply_add((typename Step::Vector)row, (typename Step::Vector)columns, acc[i]);
        TRMFAST_OPAQUE(acc[i]);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) TRMFAST_OPAQUE(acc[i]);
  }
};

#if defined(__AMX_BF16__) || defined(__AMXBF16__) || defined(TRMFAST_EMULATE_AMX)
// TDPBF16PS on four accumulators of 16 x 16.
struct TilePeak {
  static constexpr double kFlops = 4.0 * 2 * 16 * 16 * 32;
#ifdef TRMFAST_EMULATE_AMX
  static constexpr long kIterations = 1;
#else
  static constexpr long kIterations = 5000;
#endif

  static void run(long iterations) {
    alignas(64) bf16 ones[16 * 32], small[16 * 32];
    for (int i = 0; i < 16 * 32; ++i) {
      ones[i] = to_bf16(1.0f + 0.001f * static_cast<float>(i));
      small[i] = to_bf16(1e-6f * static_cast<float>(i + 1));
    }
    configure_tiles(32);
    finish_stores();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    _tile_loadd(6, small, 64);
    _tile_loadd(7, small, 64);
    for (long n = 0; n < iterations; ++n) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    Dot<bf16>::release();
  }
};
#endif

template <class T>
struct Peak : VectorPeak<typename VectorDot<T>::Step> {};

#if defined(__AMX_BF16__) || defined(__AMXBF16__) || defined(TRMFAST_EMULATE_AMX)
template <>
struct Peak<bf16> : TilePeak {};
#elif defined(__AVX512BF16__)
template <>
struct Peak<bf16> : VectorPeak<PairStep> {};
#endif

// GFLOP/s of one thread on elements of type T, the best of the short runs that fit in `seconds` (at least one):
// whatever disturbs a run only slows it.
template <class T>
double peak_gflops(double seconds) {
  double start = thread_seconds();
  const double end = start + seconds;
  double best = 0;
  do {
    Peak<T>::run(Peak<T>::kIterations);
    const double stop = thread_seconds();
    const double rate = 1e-9 * static_cast<double>(Peak<T>::kIterations) * Peak<T>::kFlops / (stop - start);
    if (rate > best) best = rate;
    start = stop;
  } while (start < end);
  return best;
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
