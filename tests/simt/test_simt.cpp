// The emulator's own tests: correct kernels under every schedule, and planted bugs that must be reported.
//
//   test_simt list                       the names of the cases
//   test_simt NAME                       runs one; exit status 0 if it passes
//   test_simt mma bf16|fp16              reads A [32][4] and B [32][2] registers and D [32][4] fp32 from stdin, writes
//   D test_simt ldmatrix plain|trans       reads 32 rows of 8 elements of 16 bits from stdin, writes registers [32][4]
#include "examples.cuh"
#include "simt.h"

#include <cstdio>
#include <random>
#include <sstream>

using namespace trmfast;
using namespace trmfast::gpu;

namespace {

// ---- what the cases are made of

void check(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// The launch must be refused with an error that says `what` (or one of several, divided by |) and names a line of
// `file`.
void expect_error(const std::string& what, const std::function<void()>& body,
                  const std::string& file = "examples.cuh:") {
  try {
    body();
  } catch (const simt::Error& error) {
    const std::string text = error.what();
    std::printf("  %s\n", text.c_str());
    std::istringstream alternatives(what);
    std::string one;
    bool found = false;
    while (std::getline(alternatives, one, '|')) found |= text.find(one) != std::string::npos;
    check(found, "the error is not about '" + what + "'");
    check(text.find(file) != std::string::npos, "the error names no line of " + file);
    return;
  }
  throw std::runtime_error("the bug went unnoticed; an error about '" + what + "' was expected");
}

std::vector<simt::Options> schedules(int resident_blocks = 1) {
  std::vector<simt::Options> all(5);
  all[1].order = simt::Order::kReverse;
  for (size_t i = 2; i < all.size(); ++i) {
    all[i].order = simt::Order::kRandom;
    all[i].seed = i;
  }
  for (simt::Options& options : all) options.resident_blocks = resident_blocks;
  return all;
}

template <class T> std::vector<T> small_integers(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values(count);
  for (T& value : values) value = from_float<T>(static_cast<float>(static_cast<int>(random() % 17) - 8));
  return values;
}

// ---- matrix product

struct GemmResult {
  simt::Counters counters;
  simt::GlobalCounters a, b, c;
};

// Operands are small integers, so every order of summation gives the exact product.
template <class Element, Bug kBug = Bug::kNone>
GemmResult run_gemm(int m, int n, int k, const simt::Options& options = {}) {
  using Kernel = Gemm<Element, kBug>;
  const auto a = small_integers<Element>(static_cast<size_t>(m) * static_cast<size_t>(k), 1);
  const auto b = small_integers<Element>(static_cast<size_t>(k) * static_cast<size_t>(n), 2);
  simt::GlobalArray<Element> global_a("a", a), global_b("b", b);
  simt::GlobalArray<float> global_c("c", static_cast<size_t>(m) * static_cast<size_t>(n));
  const typename Kernel::Params p{global_a.pointer(), global_b.pointer(), global_c.pointer(), m, n, k};
  const int blocks = (m / Kernel::kTile) * (n / Kernel::kTile);
  GemmResult result;
  result.counters = simt::launch(blocks, Kernel::kThreads, Kernel::kSharedBytes, [&p] { Kernel::run(p); }, options);
  for (int y = 0; y < m; ++y)
    for (int x = 0; x < n; ++x) {
      double expected = 0;
      for (int i = 0; i < k; ++i)
        expected += static_cast<double>(to_float(a[static_cast<size_t>(y * k + i)])) *
                    static_cast<double>(to_float(b[static_cast<size_t>(i * n + x)]));
      const float got = global_c.data()[y * n + x];
      check(static_cast<double>(got) == expected, "c[" + std::to_string(y) + "][" + std::to_string(x) + "] is " +
                                                      std::to_string(got) + ", expected " + std::to_string(expected));
    }
  result.a = global_a.counters();
  result.b = global_b.counters();
  result.c = global_c.counters();
  return result;
}

template <class Element> void gemm() {
  for (const simt::Options& options : schedules()) run_gemm<Element>(128, 64, 96, options);
  simt::Options truncating;
  truncating.truncate_mma = true;
  run_gemm<Element>(64, 64, 64, truncating);
  simt::Options together;
  together.resident_blocks = 4;
  together.order = simt::Order::kRandom;
  run_gemm<Element>(128, 128, 32, together);
}

void gemm_counts() {
  const int m = 128, n = 128, k = 64;
  const GemmResult r = run_gemm<bf16>(m, n, k);
  const auto is = [](uint64_t got, uint64_t expected, const char* what) {
    check(got == expected, std::string(what) + ": " + std::to_string(got) + ", expected " + std::to_string(expected));
  };
  is(r.counters.mma, m * n * k / 2048, "mma");
  is(r.counters.ldmatrix.count, 4 * 4 * (k / 16) * 4, "ldmatrix"); // 4 blocks, 4 warps, 4 per 16 columns of A
  is(r.counters.ldmatrix.conflicts(), 0, "conflicts of ldmatrix");
  // Eight lanes write two rows of A, 80 bytes apart: the last 16 bytes fall on the banks of the first.
  is(r.counters.cp_async.conflicts(), 4 * (k / 32) * (64 * 32 / 8 / 8), "conflicts of cp.async");
  is(r.a.loaded_bytes, m * k * 2 * (n / 64), "bytes of a");
  is(r.b.loaded_bytes, k * n * 2 * (m / 64), "bytes of b");
  is(r.c.stored_bytes, m * n * 4, "bytes of c");
  is(r.a.loaded_sectors, m * k * 2 * (n / 64) / 32, "sectors of a");
  is(r.c.stored_sectors, m * n * 4 / 32, "sectors of c");
  is(r.counters.barriers, 4 * 2 * (k / 32), "barriers");
}

template <Bug kBug> void gemm_bug(const char* what) {
  for (const simt::Options& options : schedules())
    expect_error(what, [&options] { run_gemm<bf16, kBug>(64, 64, 96, options); });
}

// A wrong result is a result: only the comparison finds it.
template <Bug kBug> void gemm_wrong() {
  try {
    run_gemm<bf16, kBug>(64, 64, 32);
  } catch (const simt::Error&) {
    throw;
  } catch (const std::runtime_error& error) {
    std::printf("  %s\n", error.what());
    return;
  }
  throw std::runtime_error("the product is right in spite of the wrong map");
}

// ---- softmax, group barrier, named barriers

template <class Kernel> void run_softmax(int rows, int columns, const simt::Options& options) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 4);
  std::vector<float> x(static_cast<size_t>(rows) * static_cast<size_t>(columns));
  for (float& value : x) value = normal(random);
  simt::GlobalArray<float> global_x("x", x), y("y", x.size());
  const typename Kernel::Params p{global_x.pointer(), y.pointer(), rows, columns};
  simt::launch((rows + 3) / 4, 128, static_cast<size_t>(16 * columns), [&p] { Kernel::run(p); }, options);
  for (int row = 0; row < rows; ++row) {
    const float* in = &x[static_cast<size_t>(row * columns)];
    double sum = 0;
    for (int i = 0; i < columns; ++i) sum += std::exp(static_cast<double>(in[i]));
    for (int i = 0; i < columns; ++i) {
      const double expected = std::exp(static_cast<double>(in[i])) / sum;
      const double error = std::fabs(static_cast<double>(y.data()[row * columns + i]) - expected);
      check(error <= 4e-6 * expected, "a softmax is wrong by " + std::to_string(error));
    }
  }
}

