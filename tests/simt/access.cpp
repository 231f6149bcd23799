// Accesses of kernels to shared and global memory: bounds, alignment, poison, races, cp.async.
#include "machine.h"

namespace trmfast {
namespace simt {
namespace {

// A reader in Block::readers: the lane, or one of these.
constexpr uint32_t kManyLanes = 32, kWholeWarp = 33, kReaderBits = 6;

std::string hex(uint64_t x) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

} // namespace

// Is an access by thread `other` of a block, at that clock of its warp, ordered before the current one by `thread`?
bool Machine::ordered(const Thread& thread, int block, int other, uint32_t clock) const {
  const Warp& warp = *thread.warp;
  if (block == thread.block->index) {
    if (other / kLanes == warp.index) return other == thread.index || clock < warp.clock();
  } else if (!across_blocks_) {
    return true;
  }
  const int index = other / kLanes + (across_blocks_ ? block * warps_ : 0);
  return warp.clocks[static_cast<size_t>(index)] >= clock;
}

void Machine::check_cell(Block& block, size_t index, bool is_store, bool by_ldmatrix, Thread& thread, Site site) {
  SharedCell& cell = block.cells[index];
  const auto place = [&] { return "shared memory at byte " + std::to_string(2 * index); };
  if (cell.state == SharedCell::kInFlight)
    fail(thread, site,
         std::string(is_store ? "writes" : "reads") + " the destination of a copy that was not waited for, " +
             cell.site.text() + ": " + place());
  if (!is_store && cell.state == SharedCell::kUnwritten && options_.check_unwritten)
    fail(thread, site, "reads memory that nobody has written: " + place());
  if (!options_.check_races) {
    if (is_store) cell.state = SharedCell::kWritten;
    return;
  }
  const int me = thread.warp->index, lane = thread.lane;
  const uint32_t now = thread.warp->clock();
  // ldmatrix delivers a row to lanes other than the one that names it.
  const bool fresh = by_ldmatrix && cell.writer / kLanes == me
                         ? cell.write_clock >= now
                         : !ordered(thread, block.index, cell.writer, cell.write_clock);
  if (cell.state == SharedCell::kWritten && fresh)
    fail(thread, site,
         std::string("race: ") + (is_store ? "writes" : "reads") + " what warp " +
             std::to_string(cell.writer / kLanes) + " lane " + std::to_string(cell.writer % kLanes) + " writes at " +
             cell.site.text() + ", with nothing between that orders them: " + place());
  uint32_t* readers = &block.readers[index * static_cast<size_t>(warps_)];
  if (!is_store) {
    const uint32_t reader = by_ldmatrix ? kWholeWarp : static_cast<uint32_t>(lane), old = readers[me];
    const bool others = old >> kReaderBits == now && (old & 63) != reader;
    readers[me] = now << kReaderBits | (others ? kManyLanes : reader);
    return;
  }
  for (int w = 0; w < warps_; ++w) {
    const uint32_t reader = readers[w] & 63, clock = readers[w] >> kReaderBits;
    if (readers[w] == 0) continue;
    const bool fine = w == me ? reader == kWholeWarp || reader == static_cast<uint32_t>(lane) || clock < now
                              : ordered(thread, block.index, w * kLanes, clock);
    if (!fine)
      fail(thread, site,
           "race: writes what warp " + std::to_string(w) + " reads, with nothing between that orders them: " + place());
    readers[w] = 0;
  }
  cell.state = SharedCell::kWritten;
  cell.writer = static_cast<uint16_t>(thread.index);
  cell.write_clock = now;
  cell.site = site;
}

char* Machine::shared(uint32_t address, size_t bytes, bool is_store, Thread& thread, Site site, bool by_ldmatrix) {
  if (address % bytes != 0)
    fail(thread, site,
         "misaligned: " + std::to_string(bytes) + " bytes at byte " + std::to_string(address) + " of shared memory");
  if (address > shared_bytes_ || shared_bytes_ - address < bytes)
    fail(thread, site,
         "out of bounds: byte " + std::to_string(static_cast<int32_t>(address)) + " of " +
             std::to_string(shared_bytes_) + " of shared memory");
  Block& block = *thread.block;
  for (size_t i = address / 2; i < (address + bytes) / 2; ++i)
    check_cell(block, i, is_store, by_ldmatrix, thread, site);
  if (!by_ldmatrix) log(thread, {site, address, nullptr, static_cast<uint8_t>(bytes), is_store, false});
  return block.shared.data() + address;
}

void Machine::check_global_race(Buffer::Cell* cells, size_t count, bool is_store, Thread& thread, Site site,
                                const Buffer& buffer) {
  const uint32_t now = thread.warp->clock();
  const auto number = first_thread_ + static_cast<uint32_t>(thread.block->index * threads_ + thread.index);
  const auto unordered = [&](uint32_t other, uint32_t clock) {
    if (other < first_thread_) return false;
    const int index = static_cast<int>(other - first_thread_);
    return !ordered(thread, index / threads_, index % threads_, clock);
  };
  const auto race = [&](const char* mine, const char* theirs, uint32_t other) {
    const int index = static_cast<int>(other - first_thread_);
    fail(thread, site,
         std::string("race: ") + mine + " what block " + std::to_string(index / threads_) + " warp " +
             std::to_string(index % threads_ / kLanes) + " lane " + std::to_string(index % kLanes) + " " + theirs +
             ", with nothing between that orders them: " + buffer.name());
  };
  for (size_t i = 0; i < count; ++i) {
    Buffer::Cell& cell = cells[i];
    if (!is_store && cell.writer == Buffer::kNobody && options_.check_unwritten)
      fail(thread, site, "reads memory that nobody has written: " + buffer.name());
    if (options_.check_races) {
      if (unordered(cell.writer, cell.write_clock)) race(is_store ? "writes" : "reads", "writes", cell.writer);
      if (is_store && unordered(cell.reader, cell.read_clock)) race("writes", "reads", cell.reader);
    }
    if (is_store)
      cell = {number, now, Buffer::kNobody, 0};
    else {
      cell.reader = number;
      cell.read_clock = now;
    }
  }
}

char* Machine::global(const void* pointer, size_t bytes, Access access, Thread& thread, Site site, bool is_async) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Buffer* buffer = Buffer::find(address);
  if (buffer == nullptr) fail(thread, site, "out of bounds: " + hex(address) + " lies in no buffer");
  const auto offset = static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(buffer->data()));
  const auto place = [&] {
    return "byte " + std::to_string(offset) + " of " + buffer->name() + " (" + std::to_string(buffer->bytes()) +
           " bytes)";
  };
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > static_cast<int64_t>(buffer->bytes()))
    fail(thread, site, "out of bounds: " + std::to_string(bytes) + " bytes at " + place());
  if (address % bytes != 0) fail(thread, site, "misaligned: " + std::to_string(bytes) + " bytes at " + place());
  const bool is_store = access == Access::kStore;
  if ((is_store || access == Access::kAtomic) && !buffer->writable())
    fail(thread, site, "writes read-only memory: " + place());
  Buffer::Cell* cells = buffer->cells(static_cast<size_t>(offset));
  if (access == Access::kAtomic) {
    for (size_t i = 0; i < bytes / 2; ++i)
      if (cells[i].writer == Buffer::kNobody) fail(thread, site, "a flag that nobody has set: " + place());
    return buffer->data() + offset;
  }
  if (is_store) buffer->store_launch = launch_;
  if (access == Access::kLoadNc) buffer->load_nc_launch = launch_;
  if (buffer->store_launch == launch_ && buffer->load_nc_launch == launch_)
    fail(thread, site, "load_nc reads what the same launch writes: " + place());
  if (cells != nullptr) check_global_race(cells, bytes / 2, is_store, thread, site, *buffer);
  (is_store ? buffer->counters.stored_bytes : buffer->counters.loaded_bytes) += bytes;
  if (is_store) ++progress_;
  log(thread, {site, address, buffer, static_cast<uint8_t>(bytes), is_store, is_async});
  return buffer->data() + offset;
}

