#include "memory.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include <pthread.h>

#include "arena.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trmfast {

namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

// Fills memory with NaN under AddressSanitizer: a job must not read the previous job's data.
void make_poison([[maybe_unused]] const Memory& memory) {
#if defined(TRMFAST_POISON)
  __asan_unpoison_memory_region(memory.get(), memory.bytes());
  std::memset(memory.get(), 0xff, memory.bytes());
#endif
}

} // namespace

OutOfMemory::OutOfMemory(size_t bytes, const char* what)
    : message_("out of memory: " + std::to_string(bytes) + " bytes of " + what) {}

Memory::Memory(size_t bytes, const char* what) : bytes_(bytes) {
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kCacheLine;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, std::max(bytes, kCacheLine)) != 0) throw OutOfMemory(bytes, what);
  memory_.reset(memory);
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

void Memory::Free::operator()(void* memory) const { std::free(memory); }

namespace {

std::atomic<Memory*> kept_workspace{nullptr};

} // namespace

Workspace::Workspace(size_t bytes) : memory_(kept_workspace.exchange(nullptr)) {
  if (!memory_ || memory_->bytes() < bytes) {
    memory_.reset(); // before there are two
    memory_ = std::make_unique<Memory>(bytes, "workspace");
  }
  make_poison(*memory_);
}

Workspace::~Workspace() { delete kept_workspace.exchange(memory_.release()); }

class MemoryPool {
public:
  MemoryPool(size_t most, const char* what) : most_(most), what_(what) { waiting_.reserve(most); } // give() cannot fail

  // Reuse pooled memory of at most twice the size, or allocate.
  std::unique_ptr<Memory> take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(lock);
      const auto fits = std::find_if(waiting_.begin(), waiting_.end(), [&](const auto& memory) {
        return memory->bytes() >= bytes && memory->bytes() / 2 <= bytes;
      });
      if (fits != waiting_.end()) {
        auto memory = std::move(*fits);
        waiting_.erase(fits);
        return memory;
      }
    }
    return std::make_unique<Memory>(bytes, what_);
  }

  // Free the longest unused when there is too much.
  void give(std::unique_ptr<Memory> memory) {
    const std::lock_guard<std::mutex> guard(lock);
    if (waiting_.size() >= most_) waiting_.erase(waiting_.begin());
    waiting_.push_back(std::move(memory));
  }

  void clear() {
    const std::lock_guard<std::mutex> guard(lock);
    waiting_.clear();
  }

  // One lock for all pools, held during fork: in the child, no thread would be left to release it.
  static std::mutex& lock;

private:
  const size_t most_;
  const char* const what_;
  std::vector<std::unique_ptr<Memory>> waiting_;
};

namespace {

// Never destroyed, nor is the lock: an object that returns memory may outlive every other static object.
MemoryPool& packed_weights = *new MemoryPool(4, "packed weights"); // two networks, forward and backward
MemoryPool& kept_activations = *new MemoryPool(2, "activations kept for backward");

} // namespace

std::mutex& MemoryPool::lock = *new std::mutex;

namespace {

[[maybe_unused]] const int fork_handlers = pthread_atfork(
    [] { MemoryPool::lock.lock(); }, [] { MemoryPool::lock.unlock(); }, [] { MemoryPool::lock.unlock(); });

} // namespace

MemoryPool& packed_weights_pool() { return packed_weights; }

MemoryPool& kept_activations_pool() { return kept_activations; }

PooledMemory::PooledMemory(MemoryPool& pool, size_t bytes) : pool_(pool), bytes_(bytes), memory_(pool.take(bytes)) {
  make_poison(*memory_);
}

PooledMemory::~PooledMemory() { pool_.give(std::move(memory_)); }

void release_memory() {
  delete kept_workspace.exchange(nullptr);
  packed_weights.clear();
  kept_activations.clear();
}

} // namespace trmfast