template <class Kernel> uint32_t run_ring(int rounds, const simt::Options& options, uint64_t timeout_ns = 1000000000) {
  const int blocks = 4, threads = 64;
  const size_t plane = static_cast<size_t>(blocks * threads);
  std::vector<uint32_t> x(2 * plane, 0);
  for (size_t i = 0; i < plane; ++i) x[i] = static_cast<uint32_t>(i * i);
  simt::GlobalArray<uint32_t> global_x("x", x, true), flags("flags", {0, 0}, true);
  const typename Kernel::Params p{global_x.pointer(), flags.pointer(), flags.pointer() + 1, rounds, timeout_ns};
  simt::launch(blocks, threads, 0, [&p] { Kernel::run(p); }, options);
  if (flags.data()[1] != 0) return flags.data()[1];
  for (int round = 0; round < rounds; ++round)
    for (size_t i = 0; i < plane; ++i) {
      const size_t from = static_cast<size_t>(round % 2) * plane, to = plane - from, me = i / threads;
      x[to + i] = x[from + (i + plane - threads) % plane] + static_cast<uint32_t>(me);
    }
  check(global_x.values() == x, "the ring's numbers are wrong");
  return 0;
}

template <class Kernel> void run_pipeline(const simt::Options& options) {
  const int tiles = 7;
  std::vector<uint32_t> x(tiles * 32), expected(32, 0);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<uint32_t>(i * i + 1);
    expected[31 - i % 32] += x[i];
  }
  simt::GlobalArray<uint32_t> global_x("x", x), sum("sum", 32);
  const typename Kernel::Params p{global_x.pointer(), sum.pointer(), tiles};
  simt::launch(1, Kernel::kThreads, 256, [&p] { Kernel::run(p); }, options);
  check(sum.values() == expected, "the pipeline's sum is wrong");
}

