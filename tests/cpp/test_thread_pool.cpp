// Tests of csrc/cpu/thread_pool and csrc/cpu/isa.  One executable, one test per name given on the command line.
// tests/test_thread_pool.py compiles it plainly, with the thread sanitizer and with the address sanitizer; and with
// TRMFAST_TEST_OPENMP, which runs regions on the threads of the compiler's OpenMP runtime.
#include "../../csrc/cpu/thread_pool.h"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "check.h"

#if defined(TRMFAST_TEST_OPENMP)
#include <omp.h>
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
#endif

namespace {

void every_thread_runs_once() {
  for (int round = 0; round < 50; ++round) {
    for (int n : {1, 2, 5, 3, 9, 1, 4}) {
      std::vector<int> runs(n, 0); // plain ints: the sanitizer reports missing synchronisation
      trmfast::parallel(n, [&](int thread) { runs[thread] += 1; });
      for (int count : runs) CHECK(count == 1);
    }
  }
}

void caller_is_thread_zero() {
  const auto self = std::this_thread::get_id();
  std::vector<std::thread::id> ids(4);
  trmfast::parallel(4, [&](int thread) { ids[thread] = std::this_thread::get_id(); });
  CHECK(ids[0] == self);
  CHECK(std::set<std::thread::id>(ids.begin(), ids.end()).size() == 4);
  const auto before = ids;
  trmfast::parallel(4, [&](int thread) { ids[thread] = std::this_thread::get_id(); });
  CHECK(ids == before); // the threads persist
}

void wakes_after_sleep() {
  for (int round = 0; round < 40; ++round) {
    int sum = 0, other = 0;
    trmfast::parallel(2, [&](int thread) { (thread ? sum : other) = round; });
    CHECK(sum == round && other == round);
    // Around the time a worker stops spinning and falls asleep, when a wake-up could be lost.
    std::this_thread::sleep_for(std::chrono::microseconds(20 * (round % 10)));
  }
}

void callers_from_many_threads() {
  std::vector<std::thread> callers;
  std::vector<long> totals(4, 0);
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([caller, &totals] {
      for (int round = 0; round < 300; ++round) {
        const int n = 1 + (round + caller) % 4;
        std::vector<long> parts(n, 0);
        trmfast::parallel(n, [&](int thread) { parts[thread] = thread + 1; });
        long sum = 0;
        for (long part : parts) sum += part;
        CHECK(sum == n * (n + 1) / 2);
        totals[caller] += 1;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  for (long total : totals) CHECK(total == 300);
}

void exceptions_reach_the_caller() {
  for (int thrower : {0, 1, 3}) {
    std::string caught;
    std::vector<int> runs(4, 0);
    try {
      trmfast::parallel(4, [&](int thread) {
        runs[thread] = 1;
        if (thread == thrower) throw std::runtime_error("thread " + std::to_string(thread));
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught == "thread " + std::to_string(thrower));
    for (int run : runs) CHECK(run == 1);
  }
  bool caught = false;
  try {
    trmfast::parallel(1, [](int) { throw std::runtime_error("alone"); });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  CHECK(caught);
  every_thread_runs_once();
}

template <class Error, class Call>
bool throws(Call call) {
  try {
    call();
  } catch (const Error&) {
    return true;
  }
  return false;
}

void misuse_is_refused() {
  CHECK(throws<std::invalid_argument>([] { trmfast::parallel(0, [](int) {}); }));
  CHECK(throws<std::invalid_argument>([] { trmfast::parallel(-3, [](int) {}); }));
  for (int n : {1, 2}) {
    CHECK(throws<std::logic_error>([n] { trmfast::parallel(n, [](int) { trmfast::parallel(1, [](int) {}); }); }));
  }
  every_thread_runs_once();
}

void barrier_separates_phases(int threads, int phases) {
  trmfast::SpinBarrier barrier(threads);
  std::vector<int> value(threads, -1); // plain: written before, read by the neighbour after the barrier
  trmfast::parallel(threads, [&](int thread) {
    for (int phase = 0; phase < phases; ++phase) {
      value[thread] = phase;
      barrier.wait();
      CHECK(value[(thread + 1) % threads] == phase);
      barrier.wait();
    }
  });
}

void barrier() {
  barrier_separates_phases(1, 100);
  barrier_separates_phases(2, 2000);
}

void barrier_oversubscribed() {
  barrier_separates_phases(4 * static_cast<int>(std::thread::hardware_concurrency()), 50);
}

// If one thread disagrees, all threads learn it at that barrier and at every later one.
void barrier_tells_whether_all_agree() {
  constexpr int kThreads = 3, kPhases = 300, kLast = 200;
  trmfast::SpinBarrier barrier;
  trmfast::parallel(kThreads, [&](int thread) {
    for (int phase = 0; phase < kPhases; ++phase)
      CHECK(barrier.wait(kThreads, thread != 1 || phase != kLast) == (phase < kLast));
  });
}

int in_child(void (*test)()) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    alarm(20); // a deadlock kills the child and fails the test
    test();
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  return status;
}

void fork_while_idle() {
  every_thread_runs_once();
  for (int round = 0; round < 5; ++round) CHECK(in_child(every_thread_runs_once) == 0);
  CHECK(in_child([] { CHECK(in_child(every_thread_runs_once) == 0); }) == 0);
  every_thread_runs_once();
}

void fork_while_busy() {
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) trmfast::parallel(3, [](int) {});
  });
  for (int round = 0; round < 20; ++round) {
    CHECK(in_child([] {
            std::vector<int> runs(3, 0);
            trmfast::parallel(3, [&](int thread) { runs[thread] = 1; });
            CHECK(runs == std::vector<int>(3, 1));
          }) == 0);
  }
  stop = true;
  busy.join();
}

void affinity_follows_the_caller() {
#if defined(__linux__)
  cpu_set_t all;
  CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
  every_thread_runs_once();
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &all)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    std::vector<cpu_set_t> seen(3);
    trmfast::parallel(3, [&](int thread) { sched_getaffinity(0, sizeof one, &seen[thread]); });
    for (const auto& set : seen) CHECK(CPU_EQUAL(&set, &one));
  }
  sched_setaffinity(0, sizeof all, &all);
#endif
}

void floating_point_mode_follows_the_caller() {
#if defined(__x86_64__)
  const unsigned plain = __builtin_ia32_stmxcsr();
  for (unsigned mode : {plain | 0x8040u, plain & ~0x8040u}) { // flush to zero, denormals are zero
    __builtin_ia32_ldmxcsr(mode);
    volatile float tiny = 1e-38f;
    std::vector<int> flushed(3, -1);
    trmfast::parallel(3, [&](int thread) { flushed[thread] = tiny * 0.01f == 0.0f; });
    for (int flag : flushed) CHECK(flag == ((mode & 0x8000u) ? 1 : 0));
  }
  __builtin_ia32_ldmxcsr(plain);
#endif
}

#if defined(TRMFAST_TEST_OPENMP)
std::set<std::thread::id> openmp_threads(int count) {
  std::vector<std::thread::id> ids(static_cast<size_t>(count));
#pragma omp parallel num_threads(count)
  ids[static_cast<size_t>(omp_get_thread_num())] = std::this_thread::get_id();
  return {ids.begin(), ids.end()};
}

std::set<std::thread::id> region_threads(int count) {
  std::vector<std::thread::id> ids(static_cast<size_t>(count));
  trmfast::parallel(count, [&](int thread) { ids[static_cast<size_t>(thread)] = std::this_thread::get_id(); });
  return {ids.begin(), ids.end()};
}

void openmp_lends_its_threads() {
  CHECK(trmfast::uses_openmp());
  const auto threads = openmp_threads(3);
  CHECK(threads.size() == 3 && region_threads(3) == threads);
  CHECK(in_child([] {
          CHECK(!trmfast::uses_openmp());
          CHECK(region_threads(3).size() == 3);
        }) == 0);
}

// A region whose threads meet at barriers must never start with fewer of them.
void openmp_with_too_few_threads() {
#pragma omp parallel num_threads(2)
  {
#pragma omp single
    {
      CHECK(region_threads(3).size() == 3);
      barrier_separates_phases(3, 10);
    }
  }
  omp_set_dynamic(1);
  const int many = 4 * omp_get_num_procs();
  CHECK(region_threads(many).size() == static_cast<size_t>(many));
}
#endif

void exit_while_busy() {
  std::atomic<int> regions{0};
  static std::atomic<int>* counter = &regions;
  std::thread([] {
    for (;;) {
      trmfast::parallel(3, [](int) {});
      if (counter != nullptr) counter->fetch_add(1);
    }
  }).detach();
  while (regions < 50) std::this_thread::yield();
  std::exit(0); // static destructors join the workers while the detached thread keeps running
}

void instruction_sets() {
  const auto targets = trmfast::supported_targets();
  CHECK(!targets.empty() && targets.back() == "portable");
  for (const auto& target : targets) CHECK(trmfast::missing_reason(target) == nullptr);
  for (const char* target : {"amx", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "portable"}) {
    const bool listed = std::find(targets.begin(), targets.end(), target) != targets.end();
    CHECK(listed == (trmfast::missing_reason(target) == nullptr));
    if (listed) std::printf("%s ", target);
  }
  CHECK(trmfast::missing_reason("sse9") != nullptr);
  CHECK((trmfast::missing_reason("amx_emulated") == nullptr) == (trmfast::missing_reason("avx2") == nullptr));
}

const Test kTests[] = {
    {"every_thread_runs_once", every_thread_runs_once},
    {"caller_is_thread_zero", caller_is_thread_zero},
    {"wakes_after_sleep", wakes_after_sleep},
    {"callers_from_many_threads", callers_from_many_threads},
    {"exceptions_reach_the_caller", exceptions_reach_the_caller},
    {"misuse_is_refused", misuse_is_refused},
    {"barrier", barrier},
    {"barrier_oversubscribed", barrier_oversubscribed},
    {"barrier_tells_whether_all_agree", barrier_tells_whether_all_agree},
    {"fork_while_idle", fork_while_idle},
    {"fork_while_busy", fork_while_busy},
    {"affinity_follows_the_caller", affinity_follows_the_caller},
    {"floating_point_mode_follows_the_caller", floating_point_mode_follows_the_caller},
    {"exit_while_busy", exit_while_busy},
    {"instruction_sets", instruction_sets},
#if defined(TRMFAST_TEST_OPENMP)
    {"openmp_lends_its_threads", openmp_lends_its_threads},
    {"openmp_with_too_few_threads", openmp_with_too_few_threads},
#endif
};

} // namespace

int main(int argc, char** argv) {
#if defined(TRMFAST_TEST_OPENMP)
  trmfast::use_openmp({GOMP_parallel, omp_get_num_threads, omp_get_thread_num});
#endif
  return run_test(argc, argv, kTests);
}
