// The scheduler: starts blocks, runs warps until they wait, lets barriers pass, and says where a fault happened.
#include "machine.h"

#include <algorithm>

namespace trmfast {
namespace ptx {
namespace {

constexpr uint64_t kTurn = 1 << 14; // the most operations that a warp executes while others could run

class Machine {
public:
  Machine(const Program& program, const Launch& launch, const Options& options)
      : program_(program), launch_(launch), options_(options), random_(options.seed) {
    if (launch.threads == 0 || launch.threads % kLanes != 0 || launch.threads > 1024)
      throw Fault("threads: got " + std::to_string(launch.threads) + ", accepted are multiples of 32 up to 1024");
    if (program.required_threads != 0 && program.required_threads != launch.threads)
      throw Fault("threads: got " + std::to_string(launch.threads) + ", the kernel requires " +
                  std::to_string(program.required_threads));
    if (launch.param_bytes != program.param_bytes)
      throw Fault("parameters: got " + std::to_string(launch.param_bytes) + " bytes, the kernel takes " +
                  std::to_string(program.param_bytes));
  }

  Counts run() {
    const uint32_t blocks = launch_.grid[0] * launch_.grid[1] * launch_.grid[2];
    std::vector<uint32_t> order(blocks);
    for (uint32_t i = 0; i < blocks; ++i) order[i] = options_.order == Order::reverse ? blocks - 1 - i : i;
    if (options_.order == Order::random) std::shuffle(order.begin(), order.end(), random_);
    size_t next = 0;
    while (next < order.size() || !blocks_.empty()) {
      while (next < order.size() && blocks_.size() < options_.resident_blocks) start(order[next++]);
      turn();
      blocks_.erase(std::remove_if(blocks_.begin(), blocks_.end(), [](const auto& b) { return finished(*b); }),
                    blocks_.end());
    }
    counts_.blocks = blocks;
    return counts_;
  }

private:
  static bool finished(const Block& block) {
    return std::all_of(block.warps.begin(), block.warps.end(), [](const Warp& w) { return w.state == Warp::done; });
  }

  uint32_t begin_epoch(uint32_t block) {
    epoch_blocks_.push_back(block);
    return static_cast<uint32_t>(epoch_blocks_.size()); // the first is 1
  }

  void start(uint32_t number) {
    const uint32_t epoch = begin_epoch(number);
    blocks_.push_back(std::unique_ptr<Block>(new Block{
        number,
        epoch,
        SharedMemory(program_.static_shared + launch_.shared_bytes, epoch),
        launch_.global,
        &epoch_blocks_,
        1,
        options_.blocks_share ? &released_ : nullptr,
        launch_.params,
        launch_.param_bytes,
        options_.order == Order::reverse || (options_.order == Order::random && random_() % 2) ? Arrival::early
                                                                                               : Arrival::late,
        options_.truncate_mma,
        &counts_.operations,
        {},
        {}}));
    Block& block = *blocks_.back();
    for (uint32_t i = 0; i < launch_.threads / kLanes; ++i) block.warps.push_back(make_warp(block, i));
  }

  Warp make_warp(Block& block, uint32_t index) const {
    Warp w{};
    w.block = &block;
    w.index = static_cast<uint16_t>(index);
    w.narrow.assign(static_cast<size_t>(program_.narrow) * kLanes, 0x7fffdeadu); // NaN
    w.wide.assign(static_cast<size_t>(program_.wide) * kLanes, 0x7fffdeaddeaddeadull);
    w.predicates.assign(program_.predicates, 0);
    w.groups = {{0, kAll}};
    for (const auto& c : program_.narrow_constants)
      std::fill_n(w.reg<uint32_t>(c.first), kLanes, static_cast<uint32_t>(c.second));
    for (const auto& c : program_.wide_constants) std::fill_n(w.reg<uint64_t>(c.first), kLanes, c.second);
    for (const auto& c : program_.predicate_constants) w.predicates[c.first] = c.second ? kAll : 0;
    const uint32_t* grid = launch_.grid;
    const uint32_t uniform[] = {0,
                                0,
                                0,
                                launch_.threads,
                                1,
                                1,
                                block.number % grid[0],
                                block.number / grid[0] % grid[1],
                                block.number / grid[0] / grid[1],
                                grid[0],
                                grid[1],
                                grid[2]};
    for (uint32_t i = 0; i < laneid; ++i) std::fill_n(w.reg<uint32_t>(program_.special + i), kLanes, uniform[i]);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      w.reg<uint32_t>(program_.special + tid_x)[lane] = index * kLanes + lane;
      w.reg<uint32_t>(program_.special + laneid)[lane] = lane;
    }
    return w;
  }

