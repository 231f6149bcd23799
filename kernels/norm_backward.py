"""Gradient of the input s of an RMSNorm over the width D, from its output y, or from s.

One program takes BLOCK_M whole rows in registers.  Reads grad y, y [T, D] and rstd [T], writes grad s [T, D]; where
forward left s and its squares (rows.py), and nothing else in backward reads y, it takes those instead.  Where the
program that makes grad y has whole rows in registers, it applies the norm's gradient to them (projection_backward).

The weight of a norm behind a mixer multiplies grad y at its load.  Where a norm lies ahead of a mixer, the gradient
that bypasses both is added at the end, and the sum is stored, or added to the gradients of states.
"""

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import narrow
from trmfast.kernels.gradients import norm_gradient, store_targets
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection_backward import part_targets
from trmfast.kernels.rows import Rows, row_factor

__all__ = ["norm_backward"]


@triton.jit
def norm_backward_kernel(
    gradient,
    normed,
    rstd,
    squares,
    weight,
    residual,
    out,
    added,
    overwritten,
    rows,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_inside = row < rows - first_row
    column = tl.arange(0, BLOCK_N)
    mask = row_inside[:, None]
    if WIDTH != BLOCK_N:
        mask = mask & (column < WIDTH)[None, :]
    at = first_row.to(tl.int64) * WIDTH + row[:, None] * WIDTH + column[None, :]
    grad = tl.load(gradient + at, mask, 0.0).to(tl.float32)
    if weight is not None:
        grad *= tl.load(weight + column, column < WIDTH, 0.0).to(tl.float32)[None, :]
    y = tl.load(normed + at, mask, 0.0).to(tl.float32)
    if squares is not None:
        scale = row_factor(squares, first_row, tl.minimum(row, rows - first_row - 1), PARTS, WIDTH, EPS)
        y *= scale[:, None]
    else:
        scale = tl.load(rstd + first_row + row, row_inside, 0.0)
    result = norm_gradient(grad, y, scale[:, None], WIDTH, 1)
    if residual is not None:
        result += tl.load(residual + at, mask, 0.0).to(tl.float32)
    if out is not None:
        tl.store(out + at, narrow(result, out.dtype.element_ty), mask)
    store_targets(added, overwritten, at, mask, result)


def norm_backward(
    gradient: Buffer,
    normed: Rows,
    out: Buffer | None = None,
    *,
    weight: Buffer | None = None,
    residual: Buffer | None = None,
    targets: Sequence[tuple[Buffer, bool]] = (),
    tile: Tile,
) -> Launch:
    """From the gradient of ``y = rms_norm(s)`` to that of s.

    Args:
        gradient: of y, or of ``weight * y``; [..., D], the compute dtype or float32.
        normed: y with its rstd, or s with its squares; [..., D].
        out: result [..., D]; None if there are targets only.
        weight: [D], of the norm, or None.
        residual: [..., D], added to the result: the gradient of s that bypasses the norm; or None.
        targets: float32 buffers of the shape of ``out``, and whether to add to them (True) or to overwrite them.
        tile: BLOCK_M rows, BLOCK_N >= D.

    Raises:
        ValueError: BLOCK_N < D.
    """
    rows, width = prod(normed.values.shape[:-1]), normed.values.shape[-1]
    if tile["BLOCK_N"] < width:
        raise ValueError(f"tile: got BLOCK_N {tile['BLOCK_N']}, accepted is at least {width}")
    added, overwritten = part_targets(targets)
    return Launch.of(
        "norm_backward.norm_backward_kernel",
        (triton.cdiv(rows, tile["BLOCK_M"]),),
        {
            "gradient": gradient,
            "normed": normed.values,
            "rstd": normed.rstd,
            "squares": normed.squares,
            "weight": weight,
            "residual": residual,
            "out": out,
            "added": added,
            "overwritten": overwritten,
            "rows": rows,
        },
        reads=("gradient", "normed", "rstd", "squares", "weight", "residual", "added"),
        writes=("out", "added", "overwritten"),
        constants={"WIDTH": width, "PARTS": normed.parts, "EPS": normed.eps if normed.parts else 0.0},
        tile=tile,
    )
