// A persistent pool of threads for regions that start every few hundred microseconds, and a barrier for inside them.
//
// Everything is defined in thread_pool.cpp on purpose: this header is included by files compiled for different
// instruction sets, and an inline function would be merged across them into whichever copy the linker meets first.
#pragma once

#include <atomic>

namespace trmfast {

// Runs body(context, thread) for thread = 0 .. num_threads - 1, all at the same time, and returns when all have.
// The caller is thread 0.  The others belong to an OpenMP runtime (see use_openmp) or are our own workers: started on
// first use, with the caller's affinity, spinning briefly after a region, then sleeping.  All compute in
// the caller's floating-point mode.  Calls from several threads run one after the other. An exception in a body is
// rethrown here once every body has returned; with several, the first one caught.  A body that waits at a barrier must
// not throw before it: the other threads would deadlock.
// Throws std::invalid_argument if num_threads < 1, std::logic_error if called from inside a region, std::system_error
// if a thread cannot be started; in all three cases no body has run.
void parallel(int num_threads, void (*body)(void* context, int thread), void* context);

// The same for a callable: parallel(n, [&](int thread) { ... }).
template <class Body>
void parallel(int num_threads, Body&& body) {
  using Callable = decltype(&body);
  parallel(
      num_threads, [](void* context, int thread) { (*static_cast<Callable>(context))(thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Entry points of an OpenMP runtime: GOMP_parallel, which those of GNU, LLVM and Intel export, omp_get_num_threads and
// omp_get_thread_num.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
  int (*num_threads)();
  int (*thread_num)();
};

// Runs all later regions on this runtime's threads, until a fork: the child does not use it.  Its threads spin for
// milliseconds after a region, so in a program that uses it, our own workers would find their cores busy.  Do not call
// while a region runs.
void use_openmp(const OpenMp& runtime);

// Whether regions run on the threads of an OpenMP runtime.
bool uses_openmp();

// Tells the CPU that this is a spin loop.
void spin_pause();

// A barrier between threads that share work; memory written before wait() is visible after it.
// Spins, then yields, so that it stays correct (and only slow) with more threads than cores.
class SpinBarrier {
public:
  explicit SpinBarrier(int count = 0);
  SpinBarrier(const SpinBarrier&) = delete;
  SpinBarrier& operator=(const SpinBarrier&) = delete;
  void wait() { wait(count_, true); }
  // The number of threads may differ from the last call's, if no earlier wait is still in progress.  Returns whether
  // all of them, and all earlier waiters, passed `agree`.
  bool wait(int count, bool agree);

private:
  const int count_;
  alignas(64) std::atomic<int> arrived_;
  std::atomic<bool> agreed_;
  // Twice the number of phases, plus one if all agreed; in a line of its own: waiters poll it while others arrive.
  alignas(64) std::atomic<unsigned> phase_;
};

} // namespace trmfast
