// SiLU and SwiGLU, element by element, with their gradients.  Results are rounded to T: for bf16, exponential
// and reciprocal are only as exact as that needs.
#pragma once

#include "simd.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

// 1 + e^-v
template <class T> TRMFAST_INLINE vf one_plus_exp(vf v) {
  return 1.0f + (sizeof(T) == 2 ? exp2_for_bf16(v * broadcast(-1.44269504f)) : exp(-v));
}

// By division: gradients take its difference from 1.
template <class T> TRMFAST_INLINE vf sigmoid(vf v) { return 1.0f / one_plus_exp<T>(v); }

// v / (1 + e^-v); as in PyTorch, silu(-inf) is NaN and v < -88.7 gives -0.
template <class T> TRMFAST_INLINE vf silu(vf v) {
  return sizeof(T) == 2 ? v * reciprocal_for_bf16(one_plus_exp<T>(v)) : v / one_plus_exp<T>(v);
}

template <class T> TRMFAST_INLINE vf swiglu(vf gate, vf up) { return silu<T>(gate) * up; }

struct GateGradient {
  vf gate, up;
};

// d: gradient of silu(gate) * up.  silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
template <class T> TRMFAST_INLINE GateGradient swiglu_backward(vf gate, vf up, vf d) {
  const vf s = sigmoid<T>(gate);
  const vf scaled = d * s;
  return {scaled * up * (1.0f + gate * (1.0f - s)), scaled * gate};
}

// d: gradient of silu(m).
template <class T> TRMFAST_INLINE vf silu_backward(vf m, vf d) {
  const vf s = sigmoid<T>(m);
  return d * s * (1.0f + m * (1.0f - s));
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
