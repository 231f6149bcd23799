// Scheduling, barriers and launches.
#include "machine.h"

#include <algorithm>

namespace trmfast {
namespace simt {

Machine* machine = nullptr;

namespace {

constexpr uint64_t kFirstLeap = 1000, kLongestLeap = 10ull * 1000 * 1000 * 1000; // ns
constexpr uint64_t kDeadlock = 100 * kLongestLeap;
constexpr size_t kMostClocks = 4096;

StackPool stacks;
uint64_t launches = 0;
uint32_t threads_launched = 2; // numbers below are Buffer::kNobody and kHost

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

int lowest(uint32_t mask) { return __builtin_ctz(mask); }
int highest(uint32_t mask) { return 31 - __builtin_clz(mask); }

} // namespace

const char* name_of(Operation operation) {
  switch (operation) {
  case Operation::kNone:
    return "nothing";
  case Operation::kSyncWarp:
    return "sync_warp";
  case Operation::kShuffle:
    return "shuffle";
  case Operation::kVote:
    return "a warp vote";
  case Operation::kLdmatrix:
    return "ldmatrix";
  case Operation::kMma:
    return "mma";
  case Operation::kBlockBarrier:
    return "the block's barrier";
  case Operation::kNamedSync:
    return "named_barrier_sync";
  case Operation::kNamedArrive:
    return "named_barrier_arrive";
  }
  return "";
}

void join(Clocks& into, const Clocks& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

Machine::Machine(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel,
                 const Options& options)
    : blocks_(blocks), threads_(threads), warps_(threads / kLanes), shared_bytes_(shared_bytes), kernel_(kernel),
      options_(options), across_blocks_(static_cast<size_t>(blocks) * static_cast<size_t>(warps_) <= kMostClocks),
      random_state_(options.seed * 2 + 1), first_thread_(threads_launched), launch_(++launches) {
  for (int i = blocks; i-- > 0;) to_start_.push_back(i);
  if (options.order == Order::kReverse) std::reverse(to_start_.begin(), to_start_.end());
  if (options.order == Order::kRandom)
    for (size_t i = to_start_.size(); i > 1; --i) std::swap(to_start_[i - 1], to_start_[random() % i]);
  threads_launched += static_cast<uint32_t>(blocks) * static_cast<uint32_t>(threads);
}

Machine::~Machine() {
  while (!resident_.empty()) end_block(0);
}

uint64_t Machine::random() { // splitmix64
  uint64_t z = random_state_ += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

void Machine::fail(const Thread& thread, Site site, const std::string& what) const {
  throw Error(site.text() + ": block " + std::to_string(thread.block->index) + " warp " +
              std::to_string(thread.warp->index) + " lane " + std::to_string(thread.lane) + ": " + what);
}

// ---- blocks and launches

void Machine::start_block(int index) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->live = threads_;
  block->shared.assign(shared_bytes_, static_cast<char>(0xff));
  block->cells.resize((shared_bytes_ + 1) / 2);
  if (options_.check_races) block->readers.assign(block->cells.size() * static_cast<size_t>(warps_), 0);
  block->threads = std::vector<Thread>(static_cast<size_t>(threads_));
  block->warps.resize(static_cast<size_t>(warps_));
  for (int w = 0; w < warps_; ++w) {
    Warp& warp = block->warps[static_cast<size_t>(w)];
    warp.block = block.get();
    warp.index = w;
    warp.grid_index = across_blocks_ ? index * warps_ + w : w;
    warp.threads = &block->threads[static_cast<size_t>(w * kLanes)];
    warp.clocks.assign(static_cast<size_t>(across_blocks_ ? blocks_ * warps_ : warps_), 0);
    warp.advance();
  }
  for (int t = 0; t < threads_; ++t) {
    Thread& thread = block->threads[static_cast<size_t>(t)];
    thread.block = block.get();
    thread.warp = &block->warps[static_cast<size_t>(t / kLanes)];
    thread.index = t;
    thread.lane = t % kLanes;
    thread.stack = stacks.take();
    thread.fiber.prepare(thread.stack, StackPool::usable_bytes(thread.stack), &Machine::entry);
  }
  const auto place = std::find_if(resident_.begin(), resident_.end(),
                                  [index](const std::unique_ptr<Block>& other) { return other->index > index; });
  resident_.insert(place, std::move(block));
}

void Machine::end_block(size_t resident) {
  for (Thread& thread : resident_[resident]->threads) stacks.give_back(thread.stack);
  resident_.erase(resident_.begin() + static_cast<std::ptrdiff_t>(resident));
}

Counters Machine::run() {
  while (!to_start_.empty() || !resident_.empty()) {
    while (!to_start_.empty() && resident_.size() < static_cast<size_t>(options_.resident_blocks)) {
      start_block(to_start_.back());
      to_start_.pop_back();
    }
    warp_ = nullptr;
    finished_ = nullptr;
    current_ = next();
    Fiber::switch_to(main_, current_->fiber); // until a block has ended, or a failure
    if (exception_) std::rethrow_exception(exception_);
    if (finished_ == nullptr) throw Error(failure_);
    for (size_t i = 0; i < resident_.size(); ++i)
      if (resident_[i].get() == finished_) {
        end_block(i);
        break;
      }
  }
  for (const auto& [line, accesses] : lines_) {
    const Site site{line.first, line.second};
    counters_.lines[site.text()].add(accesses.count, accesses.wavefronts, accesses.ideal);
  }
  return counters_;
}

void Machine::entry() {
  Fiber::entered();
  Machine& m = *machine;
  try {
    m.kernel_();
    m.finish_thread();
  } catch (const Error& error) {
    m.failure_ = error.what();
  } catch (...) {
    m.exception_ = std::current_exception();
  }
  Fiber::switch_to(m.current_->fiber, m.main_);
  std::abort(); // a returned thread is never resumed
}

void Machine::finish_thread() {
  Thread& thread = *current_;
  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  ++progress_;
  if (!thread.copies.empty())
    fail(thread, thread.copies.front().site, "the kernel returns without waiting for this copy");
  if (warp.arrived != 0) {
    const Thread& other = warp.threads[lowest(warp.arrived)];
    fail(other, other.site,
         std::string("waits at ") + name_of(other.waiting) + ", but lane " + std::to_string(thread.lane) +
             " has returned");
  }
  warp.ready &= ~(1u << thread.lane);
  warp.returned |= 1u << thread.lane;
  if (warp.returned == kAllLanes) flush_log(warp);
  if (--block.live > 0) {
    pass_on();
    return;
  }
  for (int id = 0; id < kNamedBarriers; ++id)
    if (block.barriers[id].arrived != 0)
      fail(thread, block.barriers[id].site, "the block returns with arrivals left at barrier " + std::to_string(id));
  finished_ = &block;
}

// ---- scheduling

void Machine::pass_on() {
  Thread* const from = current_;
  Thread* const to = next();
  if (to == from) return;
  current_ = to;
  Fiber::switch_to(from->fiber, to->fiber);
}

Thread* Machine::next() {
  Warp* warp = warp_;
  if (warp == nullptr || (warp->ready & ~warp->spinning) == 0) warp = choose_warp();
  warp_ = warp;
  const uint32_t lanes = warp->ready & ~warp->spinning;
  int lane = 0;
  switch (options_.order) {
  case Order::kForward:
    lane = lowest(lanes);
    break;
  case Order::kReverse:
    lane = highest(lanes);
    break;
  case Order::kRandom: {
    uint32_t rest = lanes;
    for (uint64_t skip = random() % static_cast<uint64_t>(__builtin_popcount(lanes)); skip > 0; --skip)
      rest &= rest - 1;
    lane = lowest(rest);
  }
  }
  return &warp->threads[lane];
}

Warp* Machine::choose_warp() {
  for (;;) {
    Warp* chosen = nullptr;
    uint64_t candidates = 0;
    bool somebody_spins = false;
    for (const auto& block : resident_)
      for (Warp& warp : block->warps) {
        somebody_spins |= warp.spinning != 0;
        if ((warp.ready & ~warp.spinning) == 0) continue;
        ++candidates;
        if (options_.order == Order::kForward && candidates > 1) continue;
        if (options_.order == Order::kRandom && random() % candidates != 0) continue;
        chosen = &warp;
      }
    if (chosen != nullptr) return chosen;
    // Only spinning threads are left. If nothing has happened since they last ran, only time-outs can.
    if (progress_ != progress_at_idle_) {
      leap_ = kFirstLeap;
      idle_since_ = time_;
    } else {
      time_ += leap_;
      leap_ = std::min(2 * leap_, kLongestLeap);
    }
    if (!somebody_spins || time_ - idle_since_ > kDeadlock) {
      const bool more = !to_start_.empty();
      throw Error("deadlock: " + who_waits_where() +
                  (more ? "; blocks that were not resident have not started (Options::resident_blocks)" : ""));
    }
    progress_at_idle_ = progress_;
    for (const auto& block : resident_)
      for (Warp& warp : block->warps) warp.spinning = 0;
  }
}

std::string Machine::who_waits_where() const {
  std::map<std::string, int> places;
  for (const auto& block : resident_)
    for (const Warp& warp : block->warps)
      for (int lane = 0; lane < kLanes; ++lane) {
        const Thread& thread = warp.threads[lane];
        const uint32_t bit = 1u << lane;
        std::string place = "block " + std::to_string(block->index) + ": ";
        if (warp.returned & bit)
          place += "returned";
        else if (warp.ready & bit)
          place += "spins at " + thread.site.text();
        else
          place += std::string("waits at ") + name_of(thread.waiting) + ", " + thread.site.text();
        ++places[place];
      }
  std::string text;
  for (const auto& [place, threads] : places) {
    if (!text.empty()) text += "; ";
    text += std::to_string(threads) + " threads of " + place;
  }
  return text;
}

void Machine::spin() {
  current_->warp->spinning |= 1u << current_->lane;
  pass_on();
}

// ---- warps and barriers

void Machine::collective(Operation operation, void* arguments, Site site) {
  Thread& thread = *current_;
  Warp& warp = *thread.warp;
  ++progress_;
  if (warp.arrived != 0) {
    const Thread& other = warp.threads[lowest(warp.arrived)];
    if (other.waiting != operation || !same(other.site, site))
      fail(thread, site,
           std::string("divergent: at ") + name_of(operation) + ", while lane " + std::to_string(other.lane) +
               " is at " + name_of(other.waiting) + ", " + other.site.text());
  }
  if (warp.returned != 0)
    fail(thread, site,
         std::string("waits at ") + name_of(operation) + ", but lane " + std::to_string(lowest(warp.returned)) +
             " has returned");
  thread.waiting = operation;
  thread.site = site;
  thread.arguments = arguments;
  warp.arrived |= 1u << thread.lane;
  warp.ready &= ~(1u << thread.lane);
  if (warp.arrived == kAllLanes) {
    warp.arrived = 0;
    warp.ready = kAllLanes;
    if (warp.logged) flush_log(warp);
    execute(warp, operation, site);
    if (options_.order == Order::kRandom && random() % 8 == 0) warp_ = nullptr;
  }
  pass_on();
}

void Machine::arrive(Warp& warp, Operation operation, Site site) {
  const Thread& thread = warp.threads[0];
  const BarrierArguments& arguments = *static_cast<BarrierArguments*>(thread.arguments);
  const bool is_block = operation == Operation::kBlockBarrier, waits = operation != Operation::kNamedArrive;
  const int id = arguments.id, threads = arguments.threads;
  if (!is_block && (id < 1 || id >= kNamedBarriers))
    fail(thread, site, "barrier " + std::to_string(id) + " of 1 to 15");
  if (threads <= 0 || threads % kLanes != 0 || threads > threads_)
    fail(thread, site,
         "a barrier of " + std::to_string(threads) + " threads in a block of " + std::to_string(threads_));
  Block& block = *warp.block;
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived == 0) {
    barrier.threads = threads;
    barrier.site = site;
    std::fill(barrier.clocks.begin(), barrier.clocks.end(), 0);
  } else if (barrier.threads != threads) {
    fail(thread, site,
         "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads, but of " +
             std::to_string(barrier.threads) + " at " + barrier.site.text());
  } else if (is_block && !same(barrier.site, site)) {
    fail(thread, site, "at the block's barrier, while other warps are at another one, " + barrier.site.text());
  }
  const uint32_t bit = 1u << warp.index;
  if (barrier.participants & bit) fail(thread, site, "arrives twice at barrier " + std::to_string(id));
  barrier.participants |= bit;
  barrier.arrived += kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool vote = static_cast<BarrierArguments*>(warp.threads[lane].arguments)->vote;
    barrier.any |= vote;
    barrier.all &= vote;
  }
  join(barrier.clocks, warp.clocks);
  warp.advance();
  if (waits) {
    barrier.waiting |= bit;
    warp.ready = 0;
  }
  if (barrier.arrived < barrier.threads) return;
  if (barrier.arrived > barrier.threads)
    fail(thread, site,
         "more than " + std::to_string(barrier.threads) + " threads arrive at barrier " + std::to_string(id));
  ++counters_.barriers;
  for (Warp& other : block.warps) {
    if ((barrier.waiting & (1u << other.index)) == 0) continue;
    join(other.clocks, barrier.clocks);
    other.ready = kAllLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      auto& result = *static_cast<BarrierArguments*>(other.threads[lane].arguments);
      result.any = barrier.any;
      result.all = barrier.all;
    }
  }
  Clocks clocks = std::move(barrier.clocks);
  barrier = Barrier{};
  barrier.clocks = std::move(clocks);
}

void Machine::acquire(const void* flag) {
  const auto found = flags_.find(flag);
  if (found != flags_.end() && across_blocks_) join(current_->warp->clocks, found->second);
}

void Machine::release(const void* flag, bool adds) {
  ++progress_;
  Warp& warp = *current_->warp;
  if (!across_blocks_) return;
  Clocks& clocks = flags_[flag];
  if (!adds) clocks.clear();
  join(clocks, warp.clocks);
  warp.advance();
}

Counters launch(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel,
                const Options& options) {
  if (machine != nullptr) throw Error("a launch within a launch");
  if (blocks < 1) throw Error("a grid of " + std::to_string(blocks) + " blocks");
  if (threads < kLanes || threads > 1024 || threads % kLanes != 0)
    throw Error("blocks of " + std::to_string(threads) + " threads: a multiple of 32 up to 1024 is accepted");
  if (options.resident_blocks < 1) throw Error("no resident blocks");
  Machine m(blocks, threads, shared_bytes, kernel, options);
  struct Current { // also when run() throws
    explicit Current(Machine* m) { machine = m; }
    ~Current() { machine = nullptr; }
  } current(&m);
  return m.run();
}

} // namespace simt
} // namespace trmfast