void group_barrier_deadlock() {
  // A block that never comes: with a time-out the kernel says so itself, without one the emulator does.
  for (const simt::Options& options : schedules(4)) {
    check(run_ring<Ring<true, true>>(3, options) == 1, "the kernel did not notice the time-out");
    expect_error("deadlock", [&options] { run_ring<Ring<true, true>>(3, options, UINT64_MAX); });
  }
  simt::Options alone; // blocks that wait for one that is not resident
  check(run_ring<Ring<>>(3, alone) == 1, "the kernel did not notice that it is alone");
}

// ---- single bugs in a few lines; the error must name a line of this file

template <class Body> void launch_one(int threads, size_t bytes, const simt::Options& options, const Body& body) {
  simt::launch(1, threads, bytes, body, options);
}

// What happens whatever the schedule is.
template <class Body> void refused(const char* what, int threads, const Body& body) {
  for (const simt::Options& options : schedules())
    expect_error(what, [&] { launch_one(threads, 1024, options, body); }, "test_simt.cpp:");
}

void divergence() {
  refused("divergent", 32, [] {
    if (lane_index() < 7)
      shuffle_xor(1.0f, 1);
    else
      shuffle_xor(2.0f, 1);
  });
  refused("divergent", 64, [] {
    if (thread_index() == 40)
      sync_warp();
    else
      block_sync();
  });
  refused("has returned", 32, [] {
    if (lane_index() != 9) warp_sum(1.0f);
  });
  refused("other warps are at another one", 64, [] {
    if (warp_index() == 0)
      block_sync();
    else
      block_sync();
  });
  refused("deadlock: 32 threads of block 0: returned; 32 threads of block 0: waits at the block's barrier", 64, [] {
    if (warp_index() == 0) block_sync();
  });
}

void named_barrier_misuse() {
  refused("of 1 to 15", 32, [] { named_barrier_sync(16, 32); });
  refused("a barrier of 48 threads", 64, [] { named_barrier_sync(1, 48); });
  refused("threads, but of|deadlock", 96, [] { named_barrier_sync(1, warp_index() == 0 ? 96 : 64); });
  refused("arrives twice", 64, [] {
    if (warp_index() == 0) {
      named_barrier_arrive(1, 64);
      named_barrier_arrive(1, 64);
    }
  });
  refused("arrivals left", 64, [] {
    if (warp_index() == 0) named_barrier_arrive(1, 64);
  });
}

void shared_memory_misuse() {
  const auto mine = [] { return shared_memory<float>() + thread_index(); };
  refused("out of bounds", 32, [] { store(shared_memory<float>(1024), 0.0f); });
  refused("out of bounds", 32, [] { store(shared_memory<float>() - 1, 0.0f); });
  refused("misaligned", 32, [] { store(shared_memory<float>(2), 0.0f); });
  refused("misaligned", 32, [] { load(shared_memory<U32x4>(8)); });
  refused("nobody has written", 32, [&] { load(mine()); });
  refused("nobody has written", 32, [&] { // the second half of 8 bytes
    store(mine() + thread_index(), 1.0f);
    load((mine() + thread_index()).as<F32x2>());
  });
  refused("race: writes what", 32, [] { store(shared_memory<float>(), 1.0f); });
  refused("race|nobody has written", 64, [] { // read after write without a barrier
    store(shared_memory<float>() + thread_index(), 1.0f);
    load(shared_memory<float>() + (thread_index() ^ 32));
  });
  refused("race", 32, [] { // sync_warp is needed within a warp as well; a shuffle does not replace it
    store(shared_memory<float>() + thread_index(), 1.0f);
    shuffle_xor(1.0f, 1);
    load(shared_memory<float>() + (thread_index() ^ 1));
  });
  refused("race", 64, [] { // write after read
    store(shared_memory<float>() + thread_index(), 1.0f);
    block_sync();
    load(shared_memory<float>() + (thread_index() ^ 32));
    store(shared_memory<float>() + thread_index(), 2.0f);
  });
  refused("race|nobody has written", 64, [] { // ordered for the warps of the barrier alone
    store(shared_memory<float>() + thread_index(), 1.0f);
    named_barrier_sync(1 + warp_index(), 32);
    load(shared_memory<float>() + (thread_index() ^ 32));
  });
  for (const simt::Options& options : schedules())
    launch_one(64, 1024, options, [] { // halves of a word belong to different threads
      store(shared_memory<bf16>() + thread_index(), bf16{1});
      block_sync();
      check(load(shared_memory<bf16>() + (thread_index() ^ 33)).bits == 1, "a value is lost");
      block_sync();
      store(shared_memory<bf16>() + (thread_index() ^ 1), bf16{2});
      sync_warp();
      check(load(shared_memory<bf16>() + (thread_index() ^ 3)).bits == 2, "a value is lost");
    });
  simt::Options unchecked;
  unchecked.check_unwritten = unchecked.check_races = false;
  launch_one(32, 1024, unchecked, [] { check(std::isnan(load(shared_memory<float>())), "memory is not poisoned"); });
}

