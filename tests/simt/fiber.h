// A fiber: a stack of its own and a switch of a few nanoseconds. x86-64 switches by hand, other machines through
// ucontext (TRMFAST_SIMT_UCONTEXT chooses it everywhere). AddressSanitizer is told about every switch.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#if !defined(__x86_64__) || !defined(__ELF__)
#define TRMFAST_SIMT_UCONTEXT
#endif
#ifdef TRMFAST_SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace trmfast {
namespace simt {

// The context of the caller (no stack of its own) or of a fiber that runs `entry` when first switched to. `entry` must
// not return. A fiber may be abandoned at any switch; objects on its stack are then never destroyed.
class Fiber {
public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void prepare(char* stack, size_t bytes, void (*entry)());

  // Must be the first call in `entry`.
  static void entered();

  static void switch_to(Fiber& from, Fiber& to);

private:
  const void* stack_ = nullptr; // of the caller: known after the first switch away from it
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr; // AddressSanitizer's
#ifdef TRMFAST_SIMT_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

// Stacks with a guard page below each, kept for the next launch. Their tops are staggered: at equal offsets the hot
// lines of all lanes would fall into the same few sets of the cache.
class StackPool {
public:
  StackPool() = default;
  ~StackPool();
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;

  static constexpr size_t kBytes = 256 << 10;

  char* take();
  void give_back(char* stack) { free_.push_back(stack); }
  static size_t usable_bytes(const char* stack);

private:
  struct Arena {
    char* base;
    size_t bytes;
  };
  std::vector<Arena> arenas_;
  std::vector<char*> free_;
};

} // namespace simt
} // namespace trmfast
