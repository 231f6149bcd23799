// The emulator's own tests: correct kernels under every schedule, and planted bugs that must be reported.
//
//   test_simt list                       the names of the cases
//   test_simt NAME                       runs one; exit status 0 if it passes
//   test_simt mma bf16|fp16              stdin: A [32][4] and B [32][2] registers, D [32][4] fp32; writes D
//   test_simt ldmatrix plain|trans       stdin: 32 rows of 8 elements of 16 bits; writes registers [32][4]
#include "cases.h"
#include "examples.cuh"

#include <random>

using namespace trmfast;
using namespace trmfast::gpu;
using namespace trmfast::simt_test;

namespace {

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

// These bugs only give wrong results: only the comparison finds them.
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
  // A block that never arrives: with a time-out the kernel reports it, without one the emulator does.
  for (const simt::Options& options : schedules(4)) {
    check(run_ring<Ring<true, true>>(3, options) == 1, "the kernel did not notice the time-out");
    expect_error("deadlock", [&options] { run_ring<Ring<true, true>>(3, options, UINT64_MAX); });
  }
  simt::Options alone; // blocks that wait for one that is not resident
  check(run_ring<Ring<>>(3, alone) == 1, "the kernel did not notice that it is alone");
}

// ---- single primitives

void numbers() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) { // every 16-bit number survives the round trip
    const auto half = static_cast<uint16_t>(bits);
    const float b = to_float(bf16{half}), f = to_float(fp16{half});
    check(std::isnan(b) || from_float<bf16>(b).bits == half, "bf16 " + std::to_string(bits));
    check(std::isnan(f) || from_float<fp16>(f).bits == half, "fp16 " + std::to_string(bits));
  }
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) { // between neighbours: round to nearest, ties to even
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
  simt::launch(3, 32, 0, nothing); // and the process continues
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

// Without race detection, some schedule must still expose the bug as a wrong result or unwritten memory.
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

const std::vector<Case> kKernels = {
    {"numbers", numbers},
    {"warp_primitives", warp_primitives},
    {"bad_launches", bad_launches},
    {"gemm_bf16", gemm<bf16>},
    {"gemm_fp16", gemm<fp16>},
    {"gemm_counts", gemm_counts},
    {"softmax", softmax},
    {"ring", ring},
    {"pipeline", pipeline},
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
  std::vector<Case> cases = kKernels;
  cases.insert(cases.end(), kMisuse.begin(), kMisuse.end());
  if (name == "list") {
    for (const Case& one : cases) std::puts(one.name);
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
  for (const Case& one : cases)
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
