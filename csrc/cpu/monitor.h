// What the thread that called does for its caller while a job runs: it asks now and then whether to stop, and tells
// which phase begins.  Everything is defined in monitor.cpp on purpose, see thread_pool.h.
#pragma once

#include <atomic>
#include <chrono>

namespace trmfast {

class Monitor {
public:
  using Stop = bool (*)(void* context);
  using Phase = void (*)(void* context, const char* name);
  // stop: asked about every 50 ms, first after 50 ms.  phase: told the name of every phase that the calling thread
  // begins, and null after the last; or null itself.  Neither may throw: the peers would wait for ever at a barrier.
  Monitor(Stop stop, Phase phase, void* context);

  // Whether all are to leave; once true it stays true.  `caller`: this is the thread that called, which asks.
  bool stopped(bool caller);
  // By the thread that called.
  void begin_phase(const char* name);
  // Once every thread has left.
  void end();

private:
  void ask();

  const Stop stop_;
  const Phase phase_;
  void* const context_;
  int checks_left_;
  std::chrono::steady_clock::time_point last_look_, last_asked_;
  std::atomic<bool> stopped_;
};

} // namespace trmfast
