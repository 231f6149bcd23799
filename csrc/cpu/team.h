// A team: the threads that work on one group of sequences together.  A phase of work is a range of items, divided by
// rank; sync() ends a phase.  A team of one never waits.
//
// When a job is stopped, long phases see stopped() between items and each thread skips the rest, but still reaches
// every barrier.  A team leaves a program only on the result of sync(), which is the same for all its threads.
#pragma once

#include "dot.h"
#include "engine.h"
#include "layout.h"
#include "monitor.h"
#include "thread_pool.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

struct Range {
  int begin, end;
};

struct Team {
  int rank, size;
  SpinBarrier* barrier;
  Monitor* monitor; // or null
  bool caller;      // this is the calling thread

  bool stopped() const {
    if (!monitor) return false;
    const bool stop = monitor->stopped(caller);
    if (caller && monitor->called_out()) Dot<bf16>::forget();
    return stop;
  }
  // Whether to continue: false if any thread of the team has seen the stop.
  bool sync() const { return size > 1 ? barrier->wait(size, !stopped()) : !stopped(); }
  void begin(const char* phase) const {
    if (!monitor || !caller) return;
    monitor->begin_phase(phase);
    if (monitor->called_out()) Dot<bf16>::forget();
  }
  Range split(int items) const {
    return {static_cast<int>(static_cast<long>(items) * rank / size),
            static_cast<int>(static_cast<long>(items) * (rank + 1) / size)};
  }
};

inline Team everyone(const Job& job, int thread) {
  return {thread, job.threads, job.barriers, job.monitor, thread == 0};
}
inline Team alone(const Job& job, int thread) { return {0, 1, nullptr, job.monitor, thread == 0}; }
constexpr Team kAlone{0, 1, nullptr, nullptr, false};

// The team that takes one of the `rest` sequences of a division, and which one.
struct RestTeam {
  Team team;
  int index, first_thread;
  bool idle;

  RestTeam(const Job& job, const Division& division, int thread) {
    idle = division.rest == 0 || thread / division.team_size >= division.rest;
    if (idle) return;
    index = thread / division.team_size;
    first_thread = index * division.team_size;
    team = {thread - first_thread, division.team_size, job.barriers + 1 + index, job.monitor, thread == 0};
  }
};

// The row tiles of a product.  Equal ones where the time of a tile goes with its rows: 97 rows in tiles of at most 14
// are 7 tiles of 13 or 14, not 6 and a rest.  Where it goes with whole pieces of kWholeRows, whole tiles and a rest: 97
// are 3 of 32 and 1 of 1.  Such a rest is multiplied together with `lead` rows before it, which makes a piece whole.
template <class Kernel> struct RowTiles {
  static constexpr bool kEqual = Kernel::kWholeRows == 1;
  int rows, count;
  explicit RowTiles(int rows) : rows(rows), count(ceil_div(rows, Kernel::kRows)) {}
  int begin(int tile) const {
    return kEqual ? static_cast<int>(static_cast<long>(rows) * tile / count) : smaller(rows, tile * Kernel::kRows);
  }
  int size(int tile) const { return begin(tile + 1) - begin(tile); }
  int lead(int tile) const { return kEqual ? 0 : larger(0, smaller(begin(tile), Kernel::kWholeRows - size(tile))); }
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
