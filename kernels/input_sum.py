"""The input of an update: the sum of up to eight tensors, normed and added while the tiles of a product are loaded.

Added from the right and rounded to the compute dtype after each addition, as the reference does: ``z_L + (z_H + x)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from trmfast.kernels.dot import narrow
from trmfast.kernels.plan import Buffer

__all__ = ["MAX_TERMS", "checked_terms", "load_sum"]

MAX_TERMS = 8


def checked_terms(terms: Sequence[Buffer]) -> tuple[Buffer, ...]:
    """The terms as a kernel takes them.

    Raises:
        ValueError: their number.
    """
    if not 1 <= len(terms) <= MAX_TERMS:
        raise ValueError(f"terms: got {len(terms)}, accepted are 1 to {MAX_TERMS}")
    return tuple(terms)


@triton.jit
def _load(term, start, offsets, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(term + start + offsets, mask=mask, other=0.0)
    return tl.load(term + start + offsets)


@triton.jit
def _load_normed(terms, factors, AT: tl.constexpr, start, offsets, mask, PLACES: tl.constexpr, MASKED: tl.constexpr):
    value = _load(terms[AT], start, offsets, mask, MASKED)
    if len(factors) > 0:  # noqa: SIM102 (known when compiled)
        if PLACES[AT] >= 0:
            value = narrow(value.to(tl.float32) * factors[PLACES[AT]][:, None], value.dtype)
    return value


@triton.jit
def load_sum(terms, factors, start, offsets, mask, PLACES: tl.constexpr, MASKED: tl.constexpr):
    """The sum of a tuple of terms at ``start + offsets``; where MASKED, zero outside of the mask.

    ``start`` is a 64-bit scalar, ``offsets`` a tile of 32-bit offsets.  Term i is multiplied by factor ``PLACES[i]`` of
    its rows and rounded, if that is not negative; without factors none is.
    """
    LAST: tl.constexpr = len(terms) - 1
    total = _load_normed(terms, factors, LAST, start, offsets, mask, PLACES, MASKED)
    for i in tl.static_range(LAST):
        value = _load_normed(terms, factors, LAST - 1 - i, start, offsets, mask, PLACES, MASKED)
        total = narrow(value.to(tl.float32) + total.to(tl.float32), value.dtype)
    return total
