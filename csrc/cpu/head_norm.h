// The norm of every query and key over the channels of its head, before the rotation.  The query/key/value product
// leaves them as they come; attention norms and rotates the rows of one head at a time, so that nothing more is kept
// for backward, which does it again.
#pragma once

#include "arena.h"
#include "norm.h"
#include "pack.h"
#include "rope.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// The queries or keys of one head of a sequence.
template <class T> struct HeadRows {
  const T* rows; // [L, qk_width], packed columns
  long stride;
};

template <class T> struct HeadNormScratch {
  T *query = nullptr, *key = nullptr; // [L, qk_width + padding]

  HeadNormScratch(Arena& arena, const BlockShape& block, int length) {
    if (!block.qk_norm) return;
    query = arena.take<T>(length * row_stride(HeadLayout(block).qk_width));
    key = arena.take<T>(length * row_stride(HeadLayout(block).qk_width));
  }
};

// 1 / sqrt(mean square + eps) of a query or key.
template <class T> TRMFAST_INLINE float head_rstd(const BlockShape& block, const T* x) {
  return rms_scale(x, HeadLayout(block).qk_width, block.eps, block.head_dim);
}

// The rows that scores are computed from: x itself, or without its norm so far, normed and rotated in `to`.
template <class T>
HeadRows<T> norm_head(const HeadRows<T>& x, const BlockShape& block, const float* weight, const Rope& rope, int length,
                      T* to) {
  if (!block.qk_norm) return x;
  const int width = HeadLayout(block).qk_width;
  const HeadRows<T> normed = {to, row_stride(width)};
  float group[kPanel];
  for (int t = 0; t < length; ++t) {
    const T* from = x.rows + t * x.stride;
    const vf rstd = broadcast(head_rstd(block, from));
    for (int c = 0; c < width; c += kPanel) {
      for (int j = 0; j < kPanel; j += kLanes) {
        const vf y = load(from + c + j) * rstd;
        store(group + j, weight ? y * load(weight + c + j) : y);
      }
      T* out = to + t * normed.stride + c;
      if (rope.cos)
        rotate(group, rope.cos + static_cast<long>(t) * width + c, rope.sin + static_cast<long>(t) * width + c, out);
      else
        store_group(group, out);
    }
  }
  return normed;
}

// Sums of columns over rows, 32 rows at a time: one chain over a long sequence would round more than PyTorch's sum.
struct ColumnSums {
  float *total, *part; // [columns] each
  int columns;

  void clear() const {
    __builtin_memset(total, 0, sizeof(float) * static_cast<size_t>(columns));
    __builtin_memset(part, 0, sizeof(float) * static_cast<size_t>(columns));
  }
  void add(int c, vf v) const { store(part + c, load(part + c) + v); }
  // After row t of `rows`.
  void end_row(int t, int rows) const {
    if (t % 32 != 31 && t + 1 < rows) return;
    for (int c = 0; c < columns; c += kLanes) {
      store(total + c, load(total + c) + load(part + c));
      store(part + c, vf{});
    }
  }
};

// From the gradients of a head's queries or keys, as scores take them, to those of the product's columns, row by row:
// through rotation, norm and bias, then times the row's `scale`.
template <class T> struct HeadGradient {
  const BlockShape& block;
  const Rope& rope;
  int length;
  const float* weight;   // of the norm; null: none, or not learned
  const float* scale;    // [L] or null
  ColumnSums bias, norm; // of the gradients of the bias and of the norm's weight; total is null where there is none

  // d: [qk_width], overwritten.  x: what the product gave.
  void row(float* d, int t, const T* x, T* out) const {
    const int width = HeadLayout(block).qk_width;
    if (!block.qk_norm && !bias.total && !scale) {
      for (int c = 0; c < width; c += kPanel) unrotate_to(d + c, t, c, out + c);
      return;
    }
    for (int c = 0; c < width; c += kPanel) unrotate_to(d + c, t, c, d + c);
    if (block.qk_norm) through_norm(d, x, t);
    if (bias.total) {
      for (int c = 0; c < width; c += kLanes) bias.add(c, load(d + c));
      bias.end_row(t, length);
    }
    const vf factor = broadcast(scale ? scale[t] : 1.0f);
    for (int c = 0; c < width; c += kLanes) store(out + c, load(d + c) * factor);
  }

private:
  template <class To> void unrotate_to(const float* in, int t, int c, To* out) const {
    const long at = static_cast<long>(t) * rope.width + c;
    if (rope.cos)
      rotate_transposed(in, rope.cos + at, rope.sin + at, out);
    else
      store_group(in, out);
  }
  void through_norm(float* d, const T* x, int t) const {
    const int width = HeadLayout(block).qk_width;
    const float rstd = head_rstd(block, x);
    vf dots = {};
    for (int c = 0; c < width; c += kLanes) {
      const vf y = load(x + c) * broadcast(rstd);
      vf dy = load(d + c);
      if (norm.total) norm.add(c, dy * y);
      if (weight) dy *= load(weight + c);
      dots = fma(dy, y, dots);
      store(d + c, dy);
    }
    if (norm.total) norm.end_row(t, length);
    const bool one = block.head_dim == 1;
    const vf mean = broadcast(one ? 0.0f : sum(dots) / static_cast<float>(block.head_dim));
    const vf r = broadcast(one ? rstd * one_element_slope(rstd, rstd * to_float(*x), block.eps) : rstd);
    for (int c = 0; c < width; c += kLanes) store(d + c, r * (load(d + c) - load(x + c) * broadcast(rstd) * mean));
  }
};

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