void global_memory_misuse() {
  simt::GlobalArray<float> input("input", std::vector<float>(32, 1.0f)), output("output", 32);
  simt::GlobalArray<uint32_t> flag("flag", 1);
  const GlobalPtr<float> in = input.pointer(), out = output.pointer();
  refused("128 bytes)", 32, [in] { load(in + thread_index() + 1); });
  refused("out of bounds: 16 bytes at byte -16 of input", 32, [in] { load((in - 4).as<F32x4>()); });
  refused("lies in no buffer", 32, [] { load(GlobalPtr<float>{nullptr}); });
  refused("misaligned", 32, [in] { load((in + 1).as<F32x2>()); });
  refused("writes read-only memory: byte 0 of input", 32, [in] { store(in, 1.0f); });
  refused("nobody has written: output", 32, [out] { load(out); });
  refused("load_nc reads what the same launch writes", 32, [out] {
    store(out + thread_index(), 1.0f);
    load_nc(out + thread_index());
  });
  refused("a flag that nobody has set", 32, [&flag] { atomic_add(flag.pointer(), 1u); });
  for (const simt::Options& options : schedules())
    expect_error(
        "race", [&] { simt::launch(2, 32, 0, [out] { store(out + thread_index(), 1.0f); }, options); },
        "test_simt.cpp:");
}

void async_copy_misuse() {
  simt::GlobalArray<float> input("input", std::vector<float>(128, 1.0f), true);
  const GlobalPtr<float> in = input.pointer();
  const auto to = [] { return shared_memory<float>() + 4 * thread_index(); };
  const auto from = [in] { return in + 4 * thread_index(); };
  refused("misaligned", 32, [&] { cp_async_16(to() + 1, from()); });
  refused("misaligned", 32, [&] { cp_async_16(to(), in + 1); });
  refused("out of bounds", 64, [&] { cp_async_16(to() + 4 * 32, from() + 4 * 32); });
  refused("returns without waiting", 32, [&] {
    cp_async_16(to(), from());
    cp_async_commit();
  });
  refused("not waited for", 32, [&] {
    cp_async_16(to(), from());
    cp_async_commit();
    load(to());
  });
  refused("not waited for", 32, [&] { // not committed
    cp_async_16(to(), from());
    cp_async_wait<0>();
    load(to());
  });
  refused("race|not waited for|nobody has written", 32, [&] { // no barrier after the wait
    cp_async_16(to(), from());
    cp_async_commit();
    cp_async_wait<0>();
    load(shared_memory<float>() + 4 * (thread_index() ^ 1));
  });
  refused("has changed while it was in flight", 32, [&] {
    cp_async_16(to(), from());
    cp_async_commit();
    sync_warp();
    if (lane_index() == 3) store(from(), load(from()) + 1.0f);
    sync_warp();
    cp_async_wait<0>();
  });
  for (const simt::Options& options : schedules())
    launch_one(32, 1024, options, [&] { // zeros, wherever the source points; the older of two groups
      cp_async_16(to(), GlobalPtr<float>{nullptr}, false);
      cp_async_commit();
      cp_async_16(to() + 128, from());
      cp_async_commit();
      cp_async_wait<1>();
      check(load(to().as<F32x4>()).v[3] == 0.0f, "no zeros");
      cp_async_wait<0>();
    });
}

