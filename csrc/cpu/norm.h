// RMSNorm without weight, y = u r with r = 1 / sqrt(mean(u^2) + eps), over the channels of a token.
#pragma once

#include "simd.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// y <- norm(u); returns r.  Ignores columns beyond `width`: a product's padding column is NaN if its row holds an
// infinity.
template <class T> TRMFAST_INLINE float rms_norm(const float* u, int width, float eps, T* y) {
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
  const float scale = 1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / static_cast<float>(width) + eps);
  const vf r = broadcast(scale);
  for (j = 0; j + kLanes <= width; j += kLanes) store(y + j, load(u + j) * r);
  if (j < width) store(y + j, load(u + j) * r, width - j);
  return scale;
}

// d norm(u) / du for one element: r (1 - y^2), nearly 0, computed without y, which rounds to nearly 1.
template <class V> TRMFAST_INLINE V one_element_norm_gradient(V r, float eps) { return r * r * eps * r; }

// du <- r (dy - y mean(dy y)), in place over dy and rounded into du_rounded.  Nothing beyond `width` is written: 0 x
// NaN in the padding would outlive the sequence.
template <class T>
TRMFAST_INLINE void rms_norm_backward(float* dy, const T* y, float r, int width, float eps, T* du_rounded) {
  if (width == 1) {
    const vf du = load(dy, 1) * broadcast(one_element_norm_gradient(r, eps));
    store(dy, du, 1);
    store(du_rounded, du, 1);
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
    store_lanes(du_rounded + j, du, n);
  }
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
