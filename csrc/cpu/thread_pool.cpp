#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace trmfast {
namespace {

// Long enough to bridge the gap between two calls of one training step, short enough not to heat an idle machine.
constexpr std::chrono::microseconds kSpinTime(80);
constexpr int kPausesPerCheck = 64;
constexpr int kBarrierPauses = 1024;

// Rounding and denormal modes are per thread: a result must not depend on which thread computed it.
uint64_t floating_point_mode() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr() & ~0x3fu; // without the sticky exception flags
#elif defined(__aarch64__)
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

void set_floating_point_mode(uint64_t mode) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#else
  (void)mode;
#endif
}

// Sleeps until a condition on atomics holds.  wait() spins first; wake() costs one load if no thread sleeps.
// The sequentially consistent order of `asleep_` and the atomics of the condition makes a lost wake-up impossible:
// either the sleeper sees the new value, or the waker sees the sleeper.
class Doorbell {
public:
  template <class Condition>
  void wait(Condition condition) {
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int i = 0; i < kPausesPerCheck; ++i) {
        if (condition()) return;
        spin_pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.store(true);
    bell_.wait(lock, condition);
    asleep_.store(false);
  }

  void wake() {
    if (!asleep_.load()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    bell_.notify_one();
  }

private:
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable bell_;
};

struct alignas(64) Worker {
  std::atomic<uint64_t> regions_given{0};
  std::atomic<bool> stop{false};
  Doorbell doorbell;
  std::thread thread;
};

thread_local bool inside_region = false;

// The body of a region, and the first exception thrown by one of its threads.
class Region {
public:
  Region(void (*body)(void*, int), void* context) : body_(body), context_(context), mode_(floating_point_mode()) {}

