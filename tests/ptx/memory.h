// Global and shared memory: pieces with bounds and, for every two bytes, who touched them last and when.
#pragma once

#include "module.h"

#include <memory>

namespace trmfast {
namespace ptx {

constexpr uint32_t kSharedBase = 1024; // where shared memory starts, as on sm_80
constexpr uint16_t kMany = 0xffff;     // several threads of a warp, or several warps

// Who accesses memory, and when: a block's barriers begin epochs (numbered over all blocks), `bar.warp.sync` ticks
// the clock of its warp.
struct Actor {
  uint32_t epoch, clock;
  uint16_t thread, warp;
};

// An acquire reads what atomics of other threads wrote.
enum class Access : uint8_t { read, write, atomic, acquire };

struct Cell {
  uint32_t write_epoch = 0, write_clock = 0;
  uint32_t read_epoch = 0, read_clock = 0;
  uint16_t writer = 0, writing_warp = 0, reader = 0, reading_warp = 0;
  uint8_t atomic = 0, pending = 0; // cp.async is on its way

  // What is wrong with an access, or null; records it.  `same`: the write changes nothing.
  const char* touch(const Actor& a, Access access, bool same) {
    if (pending) return "a cp.async is on its way there that nobody waited for";
    const bool unordered_write = write_epoch == a.epoch && !(writer == a.thread && writer != kMany) &&
                                 !(writing_warp == a.warp && write_clock < a.clock);
    if (access == Access::acquire)
      return unordered_write && !atomic ? "another thread wrote there, not atomically, since the last barrier"
                                        : nullptr;
    if (access == Access::read) {
      if (unordered_write) return "another thread wrote there since the last barrier";
      if (read_epoch != a.epoch) {
        read_epoch = a.epoch;
        read_clock = a.clock;
        reader = a.thread;
        reading_warp = a.warp;
      } else if (reading_warp != a.warp) {
        reading_warp = kMany;
      } else if (read_clock < a.clock) {
        read_clock = a.clock;
        reader = a.thread;
      } else if (reader != a.thread) {
        reader = kMany;
      }
      return nullptr;
    }
    if (unordered_write && !same && !(atomic && access == Access::atomic))
      return "another thread wrote there since the last barrier";
    const bool ordered_read = read_epoch != a.epoch ||
                              (reading_warp == a.warp && (reader == a.thread ? reader != kMany : read_clock < a.clock));
    if (!ordered_read && !same) return "another thread read there since the last barrier";
    // A thread's own plain write stays one: it is not ordered before the atomics of others.
    if (access == Access::atomic && write_epoch == a.epoch && !atomic) return nullptr;
    write_epoch = a.epoch;
    write_clock = a.clock;
    writer = a.thread;
    writing_warp = a.warp;
    atomic = access == Access::atomic;
    return nullptr;
  }
};

// A range of global memory that a launch may use.  Its addresses begin at a base of its own, so that no arithmetic on
// one pointer reaches another piece.
struct Piece {
  std::string name;
  uint64_t base;
  uint8_t* data;
  uint64_t bytes;
  bool writable;
  Cell* cells;      // or null: nobody writes there
  uint32_t* writes; // counts them, or null
};

class GlobalMemory {
public:
  // placed: pieces lie at addresses of the caller, not at base().
  explicit GlobalMemory(bool placed) : placed_(placed) {}

  static uint64_t base(size_t index, uint64_t bias) {
    return (static_cast<uint64_t>(index + 1) << 40) + (1u << 30) + bias;
  }

  void add(Piece piece);

  // The piece that holds the bytes; an error says what is there.
  const Piece& at(uint64_t address, uint32_t size, bool writes) const;

private:
  const Piece* find(uint64_t address) const;

  bool placed_;
  std::vector<Piece> pieces_; // in the order of their addresses
};

// Shared memory of one block, poisoned when the block starts.
class SharedMemory {
public:
  SharedMemory(uint32_t bytes, uint32_t first_epoch);

  // The offset of the bytes that an address names.
  uint32_t at(uint32_t address, uint32_t size) const;

  uint8_t* data() { return data_.data(); }
  Cell* cells() { return cells_.data(); }
  uint32_t first_epoch() const { return first_epoch_; }

private:
  std::vector<uint8_t> data_;
  std::vector<Cell> cells_;
  uint32_t first_epoch_;
};

} // namespace ptx
} // namespace trmfast
