"""The matrix product and the rounding of every kernel, and the only place that handles Triton's interpreter.

The interpreter keeps bfloat16 as raw 16-bit integers.  Its ``tl.dot`` multiplies those integers, and its conversion
from float32 truncates instead of rounding: both silently wrong.  So operands are widened there, and
float32 is rounded before the conversion.  On a device the conditions are constants and cost nothing.
"""

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "dot", "narrow"]

INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in float32; PRECISION is ``"ieee"`` or, for float32 operands, ``"tf32"``."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def narrow(wide, dtype: tl.constexpr):
    """float32 values rounded to ``dtype``, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = wide.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        wide = bits.to(tl.float32, bitcast=True)
    return wide.to(dtype)