  void run(int thread) {
    const uint64_t before = floating_point_mode();
    if (before != mode_) set_floating_point_mode(mode_);
    inside_region = true;
    try {
      body_(context_, thread);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside_region = false;
    if (before != mode_) set_floating_point_mode(before);
  }

  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

private:
  void (*const body_)(void*, int);
  void* const context_;
  const uint64_t mode_;
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

// ---------------------------------------------------------------- OpenMP's threads

OpenMp openmp = {};

// Returns false, having run nothing, if OpenMP gives fewer threads: a thread limit, or a caller inside its own region.
bool run_on_openmp(int num_threads, Region& region) {
  struct Call {
    Region& region;
    int num_threads;
    bool whole;
  } call = {region, num_threads, false};
  const auto body = [](void* data) {
    Call& call = *static_cast<Call*>(data);
    if (openmp.num_threads() != call.num_threads) return;
    const int thread = openmp.thread_num();
    if (thread == 0) call.whole = true;
    call.region.run(thread);
  };
  openmp.parallel(body, &call, static_cast<unsigned>(num_threads), 0);
  return call.whole;
}

// ---------------------------------------------------------------- threads of our own

class Pool {
public:
  void run(int num_threads, Region& region);
  void join();

private:
  void start_worker();
  void work(Worker& worker, int thread);
  void follow_affinity();

  std::mutex regions_; // held for the whole of a region
  std::vector<std::unique_ptr<Worker>> workers_;

  // The current region; published to a worker by its regions_given.
  Region* region_ = nullptr;
  alignas(64) std::atomic<int> running_{0};
  Doorbell finished_;

#if defined(__linux__)
  cpu_set_t affinity_{};
#endif
};

void Pool::work(Worker& worker, int thread) {
  uint64_t seen = 0;
  for (;;) {
    worker.doorbell.wait([&] { return worker.regions_given.load() != seen || worker.stop.load(); });
    if (worker.regions_given.load() == seen) return;
    ++seen;
    region_->run(thread);
    if (running_.fetch_sub(1) == 1) finished_.wake();
  }
}

void Pool::start_worker() {
  auto worker = std::make_unique<Worker>();
  Worker& started = *worker;
  const int thread = static_cast<int>(workers_.size()) + 1;
  workers_.reserve(workers_.size() + 1);
  // Signals belong to the threads of the application.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    started.thread = std::thread([this, &started, thread] { work(started, thread); });
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw std::system_error(error.code(), "trmfast cannot start thread " + std::to_string(thread + 1));
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
#if defined(__linux__)
  pthread_setname_np(started.thread.native_handle(), "trmfast");
#endif
  workers_.push_back(std::move(worker));
}

// A new thread inherits its creator's affinity; this follows changes when the caller's affinity, or the caller,
// changes.
void Pool::follow_affinity() {
#if defined(__linux__)
  cpu_set_t now;
  CPU_ZERO(&now);
  if (sched_getaffinity(0, sizeof now, &now) != 0 || CPU_EQUAL(&now, &affinity_)) return;
  for (auto& worker : workers_) pthread_setaffinity_np(worker->thread.native_handle(), sizeof now, &now);
  affinity_ = now;
#endif
}

void Pool::run(int num_threads, Region& region) {
  std::lock_guard<std::mutex> lock(regions_);
  if (openmp.parallel && run_on_openmp(num_threads, region)) return;
  follow_affinity();
  while (static_cast<int>(workers_.size()) < num_threads - 1) start_worker();

  region_ = &region;
  running_.store(num_threads - 1);
  for (int i = 0; i < num_threads - 1; ++i) {
    workers_[i]->regions_given.fetch_add(1);
    workers_[i]->doorbell.wake();
  }
  region.run(0);
  finished_.wait([this] { return running_.load() == 0; });
}

void Pool::join() {
  std::lock_guard<std::mutex> region(regions_);
  for (auto& worker : workers_) {
    worker->stop.store(true);
    worker->doorbell.wake();
  }
  for (auto& worker : workers_) worker->thread.join();
  workers_.clear();
}

// The pool is never freed: a thread may still call it during process exit, and a forked child must not touch the pool
// it inherited, whose threads do not exist there and whose locks may never be released.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  Pool* existing = current_pool.load();
  if (existing != nullptr) return *existing;
  auto fresh = std::make_unique<Pool>();
  if (current_pool.compare_exchange_strong(existing, fresh.get())) return *fresh.release();
  return *existing;
}

// Registered while the library is loaded, so that no lock stands between a fork and its handler.
// Workers are joined when the library is unloaded or the process exits: their code must not be unmapped while they run.
struct Lifetime {
  Lifetime() {
    pthread_atfork(nullptr, nullptr, [] {
      current_pool.store(nullptr);
      openmp = {}; // GNU's runtime would deadlock waiting for threads that the child lacks
      inside_region = false;
    });
  }
  ~Lifetime() {
    if (Pool* existing = current_pool.load()) existing->join();
  }
} lifetime;

} // namespace

void parallel(int num_threads, void (*body)(void* context, int thread), void* context) {
  if (num_threads < 1) {
    throw std::invalid_argument("num_threads: got " + std::to_string(num_threads) + ", accepted are 1 and more");
  }
  if (inside_region) throw std::logic_error("trmfast::parallel was called from inside a parallel region");
  if (num_threads == 1) {
    struct Mark {
      Mark() { inside_region = true; }
      ~Mark() { inside_region = false; }
    } mark;
    body(context, 0);
    return;
  }
  Region region(body, context);
  pool().run(num_threads, region);
  region.rethrow();
}

void use_openmp(const OpenMp& runtime) { openmp = runtime; }

bool uses_openmp() { return openmp.parallel != nullptr; }

void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

SpinBarrier::SpinBarrier(int count) : count_(count), arrived_(0), agreed_(true), phase_(0) {}

bool SpinBarrier::wait(int count, bool agree) {
  const unsigned before = phase_.load(std::memory_order_relaxed) / 2;
  if (!agree) agreed_.store(false, std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
    arrived_.store(0, std::memory_order_relaxed);
    const bool agreed = agreed_.load(std::memory_order_relaxed);
    phase_.store(2 * (before + 1) + agreed, std::memory_order_release);
    return agreed;
  }
  unsigned phase;
  for (int pauses = 0; (phase = phase_.load(std::memory_order_acquire)) / 2 == before; ++pauses) {
    if (pauses < kBarrierPauses) {
      spin_pause();
    } else {
      sched_yield();
    }
  }
  return phase % 2 == 1;
}

} // namespace trmfast
