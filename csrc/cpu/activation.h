// ReLU^2 and GELU, u Phi(u) with the distribution function Phi of the normal distribution, element by element, with
// their gradients.  Results are rounded to T: for bf16, the exponential is only as exact as that needs.
#pragma once

#include "engine.h"
#include "swiglu.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

struct Gaussian {
  vf density;      // e^(-u^2 / 2), without its factor
  vf distribution; // Phi(u)
};

// Phi(-v) = e^(-v^2 / 2) t P(t) for v >= 0, with t = 1 / (1 + 0.32 v) and the polynomial of least relative
// error, 3.2e-8 for all v; in f32 within 1e-7 of Phi.
template <class T> TRMFAST_INLINE Gaussian gaussian(vf u) {
  const vf half_square = u * u * -0.5f;
  const vf density = sizeof(T) == 2 ? exp2_for_bf16(half_square * 1.44269504f) : exp(half_square);
  const vf t = 1.0f / fma(max(-u, u), broadcast(0.32f), broadcast(1.0f));
  vf p = broadcast(-0x1.5989a8p-6f);
  p = fma(p, t, broadcast(0x1.870000p-4f));
  p = fma(p, t, broadcast(-0x1.2ca68ep-3f));
  p = fma(p, t, broadcast(0x1.0bf74ep-4f));
  p = fma(p, t, broadcast(-0x1.350ccep-7f));
  p = fma(p, t, broadcast(0x1.e0a4eap-5f));
  p = fma(p, t, broadcast(0x1.67bbb6p-4f));
  p = fma(p, t, broadcast(0x1.d57ea4p-4f));
  p = fma(p, t, broadcast(0x1.057318p-3f));
  p = fma(p, t, broadcast(0x1.057368p-3f));
  const vf tail = density * (p * t);
  return {density, u > 0.0f ? 1.0f - tail : tail};
}

// The activation of a channel mixer without a gate.
template <class T> TRMFAST_INLINE vf activate(Activation kind, vf u) {
  if (kind == Activation::gelu) return u * gaussian<T>(u).distribution;
  const vf v = max(vf{}, u); // the constant first: NaN passes through
  return v * v;
}

// d: gradient of the activation of u.
template <class T> TRMFAST_INLINE vf activate_backward(Activation kind, vf u, vf d) {
  if (kind == Activation::gelu) {
    const Gaussian g = gaussian<T>(u);
    return d * fma(u * g.density, broadcast(0.398942280f), g.distribution); // 1 / sqrt(2 pi)
  }
  return d * (2.0f * max(vf{}, u));
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
