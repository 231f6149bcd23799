// SwiGLU, element by element: silu(gate) * up and its gradients.
#pragma once

#include "simd.h"

namespace trmfast {
namespace TRMFAST_NAMESPACE {

TRMFAST_INLINE vf swiglu(vf gate, vf up) { return silu(gate) * up; }

struct GateGradient {
  vf gate, up;
};

// d: gradient of silu(gate) * up.  silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
TRMFAST_INLINE GateGradient swiglu_backward(vf gate, vf up, vf d) {
  const vf s = sigmoid(gate);
  const vf scaled = d * s;
  return {scaled * up * (1.0f + gate * (1.0f - s)), scaled * gate};
}

// d: gradient of silu(m).
TRMFAST_INLINE vf silu_backward(vf m, vf d) {
  const vf s = sigmoid(m);
  return d * s * (1.0f + m * (1.0f - s));
}

} // namespace TRMFAST_NAMESPACE
} // namespace trmfast