void Machine::issue_copy(uint32_t to, const void* from, bool valid, Site site) {
  Thread& thread = *current_;
  AsyncCopy copy{to, nullptr, thread.committed_groups, site, {}};
  if (valid) {
    copy.from = global(from, sizeof copy.bytes, Access::kLoad, thread, site, true);
    std::memcpy(copy.bytes, copy.from, sizeof copy.bytes);
  }
  char* destination = shared(to, sizeof copy.bytes, true, thread, site);
  thread.log.back().is_async = true;
  std::memset(destination, 0xff, sizeof copy.bytes);
  for (size_t i = to / 2; i < to / 2 + 8; ++i) {
    thread.block->cells[i].state = SharedCell::kInFlight;
    thread.block->cells[i].site = site;
  }
  thread.copies.push_back(copy);
}

void Machine::wait_copies(uint64_t groups_left, Site site) {
  Thread& thread = *current_;
  size_t kept = 0;
  for (size_t i = 0; i < thread.copies.size(); ++i) {
    const AsyncCopy& copy = thread.copies[i];
    if (copy.group + groups_left >= thread.committed_groups) {
      thread.copies[kept++] = copy;
      continue;
    }
    if (copy.from != nullptr && std::memcmp(copy.from, copy.bytes, sizeof copy.bytes) != 0)
      fail(thread, site, "the source of the copy at " + copy.site.text() + " has changed while it was in flight");
    std::memcpy(thread.block->shared.data() + copy.to, copy.bytes, sizeof copy.bytes);
    for (size_t cell = copy.to / 2; cell < copy.to / 2 + 8; ++cell) {
      SharedCell& landed = thread.block->cells[cell];
      landed.state = SharedCell::kWritten;
      landed.write_clock = thread.warp->clock();
    }
  }
  thread.copies.resize(kept);
}

