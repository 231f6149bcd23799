// Numbers for the tests of one instruction set: bits, random values, guarded buffers, the operands of a product.
#pragma once

#include <cstring>
#include <limits>
#include <new>
#include <random>

#include "../../csrc/cpu/dot.h"
#include "check.h"

namespace {

using namespace trmfast;
using namespace trmfast::TRMFAST_NAMESPACE;

#if defined(__SANITIZE_ADDRESS__)
constexpr int kGuard = 0; // the sanitizer's own red zones are stricter
#else
constexpr int kGuard = 128;
#endif

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T> T cast(float x);
template <> float cast<float>(float x) { return x; }
template <> bf16 cast<bf16>(float x) { return to_bf16(x); }

uint32_t raw(float x) { return bits_of(x); }
uint32_t raw(bf16 x) { return x.bits; }

// `size` elements, initially NaN, between guard zones of NaN that must survive.
template <class T> struct Buffer {
  explicit Buffer(long size) : size(size) {
    const long bytes = (size + 2 * kGuard) * static_cast<long>(sizeof(T));
    memory = static_cast<T*>(::operator new(bytes, std::align_val_t(64)));
    data = memory + kGuard;
    for (long i = -kGuard; i < size + kGuard; ++i) data[i] = cast<T>(kNaN);
  }
  ~Buffer() {
    for (int i = 0; i < kGuard; ++i) {
      CHECK(raw(memory[i]) == raw(cast<T>(kNaN)), "written before a buffer");
      CHECK(raw(data[size + i]) == raw(cast<T>(kNaN)), "written after a buffer");
    }
    ::operator delete(memory, std::align_val_t(64));
  }
  Buffer(const Buffer&) = delete;

  long size;
  T *memory, *data;
};

std::mt19937 generator(20240229);

float random_normal() {
  static std::normal_distribution<float> normal;
  return normal(generator);
}

int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// The index of b[k][n] in a panel.
template <class T> long panel_index(int k, int n);
template <> long panel_index<float>(int k, int n) { return k * 32 + n; }
template <> long panel_index<bf16>(int k, int n) { return k / 2 * 64 + n * 2 + k % 2; }

// Operands of one product with NaN in every element that must not be used.
template <class T> struct Operands {
  Operands(int rows, int depth, int extra_lda)
      : rows(rows), depth(depth), lda(depth + extra_lda), a((rows - 1) * lda + depth), b(32L * depth) {
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < depth; ++k) a.data[r * lda + k] = cast<T>(random_normal());
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 32; ++n) b.data[panel_index<T>(k, n)] = cast<T>(random_normal());
  }

  int rows, depth;
  long lda;
  Buffer<T> a, b;
};

} // namespace
