"""The input of an update: the sum of up to eight tensors, added while the tiles of a product are loaded.

Added from the right and rounded to the compute dtype after each addition, as the reference does: ``z_L + (z_H + x)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from trmfast.kernels.dot import narrow
from trmfast.kernels.plan import Buffer

__all__ = ["MAX_TERMS", "TERM_NAMES", "load_sum", "term_arguments"]

MAX_TERMS = 8
TERM_NAMES = tuple(f"term{i}" for i in range(MAX_TERMS))


def term_arguments(terms: Sequence[Buffer]) -> dict[str, Buffer | None]:
    """The arguments ``term0`` to ``term7`` of a kernel; those beyond the terms are None."""
    if not 1 <= len(terms) <= MAX_TERMS:
        raise ValueError(f"terms: got {len(terms)}, accepted are 1 to {MAX_TERMS}")
    return {name: terms[i] if i < len(terms) else None for i, name in enumerate(TERM_NAMES)}


@triton.jit
def _load(term, start, offsets, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(term + start + offsets, mask=mask, other=0.0)
    return tl.load(term + start + offsets)


@triton.jit
def _add(term, start, offsets, mask, total, MASKED: tl.constexpr):
    value = _load(term, start, offsets, mask, MASKED)
    return narrow(value.to(tl.float32) + total.to(tl.float32), value.dtype)


@triton.jit
def load_sum(
    term0,
    term1,
    term2,
    term3,
    term4,
    term5,
    term6,
    term7,
    start,
    offsets,
    mask,
    TERMS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The sum of the first TERMS terms at ``start + offsets``; where MASKED, zero outside of the mask.

    ``start`` is a 64-bit scalar, ``offsets`` a tile of 32-bit offsets.
    """
    if TERMS == 1:
        total = _load(term0, start, offsets, mask, MASKED)
    elif TERMS == 2:
        total = _load(term1, start, offsets, mask, MASKED)
    elif TERMS == 3:
        total = _load(term2, start, offsets, mask, MASKED)
    elif TERMS == 4:
        total = _load(term3, start, offsets, mask, MASKED)
    elif TERMS == 5:
        total = _load(term4, start, offsets, mask, MASKED)
    elif TERMS == 6:
        total = _load(term5, start, offsets, mask, MASKED)
    elif TERMS == 7:
        total = _load(term6, start, offsets, mask, MASKED)
    else:
        total = _load(term7, start, offsets, mask, MASKED)
    if TERMS > 7:
        total = _add(term6, start, offsets, mask, total, MASKED)
    if TERMS > 6:
        total = _add(term5, start, offsets, mask, total, MASKED)
    if TERMS > 5:
        total = _add(term4, start, offsets, mask, total, MASKED)
    if TERMS > 4:
        total = _add(term3, start, offsets, mask, total, MASKED)
    if TERMS > 3:
        total = _add(term2, start, offsets, mask, total, MASKED)
    if TERMS > 2:
        total = _add(term1, start, offsets, mask, total, MASKED)
    if TERMS > 1:
        total = _add(term0, start, offsets, mask, total, MASKED)
    return total
