"""The matrix product of every kernel, and the one place that knows of Triton's interpreter.

The interpreter keeps bfloat16 as raw 16-bit integers, and its ``tl.dot`` multiplies those integers: silently wrong.  So
operands are widened there.  On a device the condition is a constant and costs nothing.
"""

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "dot"]

INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in float32; PRECISION is ``"ieee"`` or, for float32 operands, ``"tf32"``."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
