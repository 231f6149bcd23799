// A bump allocator over one block of memory.  Over a null base it measures; over the block it then hands out the same
// offsets, so a layout is written once.  With AddressSanitizer, a poisoned zone follows every array.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define TRMFAST_POISON
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TRMFAST_POISON
#endif
#endif

#if defined(TRMFAST_POISON)
#include <sanitizer/asan_interface.h>
#endif

namespace trmfast {

class Arena {
public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T> T* take(long count) {
    const size_t offset = used_, bytes = static_cast<size_t>(count) * sizeof(T);
    used_ += (bytes + kRedZone + 63) / 64 * 64;
#if defined(TRMFAST_POISON)
    if (base_) __asan_poison_memory_region(reinterpret_cast<void*>(base_ + offset + bytes), used_ - offset - bytes);
#endif
    return reinterpret_cast<T*>(base_ + offset);
  }
  size_t used() const { return used_; }

private:
#if defined(TRMFAST_POISON)
  static constexpr size_t kRedZone = 64;
#else
  static constexpr size_t kRedZone = 0;
#endif

  uintptr_t base_; // not a pointer: there is no arithmetic on a null one
  size_t used_ = 0;
};

} // namespace trmfast
