// Copies between global memory and rows in shared memory, 16 bytes a thread.  Row and column alone determine
// which thread copies which 8 elements, so a thread may read what it wrote without a barrier.
#pragma once

#include "group.cuh"

namespace trmfast {
namespace gpu {

constexpr int kCopiesInFlight = 4;

// load_part(row, column) -> U32x4 and store_part(row, column, part) for this thread's parts of [rows, columns]; kLanes
// threads share a row.  kCopiesInFlight loads are issued before their stores.
template <int kLanes, class Load, class Store>
DEVICE void for_parts(int rows, int columns, Load&& load_part, Store&& store_part) {
  constexpr int kRows = kThreads / kLanes;
  const int first = thread_index() / kLanes;
  NO_UNROLL
  for (int column = thread_index() % kLanes * 8; column < columns; column += 8 * kLanes) {
    NO_UNROLL
    for (int row = first; row < rows; row += kCopiesInFlight * kRows) {
      U32x4 parts[kCopiesInFlight] = {}; // zeros: a part that a load skips would be live through the kernel
      UNROLL
      for (int i = 0; i < kCopiesInFlight; ++i) {
        if (row + i * kRows < rows) parts[i] = load_part(row + i * kRows, column);
      }
      UNROLL
      for (int i = 0; i < kCopiesInFlight; ++i) {
        if (row + i * kRows < rows) store_part(row + i * kRows, column, parts[i]);
      }
    }
  }
}

// to [rows, to_stride] in shared memory <- from [.., from_stride], zero beyond from_rows and from_columns.
template <int kLanes, class T>
DEVICE void copy_in(SharedPtr<T> to, int to_stride, int rows, int columns, GlobalPtr<const T> from, int from_stride,
                    int from_rows, int from_columns) {
  for_parts<kLanes>(
      rows, columns,
      [&](int row, int column) {
        if (row >= from_rows || column >= from_columns) return U32x4{};
        return load((from + (static_cast<int64_t>(row) * from_stride + column)).template as<const U32x4>());
      },
      [&](int row, int column, const U32x4& part) {
        store((to + (row * to_stride + column)).template as<U32x4>(), part);
      });
}

template <int kLanes, class T>
DEVICE void copy_out(GlobalPtr<T> to, int to_stride, int rows, int columns, SharedPtr<const T> from, int from_stride) {
  for_parts<kLanes>(
      rows, columns,
      [&](int row, int column) { return load((from + (row * from_stride + column)).template as<const U32x4>()); },
      [&](int row, int column, const U32x4& part) {
        store((to + (static_cast<int64_t>(row) * to_stride + column)).template as<U32x4>(), part);
      });
}

// The CTA's tokens of a sequence [length, width], in shared memory [kRows, kStride] with zeros from `width` to
// kColumns.
template <class I> struct OwnRows {
  static constexpr int kRows = 16 * I::kRowTiles, kColumns = 8 * kWarps * I::kWidthTiles, kStride = kColumns + kPad;
  static constexpr int kElements = kRows * kStride;
  int first, length, width;

  DEVICE explicit OwnRows(const ForwardParams<typename I::T>& p)
      : first(Place::get().rank * kRows), length(p.length), width(p.layout.block.width) {}

  DEVICE int valid() const { return larger(0, smaller(kRows, length - first)); }
  DEVICE int64_t offset() const { return static_cast<int64_t>(first) * width; }

  template <class T> DEVICE void load_from(GlobalPtr<const T> sequence, SharedPtr<T> h) const {
    copy_in<kWarpSize>(h, kStride, kRows, kColumns, sequence + offset(), width, valid(), width);
  }
  template <class T> DEVICE void store_to(GlobalPtr<T> sequence, SharedPtr<const T> h) const {
    copy_out<kWarpSize>(sequence + offset(), width, valid(), width, h, kStride);
  }
};

} // namespace gpu
} // namespace trmfast