void ldmatrix_misuse() {
  refused("misaligned", 32, [] {
    uint32_t r[1];
    ldmatrix_x1(r, shared_memory<bf16>(16 * lane_index() + 2));
  });
  refused("nobody has written", 32, [] {
    uint32_t r[2];
    ldmatrix_x2(r, shared_memory<bf16>(16 * lane_index()));
  });
  refused("race", 32, [] {
    store(shared_memory<U32x4>() + lane_index(), U32x4{});
    uint32_t r[4];
    ldmatrix_x4(r, shared_memory<bf16>(16 * lane_index()));
  });
}

void bank_conflicts() {
  const auto conflicts = [](const std::function<void()>& body) {
    simt::Options options;
    options.check_unwritten = options.check_races = false;
    return simt::launch(1, 32, 16384, body, options);
  };
  const auto column = [](int stride_bytes) {
    return [stride_bytes] {
      uint32_t r[4];
      ldmatrix_x4(r, shared_memory<bf16>(stride_bytes * lane_index()));
    };
  };
  check(conflicts(column(16)).ldmatrix.conflicts() == 0, "rows side by side");
  check(conflicts(column(128 + 16)).ldmatrix.conflicts() == 0, "padded rows");
  check(conflicts(column(64)).ldmatrix.wavefronts == 4 * 4, "rows of 64 bytes: four share a bank");
  check(conflicts(column(128)).ldmatrix.wavefronts == 4 * 8, "rows of 128 bytes: all share a bank");
  check(conflicts(column(0)).ldmatrix.conflicts() == 0, "one row for all");
  const auto strided = [](int stride) { return [stride] { load(shared_memory<float>() + stride * lane_index()); }; };
  check(conflicts(strided(1)).shared_load.conflicts() == 0, "neighbours");
  check(conflicts(strided(2)).shared_load.wavefronts == 2, "every other word");
  check(conflicts(strided(33)).shared_load.conflicts() == 0, "an odd stride");
  check(conflicts(strided(32)).shared_load.wavefronts == 32, "one bank");
  const simt::Counters wide = conflicts([] { store(shared_memory<U32x4>() + lane_index(), U32x4{}); });
  check(wide.shared_store.wavefronts == 4 && wide.shared_store.ideal == 4, "16 bytes a lane");
  const simt::Counters divided = conflicts([] { // half the lanes, the other half at another line
    if (lane_index() % 2 == 0)
      load(shared_memory<float>() + 32 * lane_index());
    else
      load(shared_memory<float>() + lane_index());
  });
  check(divided.shared_load.count == 2 && divided.shared_load.wavefronts == 17, "two accesses of 16 lanes");
  check(divided.lines.size() == 2, "two lines");
}

// ---- primitives one by one

void numbers() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) { // every number of 16 bits survives the way there and back
    const auto half = static_cast<uint16_t>(bits);
    const float b = to_float(bf16{half}), f = to_float(fp16{half});
    check(std::isnan(b) || from_float<bf16>(b).bits == half, "bf16 " + std::to_string(bits));
    check(std::isnan(f) || from_float<fp16>(f).bits == half, "fp16 " + std::to_string(bits));
  }
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) { // between neighbours: to the nearer, ties to even
    const float low = to_float(fp16{static_cast<uint16_t>(bits)}),
                high = to_float(fp16{static_cast<uint16_t>(bits + 1)});
    const float middle = (low + high) / 2;
    check(from_float<fp16>(middle).bits == bits + bits % 2, "a tie of fp16");
    check(from_float<fp16>(std::nextafter(middle, low)).bits == bits, "below a tie of fp16");
    check(from_float<fp16>(std::nextafter(middle, high)).bits == bits + 1, "above a tie of fp16");
  }
  check(from_float<bf16>(1.00390625f).bits == 0x3f80 && from_float<bf16>(1.01171875f).bits == 0x3f82, "ties of bf16");
  check(to_float(fp16{0x3555}) == 0.333251953125f && to_float(fp16{0xfbff}) == -65504.0f, "fp16");
  check(to_float(fp16{1}) == 0x1p-24f && std::isinf(to_float(fp16{0x7c00})), "fp16 at the ends");
  check(from_float<fp16>(65519.0f).bits == 0x7bff && from_float<fp16>(65520.0f).bits == 0x7c00, "overflow");
  check(from_float<fp16>(NAN).bits == 0x7fff && from_float<bf16>(NAN).bits == 0x7fff, "NaN");
  check(pack<bf16>(1.0f, -2.0f) == 0xc0003f80u && unpack<bf16>(0xc0003f80u).v[1] == -2.0f, "pack");
  check(fast_exp2(-0.5f) == std::exp2(-0.5f) && fast_exp2(-140.0f) == 0.0f && fast_exp2(-INFINITY) == 0.0f, "exp2");
}

