// Global memory of the emulator: named buffers that track what was written, by which thread and when, and count
// traffic.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace trmfast {
namespace gpu {
template <class T> struct GlobalPtr;

// Where a kernel called a primitive.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  std::string text() const;
};

} // namespace gpu
namespace simt {

using gpu::Site;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct GlobalCounters {
  uint64_t loaded_bytes = 0; // by load, load_nc and cp_async_16
  uint64_t stored_bytes = 0;
  uint64_t loaded_sectors = 0; // 32 bytes, once per warp-wide access
  uint64_t stored_sectors = 0;
};

// Bytes of global memory under a name, aligned to 256 and poisoned with 0xff, NaN in every float type. Nothing else
// lies within 64 KB of either end.
class Buffer {
public:
  // The last accesses to two bytes, as (number of the thread over all launches, clock of its warp).
  struct Cell {
    uint32_t writer, write_clock, reader, read_clock;
  };
  static constexpr uint32_t kNobody = 0, kHost = 1; // threads are numbered from 2

  Buffer(std::string name, size_t bytes, bool writable);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // The buffer that contains the address, guard zones included, or null.
  static Buffer* find(uintptr_t address);

  void host_write(size_t offset, const void* data, size_t bytes);

  const std::string& name() const { return name_; }
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool writable() const { return writable_; }
  Cell* cells(size_t offset) const { return cells_ == nullptr ? nullptr : cells_ + offset / 2; }

  GlobalCounters counters;
  uint64_t load_nc_launch = 0, store_launch = 0; // the last launches with such accesses

private:
  std::string name_;
  size_t bytes_;
  bool writable_;
  char* allocation_;
  char* data_;
  Cell* cells_;
};

// A typed buffer. Given values it is read-only for kernels unless `writable`; given a size it is NaN until written.
template <class T> class GlobalArray {
public:
  GlobalArray(const std::string& name, size_t count)
      : count_(count), buffer_(std::make_unique<Buffer>(name, count * sizeof(T), true)) {}

  GlobalArray(const std::string& name, const std::vector<T>& values, bool writable = false)
      : GlobalArray(name, values.data(), values.size(), writable) {}

  GlobalArray(const std::string& name, const T* values, size_t count, bool writable = false)
      : count_(count), buffer_(std::make_unique<Buffer>(name, count * sizeof(T), writable)) {
    write(values, count);
  }

  gpu::GlobalPtr<T> pointer() const { return {reinterpret_cast<T*>(buffer_->data())}; }
  size_t size() const { return count_; }
  void write(const T* values, size_t count, size_t first = 0) {
    buffer_->host_write(first * sizeof(T), values, count * sizeof(T));
  }
  const T* data() const { return reinterpret_cast<const T*>(buffer_->data()); }
  std::vector<T> values() const { return std::vector<T>(data(), data() + count_); }
  const GlobalCounters& counters() const { return buffer_->counters; }
  void reset_counters() { buffer_->counters = {}; }

private:
  size_t count_;
  std::unique_ptr<Buffer> buffer_;
};

} // namespace simt
} // namespace trmfast
