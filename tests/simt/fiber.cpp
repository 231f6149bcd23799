#include "fiber.h"

#include <cstdint>
#include <cstring>
#include <new>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define TRMFAST_SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TRMFAST_SIMT_ASAN
#endif
#endif
#ifdef TRMFAST_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef TRMFAST_SIMT_UCONTEXT
// Saves the callee-saved registers (System V) on the old stack and restores the new one's.
extern "C" void trmfast_simt_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl trmfast_simt_switch
.hidden trmfast_simt_switch
.type trmfast_simt_switch, @function
trmfast_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size trmfast_simt_switch, .-trmfast_simt_switch
)");
#endif

namespace trmfast {
namespace simt {
namespace {

Fiber* switched_from = nullptr;
Fiber* switched_to = nullptr;

} // namespace

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) {
  stack_ = stack;
  stack_bytes_ = bytes;
  fake_stack_ = nullptr;
#ifdef TRMFAST_SIMT_ASAN
  __asan_unpoison_memory_region(stack, bytes); // a fiber abandoned here may have left its frames poisoned
#endif
#ifdef TRMFAST_SIMT_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // Six registers, the address that `ret` takes, and a zero return address that ends back-traces. At its first
  // instruction a function sees a stack pointer of 8 modulo 16.
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  void** frame = top - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry);
  stack_pointer_ = frame;
#endif
}

void Fiber::entered() {
#ifdef TRMFAST_SIMT_ASAN
  const void* old_stack;
  size_t old_bytes;
  __sanitizer_finish_switch_fiber(switched_to->fake_stack_, &old_stack, &old_bytes);
  if (switched_from->stack_ == nullptr) {
    switched_from->stack_ = old_stack;
    switched_from->stack_bytes_ = old_bytes;
  }
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  switched_from = &from;
  switched_to = &to;
#ifdef TRMFAST_SIMT_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#ifdef TRMFAST_SIMT_UCONTEXT
  swapcontext(&from.context_, &to.context_);
#else
  trmfast_simt_switch(&from.stack_pointer_, to.stack_pointer_);
#endif
  entered();
}

namespace {

constexpr size_t kPage = 4096, kStagger = 17 * 64, kColours = 32;

} // namespace

StackPool::~StackPool() {
  for (const Arena& arena : arenas_) munmap(arena.base, arena.bytes);
}

char* StackPool::take() {
  if (free_.empty()) {
    constexpr size_t kStacks = 64;
    const size_t bytes = kStacks * kBytes;
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    arenas_.push_back({static_cast<char*>(base), bytes});
    for (size_t i = kStacks; i-- > 0;) {
      char* stack = static_cast<char*>(base) + i * kBytes;
      mprotect(stack, kPage, PROT_NONE);
      free_.push_back(stack + kPage);
    }
  }
  char* stack = free_.back();
  free_.pop_back();
  return stack;
}

size_t StackPool::usable_bytes(const char* stack) {
  const size_t colour = (reinterpret_cast<uintptr_t>(stack) / kBytes) % kColours;
  return kBytes - kPage - colour * kStagger;
}

} // namespace simt
} // namespace trmfast
