// The state of one launch: threads, warps and blocks, scheduling and waits. Internal to the emulator.
#pragma once

#include <exception>
#include <unordered_map>

#include "fiber.h"
#include "simt.h"

namespace trmfast {
namespace simt {

constexpr int kLanes = 32, kNamedBarriers = 16;
constexpr uint32_t kAllLanes = 0xffffffffu;

// clocks[w]: the accesses of warp w (numbered over the grid) with a clock up to this are ordered before now.
using Clocks = std::vector<uint32_t>;
void join(Clocks& into, const Clocks& from);

enum class Operation {
  kNone,
  kSyncWarp,
  kShuffle,
  kVote,
  kLdmatrix,
  kMma,
  kBlockBarrier,
  kNamedSync,
  kNamedArrive,
};
const char* name_of(Operation operation);

// A copy in flight. The source must not change between issue and completion.
struct AsyncCopy {
  uint32_t to;
  const char* from; // null: zeros
  uint64_t group;
  Site site;
  char bytes[16];
};

// One access of one lane, kept until its warp meets again.
struct Logged {
  Site site;
  uint64_t address;
  Buffer* buffer; // null: shared memory
  uint8_t bytes;
  bool is_store, is_async;
};

struct Warp;
struct Block;

struct Thread {
  Fiber fiber;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0, lane = 0;
  Operation waiting = Operation::kNone; // at a warp primitive or a barrier
  Site site{"", 0};
  void* arguments = nullptr;
  std::vector<AsyncCopy> copies;
  uint64_t committed_groups = 0;
  std::vector<Logged> log;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;      // in the block
  int grid_index = 0; // in Clocks
  Thread* threads = nullptr;
  uint32_t ready = kAllLanes; // runnable lanes
  uint32_t spinning = 0;      // of these, the spinning ones: they run only if no other lane can
  uint32_t arrived = 0;       // lanes at the warp primitive
  uint32_t returned = 0;
  bool logged = false;
  Clocks clocks;

  uint32_t clock() const { return clocks[static_cast<size_t>(grid_index)]; }
  void advance() {
    if (++clocks[static_cast<size_t>(grid_index)] >> 26 != 0)
      throw Error("too many synchronisations for the race check");
  }
};

struct Barrier {
  int threads = 0; // expected; 0 before the first arrival
  int arrived = 0;
  uint32_t waiting = 0;      // warps that sync
  uint32_t participants = 0; // and those that only arrive
  bool any = false, all = true;
  Site site{"", 0};
  Clocks clocks;
};

// Two bytes of shared memory.
struct SharedCell {
  enum State : uint8_t { kUnwritten, kWritten, kInFlight };
  uint32_t write_clock = 0;
  uint16_t writer = 0;
  State state = kUnwritten;
  Site site{"", 0}; // of the write
};

struct Block {
  int index = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  int live = 0;
  std::vector<char> shared;
  std::vector<SharedCell> cells;
  std::vector<uint32_t> readers; // [cell][warp]: clock << 6 | lane, or kManyLanes, or kWholeWarp for ldmatrix
};

// Arguments of the collectives, each on its lane's stack.
struct BarrierArguments {
  int id, threads;
  bool vote, any, all; // the thread's vote, then the block's result
};

struct LdmatrixArguments {
  uint32_t* registers;
  int matrices;
  bool transposed;
  uint32_t row;
};

struct MmaArguments {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
  bool is_bf16;
};

struct ShuffleArguments {
  uint32_t value;
  int lane;
  uint32_t result;
};

struct VoteArguments {
  bool p, any, all;
};

class Machine {
public:
  Machine(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel, const Options& options);
  ~Machine();

  Counters run();

  Thread& thread() { return *current_; }
  int blocks() const { return blocks_; }
  int threads_per_block() const { return threads_; }

  // Waits for the other lanes, then executes once for all.
  void collective(Operation operation, void* arguments, Site site);

  // The bytes at an address of shared or global memory, after all checks.
  char* shared(uint32_t address, size_t bytes, bool is_store, Thread& thread, Site site, bool by_ldmatrix = false);
  enum class Access { kLoad, kLoadNc, kStore, kAtomic };
  char* global(const void* pointer, size_t bytes, Access access, Thread& thread, Site site, bool is_async = false);

  void issue_copy(uint32_t to, const void* from, bool valid, Site site);
  void wait_copies(uint64_t groups_left, Site site);

  // Between blocks.
  void acquire(const void* flag);
  void release(const void* flag, bool adds);
  void spin(); // lets all other threads run first
  void made_progress() { ++progress_; }
  uint64_t time() { return time_ += 10; }

  [[noreturn]] void fail(const Thread& thread, Site site, const std::string& what) const;

private:
  static void entry();
  void start_block(int index);
  void end_block(size_t resident);
  void finish_thread();
  void pass_on(); // switches to the next runnable thread
  Thread* next();
  Warp* choose_warp();
  void execute(Warp& warp, Operation operation, Site site);
  void execute_ldmatrix(Warp& warp, Site site);
  void execute_mma(Warp& warp);
  void arrive(Warp& warp, Operation operation, Site site);
  void log(Thread& thread, const Logged& entry);
  void flush_log(Warp& warp);
  void count(const Logged* const* lanes);
  bool ordered(const Thread& thread, int block, int other, uint32_t clock) const;
  void check_cell(Block& block, size_t cell, bool is_store, bool by_ldmatrix, Thread& thread, Site site);
  void check_global_race(Buffer::Cell* cells, size_t count, bool is_store, Thread& thread, Site site, const Buffer&);
  std::string who_waits_where() const;
  uint64_t random();

  const int blocks_, threads_, warps_;
  const size_t shared_bytes_;
  const std::function<void()>& kernel_;
  const Options options_;
  const bool across_blocks_; // Clocks hold the warps of the grid, otherwise of a block
  Counters counters_;
  std::map<std::pair<const char*, int>, Accesses> lines_;
  std::vector<int> to_start_;                    // block indices, the next at the back
  std::vector<std::unique_ptr<Block>> resident_; // by index
  Fiber main_;
  Thread* current_ = nullptr;
  Warp* warp_ = nullptr;
  Block* finished_ = nullptr;
  std::string failure_;
  std::exception_ptr exception_;
  uint64_t random_state_;
  uint64_t time_ = 0, leap_ = 0, idle_since_ = 0;
  uint64_t progress_ = 0, progress_at_idle_ = 0;
  uint32_t first_thread_; // number of thread 0 of block 0 over all launches
  uint64_t launch_;
  std::unordered_map<const void*, Clocks> flags_;
};

// Of the launch that is running.
extern Machine* machine;

} // namespace simt
} // namespace trmfast
