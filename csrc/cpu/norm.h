// RMSNorm over the channels of a token: y = u r with r = 1 / sqrt(mean(u^2) + eps), times a learned weight if there is
// one.
#pragma once

#include "layout.h"
#include "simd.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// r of a row whose mean is over `count` elements, by default all of them.  Ignores columns beyond `width`: a product's
// padding column is NaN if its row holds an infinity.
template <class S> TRMFAST_INLINE float rms_scale(const S* u, int width, float eps, int count = 0) {
  vf squares[2] = {};
  int j = 0;
  for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
    const vf a = load(u + j), b = load(u + j + kLanes);
    squares[0] = fma(a, a, squares[0]);
    squares[1] = fma(b, b, squares[1]);
  }
  for (; j + kLanes <= width; j += kLanes) {
    const vf a = load(u + j);
    squares[0] = fma(a, a, squares[0]);
  }
  if (j < width) {
    const vf a = load(u + j, width - j);
    squares[0] = fma(a, a, squares[0]);
  }
  return 1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / static_cast<float>(count ? count : width) + eps);
}

// y <- residual + weight * norm(u), normed <- norm(u); returns r.  Residual, weight and normed may be null; y may be
// the residual.
template <class S, class T>
TRMFAST_INLINE float rms_norm(const S* u, int width, float eps, const float* weight, const T* residual, T* normed,
                              T* y) {
  const float scale = rms_scale(u, width, eps);
  for (int j = 0; j < width; j += kLanes) {
    const int n = smaller(kLanes, width - j);
    vf v = load_lanes(u + j, n) * broadcast(scale);
    if (normed) store_lanes(normed + j, v, n);
    if (weight) v *= load_lanes(weight + j, n);
    if (residual) v += load_lanes(residual + j, n);
    store_lanes(y + j, v, n);
  }
  return scale;
}

// 1 - y^2 for a norm of one element, whose gradient is r times that.  Where y is nearly 1, which it rounds to, it is
// computed as r^2 eps instead, in which the error of r counts twice.
template <class V> TRMFAST_INLINE V one_element_slope(V r, V y, float eps) {
  const V square = y * y;
  return square < 1.0f / 16 ? 1.0f - square : r * r * eps;
}

// du <- r (dy - y mean(dy y)), in place over dy and rounded into du_rounded unless that is null.  Nothing beyond
// `width` is written: 0 x NaN in the padding would outlive the sequence.
template <class T>
TRMFAST_INLINE void rms_norm_backward(float* dy, const T* y, float r, int width, float eps, T* du_rounded) {
  if (width == 1) {
    const vf du = load(dy, 1) * broadcast(r * one_element_slope(r, to_float(*y), eps));
    store(dy, du, 1);
    if (du_rounded) store(du_rounded, du, 1);
    return;
  }
  vf dots = {};
  int j = 0;
  for (; j + kLanes <= width; j += kLanes) dots = fma(load(dy + j), load(y + j), dots);
  if (j < width) dots = fma(load(dy + j, width - j), load(y + j, width - j), dots);
  const vf mean = broadcast(sum(dots) / static_cast<float>(width)), scale = broadcast(r);
  for (j = 0; j < width; j += kLanes) {
    const int n = width - j < kLanes ? width - j : kLanes;
    const vf du = scale * (load(dy + j) - load(y + j, n) * mean);
    store_lanes(dy + j, du, n);
    if (du_rounded) store_lanes(du_rounded + j, du, n);
  }
}

// dh += g - r^2 h mean(g h), the gradient through a norm that stands before a product.  The product takes h itself and
// its epilogue multiplies by r (block.h), so what comes back from it is g = r d(norm(h)).
template <class T>
TRMFAST_INLINE void input_norm_backward(const float* g, const T* h, float r, int width, float eps, float* dh) {
  vf dots = {};
  for (int j = 0; j < width; j += kLanes) {
    const int n = smaller(kLanes, width - j);
    dots = fma(load_lanes(g + j, n), load_lanes(h + j, n), dots);
  }
  // Of one element, the difference may be that of two nearly equal terms.
  const vf mean = broadcast(width == 1 ? 0.0f : r * r * sum(dots) / static_cast<float>(width));
  const vf kept = broadcast(width == 1 ? one_element_slope(r, r * to_float(*h), eps) : 1.0f);
  for (int j = 0; j < width; j += kLanes) {
    const int n = smaller(kLanes, width - j);
    const vf d = load_lanes(g + j, n) * kept - load_lanes(h + j, n) * mean;
    store_lanes(dh + j, load_lanes(dh + j, n) + d, n);
  }
}

// to <- from, rounded.
template <class T> TRMFAST_INLINE void round_row(const float* from, int width, T* to) {
  for (int j = 0; j < width; j += kLanes) {
    const int n = smaller(kLanes, width - j);
    store_lanes(to + j, load_lanes(from + j, n), n);
  }
}

// to <- weight * dy, or dy if weight is null; to may be dy.
TRMFAST_INLINE void weigh_row(const float* dy, const float* weight, int width, float* to) {
  for (int j = 0; j < width; j += kLanes) {
    const int n = smaller(kLanes, width - j);
    store_lanes(to + j, weight ? load_lanes(dy + j, n) * load_lanes(weight + j, n) : load_lanes(dy + j, n), n);
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