void warp_primitives() {
  for (const simt::Options& options : schedules()) {
    const simt::Counters counters = simt::launch(
        2, 64, 0,
        [] {
          const int lane = lane_index();
          check(shuffle(lane, (lane + 5) % 32) == (lane + 5) % 32, "shuffle");
          check(shuffle_xor(static_cast<float>(lane), 9) == static_cast<float>(lane ^ 9), "shuffle_xor");
          check(warp_sum(static_cast<float>(lane)) == 496.0f && warp_max(static_cast<float>(lane)) == 31.0f,
                "reductions");
          check(lanes_sum<4>(1.0f) == 4.0f && lanes_max<4>(static_cast<float>(lane)) == static_cast<float>(lane | 3),
                "quads");
          check(warp_any(lane == 3) && !warp_any(false) && warp_all(true) && !warp_all(lane != 3), "votes");
          check(block_any(thread_index() == 33) && !block_any(false), "block_any");
          check(block_all(true) && !block_all(thread_index() != 33), "block_all");
          check(thread_count() == 64 && block_count() == 2 && thread_index() == 32 * warp_index() + lane, "indices");
        },
        options);
    check(counters.barriers == 2 * 4 && counters.shuffles == 2 * 2 * (2 + 10 + 4), "counts");
  }
}

void bad_launches() {
  const auto nothing = [] {};
  expect_error("blocks of 48 threads", [&] { simt::launch(1, 48, 0, nothing); }, "");
  expect_error("blocks of 2048 threads", [&] { simt::launch(1, 2048, 0, nothing); }, "");
  expect_error("a grid of 0 blocks", [&] { simt::launch(0, 32, 0, nothing); }, "");
  expect_error(
      "a launch within a launch", [&] { simt::launch(1, 32, 0, [&] { simt::launch(1, 32, 0, nothing); }); }, "");
  simt::launch(3, 32, 0, nothing); // and the process goes on
}

void softmax() {
  for (const simt::Options& options : schedules()) run_softmax<Softmax<>>(9, 97, options);
}

void ring() {
  for (const simt::Options& options : schedules(4)) run_ring<Ring<>>(6, options);
}

void pipeline() {
  for (const simt::Options& options : schedules()) run_pipeline<Pipeline<>>(options);
}

void missing_sync_warp() {
  for (const simt::Options& options : schedules())
    expect_error("race", [&] { run_softmax<Softmax<false>>(4, 97, options); });
}

// Without the detection of races, some schedule must still show the bug as a wrong result or as unwritten memory.
void schedules_find_missing_barriers() {
  const auto found = [](const std::function<void(const simt::Options&)>& body, int resident_blocks) {
    for (simt::Options options : schedules(resident_blocks)) {
      options.check_races = false;
      try {
        body(options);
      } catch (const std::runtime_error& error) {
        std::printf("  %s\n", error.what());
        return true;
      }
    }
    return false;
  };
  const auto exchange = [](const simt::Options& options) {
    simt::launch(
        1, 32, 128,
        [] {
          store(shared_memory<int>() + lane_index(), lane_index());
          check(load(shared_memory<int>() + lane_index() / 2) == lane_index() / 2, "a value is lost");
        },
        options);
  };
  check(found(exchange, 1), "sync_warp");
  check(found([](const simt::Options& o) { run_ring<Ring<false>>(6, o); }, 4), "group barrier");
  check(found([](const simt::Options& o) { run_gemm<bf16, Bug::kMissingBarrier>(64, 64, 96, o); }, 1), "block_sync");
  check(found([](const simt::Options& o) { run_pipeline<Pipeline<false>>(o); }, 1), "named barrier");
}

void divergent_shuffle() {
  for (const simt::Options& options : schedules())
    expect_error("divergent", [&] { run_softmax<Softmax<true, true>>(4, 97, options); });
}

