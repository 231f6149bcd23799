// Copies between global memory and rows in shared memory, 16 bytes a thread.  Which thread copies which 8 elements
// depends on the sizes alone: what a thread wrote with the same sizes it may read without a barrier.
#pragma once

#include "params.cuh"

namespace trmfast {
namespace gpu {

constexpr int kCopiesInFlight = 4;

// f(copy, row, column) for this thread's parts of [rows, columns], kCopiesInFlight at a time: f.load for all of them,
// then f.store, so that the loads are in flight together.
template <class Load, class Store> DEVICE void for_parts(int rows, int columns, Load&& load_part, Store&& store_part) {
  const int per_row = columns / 8, parts = rows * per_row;
  NO_UNROLL
  for (int part0 = thread_index(); part0 < parts; part0 += kCopiesInFlight * kThreads) {
    U32x4 x[kCopiesInFlight];
    UNROLL
    for (int i = 0; i < kCopiesInFlight; ++i) {
      const int part = part0 + i * kThreads;
      if (part < parts) x[i] = load_part(part / per_row, part % per_row * 8);
    }
    UNROLL
    for (int i = 0; i < kCopiesInFlight; ++i) {
      const int part = part0 + i * kThreads;
      if (part < parts) store_part(part / per_row, part % per_row * 8, x[i]);
    }
  }
}

// to [rows, to_stride] in shared memory <- from [.., from_stride], zero beyond from_rows and from_columns.
template <class T>
DEVICE void copy_in(SharedPtr<T> to, int to_stride, int rows, int columns, GlobalPtr<const T> from, int from_stride,
                    int from_rows, int from_columns) {
  for_parts(
      rows, columns,
      [&](int row, int column) {
        if (row >= from_rows || column >= from_columns) return U32x4{};
        return load((from + (static_cast<int64_t>(row) * from_stride + column)).template as<const U32x4>());
      },
      [&](int row, int column, const U32x4& x) { store((to + (row * to_stride + column)).template as<U32x4>(), x); });
}

template <class T>
DEVICE void copy_out(GlobalPtr<T> to, int to_stride, int rows, int columns, SharedPtr<const T> from, int from_stride) {
  for_parts(
      rows, columns,
      [&](int row, int column) { return load((from + (row * from_stride + column)).template as<const U32x4>()); },
      [&](int row, int column, const U32x4& x) {
        store((to + (static_cast<int64_t>(row) * to_stride + column)).template as<U32x4>(), x);
      });
}

// The rows of one CTA: `rows` tokens from `first` of a sequence of `length`, in shared memory [rows, stride].
struct OwnRows {
  int rows, first, length, width, stride;

  DEVICE int valid() const { return larger(0, smaller(rows, length - first)); }
  DEVICE int64_t offset() const { return static_cast<int64_t>(first) * width; }

  // sequence: [length, width]
  template <class T> DEVICE void load_from(GlobalPtr<const T> sequence, SharedPtr<T> h) const {
    copy_in(h, stride, rows, width, sequence + offset(), width, valid(), width);
  }
  template <class T> DEVICE void store_to(GlobalPtr<T> sequence, SharedPtr<const T> h) const {
    copy_out(sequence + offset(), width, valid(), width, h, stride);
  }
};

} // namespace gpu
} // namespace trmfast
