// A bump allocator over one block of memory.  Run once over a null base it measures, run again over the block it hands out
// the same offsets, so a layout is written once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trmfast {

class Arena {
public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T> T* take(long count) {
    const size_t offset = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(base_ + offset);
  }
  size_t used() const { return used_; }

private:
  char* base_;
  size_t used_ = 0;
};

} // namespace trmfast