// ---- the primitives

int thread_index() { return machine->thread().index; }
int block_index() { return machine->thread().block->index; }
int thread_count() { return machine->threads_per_block(); }
int block_count() { return machine->blocks(); }

void load_shared(uint32_t address, void* value, size_t bytes, Site site) {
  std::memcpy(value, machine->shared(address, bytes, false, machine->thread(), site), bytes);
}

void store_shared(uint32_t address, const void* value, size_t bytes, Site site) {
  std::memcpy(machine->shared(address, bytes, true, machine->thread(), site), value, bytes);
}

void load_global(const void* pointer, void* value, size_t bytes, bool read_only, Site site) {
  const auto access = read_only ? Machine::Access::kLoadNc : Machine::Access::kLoad;
  std::memcpy(value, machine->global(pointer, bytes, access, machine->thread(), site), bytes);
}

void store_global(void* pointer, const void* value, size_t bytes, Site site) {
  std::memcpy(machine->global(pointer, bytes, Machine::Access::kStore, machine->thread(), site), value, bytes);
}

void prefetch(const void* pointer, Site site) {
  if (Buffer::find(reinterpret_cast<uintptr_t>(pointer)) == nullptr)
    machine->fail(machine->thread(), site, "prefetches what lies in no buffer");
}

void cp_async(uint32_t to, const void* from, bool valid, Site site) { machine->issue_copy(to, from, valid, site); }
void cp_async_commit() { ++machine->thread().committed_groups; }
void cp_async_wait(int groups, Site site) { machine->wait_copies(static_cast<uint64_t>(groups), site); }

uint32_t load_acquire(const uint32_t* pointer, Site site) {
  Thread& thread = machine->thread();
  const char* flag = machine->global(pointer, sizeof(uint32_t), Machine::Access::kAtomic, thread, site);
  thread.site = site;
  machine->spin();
  machine->acquire(pointer);
  uint32_t value;
  std::memcpy(&value, flag, sizeof value);
  return value;
}

void store_release(uint32_t* pointer, uint32_t value, Site site) {
  char* flag = machine->global(pointer, sizeof value, Machine::Access::kAtomic, machine->thread(), site);
  machine->release(pointer, false);
  std::memcpy(flag, &value, sizeof value);
}

uint32_t atomic_add(uint32_t* pointer, uint32_t value, bool releases, Site site) {
  char* counter = machine->global(pointer, sizeof value, Machine::Access::kAtomic, machine->thread(), site);
  if (releases) machine->release(pointer, true);
  machine->made_progress();
  uint32_t old;
  std::memcpy(&old, counter, sizeof old);
  value += old;
  std::memcpy(counter, &value, sizeof value);
  return old;
}

uint64_t global_timer() { return machine->time(); }

void nanosleep() { machine->spin(); }

} // namespace simt
} // namespace trmfast
