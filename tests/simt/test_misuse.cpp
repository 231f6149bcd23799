// Misuse of single primitives in a few lines each, and the counting of bank conflicts.
#include "cases.h"

using namespace trmfast;
using namespace trmfast::gpu;
using namespace trmfast::simt_test;

namespace {

template <class Body> void launch_one(int threads, size_t bytes, const simt::Options& options, const Body& body) {
  simt::launch(1, threads, bytes, body, options);
}

// Reported under every schedule.
template <class Body> void refused(const char* what, int threads, const Body& body) {
  for (const simt::Options& options : schedules())
    expect_error(what, [&] { launch_one(threads, 1024, options, body); }, "test_misuse.cpp:");
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
        "test_misuse.cpp:");
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

} // namespace

const std::vector<Case> simt_test::kMisuse = {
    {"divergence", divergence},
    {"named_barrier_misuse", named_barrier_misuse},
    {"shared_memory_misuse", shared_memory_misuse},
    {"global_memory_misuse", global_memory_misuse},
    {"async_copy_misuse", async_copy_misuse},
    {"ldmatrix_misuse", ldmatrix_misuse},
    {"bank_conflicts", bank_conflicts},
};
