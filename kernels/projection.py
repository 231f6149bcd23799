"""A product, the residual and the norm: the output projection of attention, and the down projection of an MLP.

    out = rms_norm(residual + source @ weight^T)          [T, D], weightless, over D

One program holds whole rows: BLOCK_M of them, [BLOCK_M, D] in float32 registers, so the norm needs no second pass and
what enters it never leaves the chip.  It reads BLOCK_M K elements of the source and all D K of the weight, which stays
in L2, for 2 BLOCK_M D K FLOP: BLOCK_M FLOP for each element read from L2.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = ["begin_sum", "block_width", "end_sum", "projection", "store_normed"]


@triton.jit
def _load_residual(residual, first_row, tokens, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of the residual in float32, [BLOCK_M, BLOCK_D], zero where there is none."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < tokens - first_row)[:, None]
    if D != BLOCK_D:
        mask = mask & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    return tl.load(residual + first_row.to(tl.int64) * D + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def begin_sum(residual, first_row, tokens, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The initial accumulator, [BLOCK_M, BLOCK_D] in float32; :func:`end_sum` adds the residual if it is not in it.

    In 16 bits it is the residual, which would need extra registers if added at the end.  In float32 it is zero: a sum
    that starts with the residual rounds at the residual's magnitude in every step, a quarter more error per block.
    """
    if residual.dtype.element_ty == tl.float32:
        return tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    return _load_residual(residual, first_row, tokens, D, BLOCK_M, BLOCK_D)


@triton.jit
def end_sum(h, residual, first_row, tokens, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum with the residual, from one that began as :func:`begin_sum` says."""
    if residual.dtype.element_ty == tl.float32:
        h += _load_residual(residual, first_row, tokens, D, BLOCK_M, BLOCK_D)
    return h


@triton.jit
def store_normed(
    h,
    out,
    rstd,
    first_row,
    tokens,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalises rows [BLOCK_M, BLOCK_D] (columns from D on may hold anything) and writes them. ``rstd`` (or None)
    receives 1 / sqrt(mean(h^2) + EPS) of each row."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < tokens - first_row)[:, None]
    if D != BLOCK_D:
        mask = mask & (columns < D)[None, :]
        h = tl.where((columns < D)[None, :], h, 0.0)
    scale = tl.rsqrt(tl.sum(h * h, 1) / D + EPS)
    offsets = rows[:, None] * D + columns[None, :]
    tl.store(out + first_row.to(tl.int64) * D + offsets, narrow(h * scale[:, None], out.dtype.element_ty), mask=mask)
    if rstd is not None:
        tl.store(rstd + first_row + rows, scale, mask=rows < tokens - first_row)


@triton.jit
def projection_kernel(
    source,
    weight,
    residual,
    out,
    rstd,
    tokens,
    end,  # DEPTH, at run time: a constant trip count would be unrolled and use more registers
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - first_row - 1)
    columns = tl.minimum(tl.arange(0, BLOCK_D), D - 1)
    depth = tl.arange(0, BLOCK_K)
    a_base = source + first_row.to(tl.int64) * DEPTH
    a_offsets = rows[:, None] * DEPTH + depth[None, :]
    b_offsets = columns[:, None] * DEPTH + depth[None, :]
    h = begin_sum(residual, first_row, tokens, D, BLOCK_M, BLOCK_D)
    for k in range(0, end, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(a_base + k + a_offsets)
            b = tl.load(weight + k + b_offsets)
        else:
            inside = (k + depth < DEPTH)[None, :]
            a = tl.load(a_base + k + a_offsets, mask=inside, other=0.0)
            b = tl.load(weight + k + b_offsets, mask=inside, other=0.0)
        h = dot(a, tl.trans(b), h, PRECISION)
    h = end_sum(h, residual, first_row, tokens, D, BLOCK_M, BLOCK_D)
    store_normed(h, out, rstd, first_row, tokens, D, EPS, BLOCK_M, BLOCK_D)


def block_width(width: int) -> int:
    """The tile that holds a whole row of a width: the next power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(width)))


def projection(
    source: Buffer,
    weight: Buffer,
    residual: Buffer,
    out: Buffer,
    *,
    eps: float,
    rstd: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of a projection with residual and norm.

    Args:
        source: [..., K].
        weight: [D, K].
        residual: [..., D].
        out: [..., D]; not the residual's buffer.
        eps: of the norm.
        rstd: [...] float32, receives 1 / sqrt(mean(h^2) + eps) of each row, or None.
        tile: BLOCK_M, BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    tokens, (width, depth) = prod(source.shape[:-1]), weight.shape
    return Launch.of(
        "projection.projection_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]),),
        {
            "source": source,
            "weight": weight,
            "residual": residual,
            "out": out,
            "rstd": rstd,
            "tokens": tokens,
            "end": depth,
        },
        reads=("source", "weight", "residual"),
        writes=("out", "rstd"),
        constants={
            "D": width,
            "DEPTH": depth,
            "EPS": eps,
            "PRECISION": precision,
            "BLOCK_D": block_width(width),
        },
        tile=tile,
        flops=2 * tokens * width * depth,
        loads=(tile["BLOCK_M"] + width) * depth + 2 * tile["BLOCK_M"] * width,
    )