void missing_group_barrier() {
  for (const simt::Options& options : schedules(4)) expect_error("race", [&] { run_ring<Ring<false>>(6, options); });
}

void missing_named_barrier() {
  for (const simt::Options& options : schedules())
    expect_error("race: writes what|arrives twice", [&] { run_pipeline<Pipeline<false>>(options); });
}

struct Case {
  const char* name;
  void (*run)();
};

const Case kCases[] = {
    {"numbers", numbers},
    {"warp_primitives", warp_primitives},
    {"bad_launches", bad_launches},
    {"gemm_bf16", gemm<bf16>},
    {"gemm_fp16", gemm<fp16>},
    {"gemm_counts", gemm_counts},
    {"softmax", softmax},
    {"ring", ring},
    {"pipeline", pipeline},
    {"bank_conflicts", bank_conflicts},
    {"missing_barrier", [] { gemm_bug<Bug::kMissingBarrier>("race|not waited for"); }},
    {"missing_wait", [] { gemm_bug<Bug::kMissingWait>("not waited for"); }},
    {"missing_commit", [] { gemm_bug<Bug::kMissingCommit>("not waited for"); }},
    {"wait_for_too_few", [] { gemm_bug<Bug::kWaitForTooFew>("not waited for"); }},
    {"out_of_bounds", [] { gemm_bug<Bug::kOutOfBounds>("out of bounds"); }},
    {"out_of_bounds_shared", [] { gemm_bug<Bug::kOutOfBoundsShared>("out of bounds"); }},
    {"misaligned", [] { gemm_bug<Bug::kMisaligned>("misaligned"); }},
    {"wrong_lane_map", gemm_wrong<Bug::kWrongLaneMap>},
    {"wrong_fragment", gemm_wrong<Bug::kWrongFragment>},
    {"missing_sync_warp", missing_sync_warp},
    {"missing_group_barrier", missing_group_barrier},
    {"missing_named_barrier", missing_named_barrier},
    {"divergent_shuffle", divergent_shuffle},
    {"group_barrier_deadlock", group_barrier_deadlock},
    {"schedules_find_missing_barriers", schedules_find_missing_barriers},
    {"divergence", divergence},
    {"named_barrier_misuse", named_barrier_misuse},
    {"shared_memory_misuse", shared_memory_misuse},
    {"global_memory_misuse", global_memory_misuse},
    {"async_copy_misuse", async_copy_misuse},
    {"ldmatrix_misuse", ldmatrix_misuse},
};

// ---- one instruction on the operands from stdin

template <class T> void read_all(T* data, size_t count) {
  check(std::fread(data, sizeof(T), count, stdin) == count, "too little on stdin");
}

template <class Element> void mma_of_stdin() {
  uint32_t a[32][4], b[32][2];
  float d[32][4];
  read_all(&a[0][0], 128);
  read_all(&b[0][0], 64);
  read_all(&d[0][0], 128);
  simt::launch(1, 32, 0, [&] {
    const int lane = lane_index();
    mma_m16n8k16<Element>(d[lane], a[lane], b[lane][0], b[lane][1]);
  });
  std::fwrite(d, sizeof d, 1, stdout);
}

void ldmatrix_of_stdin(bool transposed) {
  U32x4 rows[32];
  uint32_t r[32][4];
  read_all(rows, 32);
  simt::launch(1, 32, sizeof rows, [&] {
    const int lane = lane_index();
    store(shared_memory<U32x4>() + lane, rows[lane]);
    sync_warp();
    const auto row = shared_memory<bf16>(16 * lane);
    if (transposed)
      ldmatrix_x4_trans(r[lane], row);
    else
      ldmatrix_x4(r[lane], row);
  });
  std::fwrite(r, sizeof r, 1, stdout);
}

int run(const std::string& name, const std::string& argument) {
  if (name == "list") {
    for (const Case& one : kCases) std::puts(one.name);
    return 0;
  }
  if (name == "mma") {
    argument == "bf16" ? mma_of_stdin<bf16>() : mma_of_stdin<fp16>();
    return 0;
  }
  if (name == "ldmatrix") {
    ldmatrix_of_stdin(argument == "trans");
    return 0;
  }
  for (const Case& one : kCases)
    if (name == one.name) {
      one.run();
      std::printf("%s: passed\n", one.name);
      return 0;
    }
  std::fprintf(stderr, "no case named %s\n", name.c_str());
  return 2;
}

} // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? argv[1] : "", argc > 2 ? argv[2] : "");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
