// The SIMT emulator: runs kernels written in csrc/cuda/primitives.cuh on the CPU, a fiber per CUDA thread, and reports
// bugs that a GPU would show only now and then.  For host code; kernels include primitives.cuh.  tests/cuda_tools.py
// builds programs and libraries with it.
//
//   simt::GlobalArray<float> x("x", values), y("y", n);  // read-only input; output, NaN until it is written
//   simt::Options options;
//   options.order = simt::Order::kReverse;
//   simt::Counters counters = simt::launch(blocks, threads, shared_bytes, [&] { kernel<Config>(params); }, options);
//   y.values(), x.counters()
//
// An Error is thrown, with file and line of the access or the call, for:
//   * shared or global memory out of bounds, misaligned or never written; a store to a read-only buffer; load_nc from a
//     buffer that the same launch writes
//   * data races (Options::check_races): two accesses, one a write, that no sync_warp, barrier or release-acquire pair
//     orders, whatever the schedule was. Shared memory: between any two threads. Global memory: likewise, except that
//     of several readers since the last write only one is remembered. A release or an acquire counts for its whole warp
//   * an access to the destination of a cp.async before its wait, a source that changes before it, a copy without one
//   * warp primitives and barriers that lanes reach at different places, or that some lanes never reach
//   * deadlock: with a list of what each thread waits for. Threads that spin on load_acquire count as waiting when
//   nothing else
//     can run; their global_timer then leaps, so that time-outs are reached (first in 1 us steps, at last seconds)
//
// Schedules: one warp runs until it blocks, in the order of Options::order over blocks and warps, lanes likewise;
// kRandom picks lanes at random and may change the warp after any warp primitive. One launch at a time per process.
//
// mma adds the sixteen exact products in ascending k to the accumulator, rounding to fp32 each time; with
// Options::truncate_mma it adds all of them exactly and rounds the sum toward zero once.  What hardware does
// is not specified: compare with a tolerance.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#include "primitives.cuh"

namespace trmfast {
namespace simt {

enum class Order { kForward, kReverse, kRandom };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 0;
  int resident_blocks = 1; // resident at the same time: at least the blocks that wait for each other
  bool check_races = true;
  bool check_unwritten = true;
  bool truncate_mma = false;
};

// Warp-wide accesses. One wavefront moves up to 128 bytes of shared memory; `ideal` is their number without bank
// conflicts. Accesses of the lanes between two warp primitives are one warp-wide access if they are the n-th at their
// line.
struct Accesses {
  uint64_t count = 0;
  uint64_t wavefronts = 0;
  uint64_t ideal = 0;

  uint64_t conflicts() const { return wavefronts - ideal; }
  void add(uint64_t accesses, uint64_t all, uint64_t least) {
    count += accesses;
    wavefronts += all;
    ideal += least;
  }
};

struct Counters {
  uint64_t mma = 0; // per warp, as everything below
  uint64_t shuffles = 0;
  uint64_t warp_syncs = 0;
  uint64_t barriers = 0;
  Accesses ldmatrix, shared_load, shared_store, cp_async;
  std::map<std::string, Accesses> lines; // of shared memory by "file:line"
};

// Runs the kernel once per thread. Threads: a multiple of 32 up to 1024 per block.
Counters launch(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel,
                const Options& options = {});

} // namespace simt
} // namespace trmfast
