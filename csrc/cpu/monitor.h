// What the calling thread does during a job: it polls whether to stop, and reports each phase as it begins.  Everything
// is defined in monitor.cpp on purpose, see thread_pool.h.
#pragma once

#include <atomic>
#include <chrono>

namespace trmfast {

class Monitor {
public:
  using Stop = bool (*)(void* context);
  using Phase = void (*)(void* context, const char* name);
  // stop: polled about every 50 ms, first after 50 ms.  phase: called with the name of each phase the calling thread
  // begins, and with null after the last; may be null.  Neither may throw: the other threads would deadlock at a
  // barrier.
  Monitor(Stop stop, Phase phase, void* context);

  // Whether all threads must leave; stays true once true.  `caller`: this is the calling thread, which polls.
  bool stopped(bool caller);
  // Called by the calling thread.
  void begin_phase(const char* name);
  // Whether `stop` or `phase` was called since the last query, by the calling thread: code that may have used the AMX
  // tiles.
  bool called_out();
  // Called once every thread has left.
  void end();

private:
  void ask();

  const Stop stop_;
  const Phase phase_;
  void* const context_;
  int checks_left_;
  std::chrono::steady_clock::time_point last_look_, last_asked_;
  std::atomic<bool> stopped_;
  bool called_out_; // touched by the calling thread alone
};

} // namespace trmfast