  // One warp runs for a while.
  void turn() {
    runnable_.clear();
    for (const auto& block : blocks_)
      for (Warp& w : block->warps)
        if (w.state == Warp::running) runnable_.push_back(&w);
    if (runnable_.empty()) throw Fault(program_.name + ": " + stuck());
    uint64_t operations = kTurn;
    Warp* chosen = nullptr;
    if (options_.order == Order::random) {
      chosen = runnable_[random_() % runnable_.size()];
      if (random_() % 4 != 0) operations = 1 + random_() % 64;
    } else {
      // A warp that used up its turn lets all others go first.
      skip_ = skip_ < runnable_.size() ? skip_ : 0;
      chosen = options_.order == Order::forward ? runnable_[skip_] : runnable_[runnable_.size() - 1 - skip_];
    }
    skip_ = run(*chosen, operations) ? skip_ + 1 : 0;
    pass_barrier(*chosen->block);
  }

  std::string stuck() const {
    std::string found = "warps wait for a barrier that others never reach:";
    for (const auto& block : blocks_)
      for (const Warp& w : block->warps)
        if (w.state == Warp::waiting) found += " " + where(w, w.barrier) + ";";
    return found;
  }

  std::string where(const Warp& w, const Op* op) const {
    const Statement& s = program_.statements[static_cast<size_t>(op - program_.ops.data())];
    return "line " + std::to_string(s.line) + ", `" + s.text + "`, block " + std::to_string(w.block->number) +
           ", warp " + std::to_string(w.index);
  }

  // Whether the warp could go on.
  bool run(Warp& w, uint64_t operations) {
    const Op* op = nullptr;
    try {
      for (; operations > 0 && w.state == Warp::running; --operations) {
        if (w.groups.size() > 1) choose(w);
        op = &program_.ops[w.groups[w.current].pc];
        ++counts_.operations;
        if (!step(w, *op)) return true;
      }
    } catch (const Fault& fault) {
      throw Fault(program_.name + ", " + where(w, op ? op : program_.ops.data()) + ": " + fault.what());
    }
    return w.state == Warp::running;
  }

  static Mask guarded(const Warp& w, const Op& op, Mask mask) {
    if (op.guard == kNone) return mask;
    return mask & (op.negated ? ~w.predicates[op.guard] : w.predicates[op.guard]);
  }

  // The lanes that must execute an operation together.
  static Mask required(Warp& w, const Op& op, Mask mask) {
    if (op.flow == Flow::collective || op.flow == Flow::barrier) return kAll;
    if (op.flow != Flow::masked || mask == 0) return 0;
    return w.reg<uint32_t>(op.src[op.num_src - 1])[__builtin_ctz(mask)];
  }

  // Joins lanes that met again; those that are furthest behind come first.
  static void join(Warp& w) {
    std::sort(w.groups.begin(), w.groups.end(), [](const Group& a, const Group& b) { return a.pc < b.pc; });
    size_t last = 0;
    for (size_t i = 1; i < w.groups.size(); ++i) {
      if (w.groups[i].pc == w.groups[last].pc)
        w.groups[last].mask |= w.groups[i].mask;
      else
        w.groups[++last] = w.groups[i];
    }
    w.groups.resize(last + 1);
    w.current = 0;
  }

  // Joins lanes, and picks those that are furthest behind and need not wait for others.
  void choose(Warp& w) {
    join(w);
    for (w.current = 0; w.current < w.groups.size(); ++w.current) {
      const Group& g = w.groups[w.current];
      const Op& op = program_.ops[g.pc];
      if ((required(w, op, guarded(w, op, g.mask)) & ~g.mask & w.live) == 0) return;
    }
    w.current = 0;
    throw Fault("its lanes wait for each other at different places");
  }

  // False if the warp lets others run.
  bool step(Warp& w, const Op& op) {
    Group& g = w.groups[w.current];
    const Mask mask = guarded(w, op, g.mask);
    switch (op.flow) {
    case Flow::plain:
      if (mask != 0) op.run(w, op, mask);
      ++g.pc;
      return true;
    case Flow::collective:
    case Flow::masked:
      if (mask != 0 || op.flow == Flow::collective) {
        const Mask missing = required(w, op, mask) & ~mask;
        if (missing != 0) throw Fault("lanes take no part that must: " + lanes(missing));
        if (mask & ~required(w, op, mask)) throw Fault("lanes take part that are not named as members");
        op.run(w, op, mask);
      }
      ++g.pc;
      return true;
    case Flow::branch:
      branch(w, op, mask);
      return true;
    case Flow::branch_by_index:
      branch_by_index(w, op, mask);
      return true;
    case Flow::leave:
      w.live &= ~mask;
      g.mask &= ~mask;
      ++g.pc;
      if (g.mask == 0) w.groups.erase(w.groups.begin() + static_cast<ptrdiff_t>(w.current));
      w.current = 0;
      if (w.groups.empty()) w.state = Warp::done;
      return true;
    case Flow::barrier:
      if (mask != kAll) throw Fault("lanes do not reach the barrier: " + lanes(~mask));
      if (op.num_src > 1 && op.run == nullptr && w.reg<uint32_t>(op.src[1])[0] != launch_.threads)
        throw Fault("only barriers of all threads are supported");
      w.state = Warp::waiting;
      w.barrier = &op;
      w.barrier_id = w.reg<uint32_t>(op.src[0])[0];
      ++g.pc;
      return true;
    case Flow::pause:
      ++g.pc;
      return false;
    }
    return true;
  }

