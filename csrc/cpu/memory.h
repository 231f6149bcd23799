// Memory reused across jobs: mapping fresh pages would cost a tenth of a training step, and some milliseconds for the
// weights of a 7-million-parameter network after every optimizer step.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <string>

namespace trmfast {

class OutOfMemory : public std::bad_alloc {
public:
  OutOfMemory(size_t bytes, const char* what);
  const char* what() const noexcept override { return message_.c_str(); }

private:
  std::string message_;
};

// Uninitialised memory, aligned to cache lines, and to huge pages when it is large.  Throws OutOfMemory.
class Memory {
public:
  // what: the name of its use, for the error.
  Memory(size_t bytes, const char* what);
  void* get() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }

private:
  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_;
};

// The workspace of one job; reuses the previous job's if large enough.
class Workspace {
public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  void* get() const { return memory_->get(); }

private:
  std::unique_ptr<Memory> memory_;
};

// Memory for reuse, one pool per kind of use so that sizes match.
class MemoryPool;
MemoryPool& packed_weights_pool();
MemoryPool& kept_activations_pool();

// Memory from a pool, which it returns to.
class PooledMemory {
public:
  PooledMemory(MemoryPool& pool, size_t bytes);
  ~PooledMemory();
  PooledMemory(const PooledMemory&) = delete;
  void* get() const { return memory_->get(); }
  size_t bytes() const { return bytes_; }

private:
  MemoryPool& pool_;
  size_t bytes_;
  std::unique_ptr<Memory> memory_;
};

// Frees memory kept between jobs.
void release_memory();

} // namespace trmfast