  static std::string lanes(Mask mask) {
    std::string found;
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1) found += (found.empty() ? "" : " ") + std::to_string(i);
    return found;
  }

  static void branch(Warp& w, const Op& op, Mask taken) {
    Group& g = w.groups[w.current];
    const Mask rest = g.mask & ~taken;
    if (rest == 0) {
      g.pc = op.target;
      return;
    }
    ++g.pc;
    if (taken == 0) return;
    g.mask = rest;
    w.groups.push_back({op.target, taken});
  }

  // Every lane goes to the label that its number names.
  void branch_by_index(Warp& w, const Op& op, Mask mask) const {
    const std::vector<uint32_t>& targets = program_.lists[op.target];
    const uint32_t* which = w.reg<uint32_t>(op.src[0]);
    const Group g = w.groups[w.current];
    w.groups.erase(w.groups.begin() + static_cast<ptrdiff_t>(w.current));
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (which[lane] >= targets.size())
        throw Fault("lane " + std::to_string(lane) + " takes label " + std::to_string(which[lane]) + " of " +
                    std::to_string(targets.size()));
      w.groups.push_back({targets[which[lane]], 1u << lane});
    }
    if (g.mask & ~mask) w.groups.push_back({g.pc + 1, g.mask & ~mask});
    join(w);
  }

  void pass_barrier(Block& block) {
    const auto waits = [](const Warp& w) { return w.state == Warp::waiting; };
    if (!std::all_of(block.warps.begin(), block.warps.end(), waits)) return;
    for (const Warp& w : block.warps)
      if (w.barrier_id != block.warps[0].barrier_id)
        throw Fault(program_.name + ": warps wait at different barriers: " +
                    where(block.warps[0], block.warps[0].barrier) + "; " + where(w, w.barrier));
    // Those that reduce find the result of all warps.
    Mask any = 0, all = kAll;
    for (const Warp& w : block.warps)
      if (w.barrier->run != nullptr) {
        any |= w.predicates[w.barrier->src[1]];
        all &= w.predicates[w.barrier->src[1]];
      }
    for (Warp& w : block.warps) {
      if (w.barrier->run != nullptr) w.barrier->run(w, *w.barrier, (any != 0 ? 1u : 0u) | (all == kAll ? 2u : 0u));
      w.state = Warp::running;
      w.barrier = nullptr;
    }
    Block::merge(block.known, block.acquired);
    block.epoch = begin_epoch(block.number);
  }

  const Program& program_;
  const Launch& launch_;
  const Options& options_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<uint32_t> epoch_blocks_; // the block of each epoch, from 1
  std::unordered_map<uint64_t, Known> released_;
  std::vector<Warp*> runnable_;
  size_t skip_ = 0;
  Counts counts_;
};

} // namespace

Counts run(const Program& program, const Launch& launch, const Options& options) {
  return Machine(program, launch, options).run();
}

void add_control(Table& t) {
  t["bra"] = t["bra.uni"] = {{"=L", nullptr, Flow::branch}};
  t["brx.idx"] = {{"=rB", nullptr, Flow::branch_by_index}};
  t["ret"] = t["exit"] = {{"=", nullptr, Flow::leave}};
  t["bar.sync"] = {{"=r", nullptr, Flow::barrier}, {"=rr", nullptr, Flow::barrier}};
  // Instead of lanes these get whether the predicate holds anywhere (1) and everywhere (2).
  t["bar.red.or.pred"] = {
      {"p=rp", [](Warp& w, const Op& op, Mask m) { w.predicates[op.dst[0]] = m & 1 ? kAll : 0; }, Flow::barrier}};
  t["bar.red.and.pred"] = {
      {"p=rp", [](Warp& w, const Op& op, Mask m) { w.predicates[op.dst[0]] = m & 2 ? kAll : 0; }, Flow::barrier}};
  const Handler nothing = [](Warp&, const Op&, Mask) {};
  t["membar.gl"] = t["fence.acq_rel.gpu"] = {{"=", nothing}};
  t["nanosleep.u32"] = {{"=r", nothing, Flow::pause}};
  // Nanoseconds: one an operation.
  t["mov.u64"].push_back({"d=T", [](Warp& w, const Op& op, Mask m) {
                            for (int i = 0; i < kLanes; ++i)
                              if (m >> i & 1) w.reg<uint64_t>(op.dst[0])[i] = *w.block->now;
                          }});
}

} // namespace ptx
} // namespace trmfast
