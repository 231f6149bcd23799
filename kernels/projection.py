"""A product, the residual and the norm: the output projection of attention, and the down projection of an MLP.

    out = rms_norm(residual + source @ weight^T)          [T, D], weightless, over D

A program owns a tile [BLOCK_M, BLOCK_N] in float32 registers.  It reads BLOCK_M K elements of the source and BLOCK_N K
of the weight, which stays in L2, for 2 BLOCK_M BLOCK_N K FLOP.  There are two kinds of tiles:

* whole rows, BLOCK_N >= D: the norm needs no second pass and what enters it never leaves the chip.  BLOCK_M is small,
  each element of the weight read from L2 does BLOCK_M FLOP, and few rows make few programs.
* narrower ones: the program stores what enters the norm, and sums of squares; its readers apply the norm (rows.py).
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.rows import Rows, row_factor, rows_of, store_sum

__all__ = ["begin_sum", "block_width", "check_squares", "end_sum", "projection", "store_normed"]


@triton.jit
def _load_residual(
    residual,
    squares,
    first_row,
    first_column,
    tokens,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the residual in float32, [BLOCK_M, BLOCK_N], zero where there is none; normed if it has squares."""
    rows = tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    mask = (rows < tokens - first_row)[:, None]
    if D % BLOCK_N != 0:
        mask = mask & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    value = tl.load(residual + first_row.to(tl.int64) * D + offsets, mask=mask, other=0.0).to(tl.float32)
    if squares is not None:
        near_rows = tl.minimum(rows, (tokens - first_row - 1).to(tl.int32))
        value *= row_factor(squares, first_row, near_rows, PARTS, D, EPS)[:, None]
    return value


@triton.jit
def begin_sum(
    residual,
    squares,
    first_row,
    first_column,
    tokens,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The initial accumulator, [BLOCK_M, BLOCK_N] in float32; :func:`end_sum` adds the residual if it is not in it.

    In 16 bits it is the residual, which would need extra registers if added at the end.  In float32 it is zero: a sum
    that starts with the residual rounds at the residual's magnitude in every step, a quarter more error per block.
    """
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if residual is not None:  # noqa: SIM102 (known when compiled)
        if residual.dtype.element_ty != tl.float32:
            h = _load_residual(residual, squares, first_row, first_column, tokens, D, PARTS, EPS, BLOCK_M, BLOCK_N)
    return h


@triton.jit
def end_sum(
    h,
    residual,
    squares,
    first_row,
    first_column,
    tokens,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum with the residual, from one that began as :func:`begin_sum` says."""
    if residual is not None:  # noqa: SIM102 (known when compiled)
        if residual.dtype.element_ty == tl.float32:
            h += _load_residual(residual, squares, first_row, first_column, tokens, D, PARTS, EPS, BLOCK_M, BLOCK_N)
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
    residual_squares,
    out,
    squares,
    rstd,
    tokens,
    end,  # DEPTH, at run time: a constant trip count would be unrolled and use more registers
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL_PARTS: tl.constexpr,
    RESIDUAL_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // COLUMN_TILES * BLOCK_M
    column_tile = tl.program_id(0) % COLUMN_TILES
    first_column = column_tile * BLOCK_N
    rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - first_row - 1)
    columns = tl.minimum(first_column + tl.arange(0, BLOCK_N), D - 1)
    depth = tl.arange(0, BLOCK_K)
    a_base = source + first_row.to(tl.int64) * DEPTH
    a_offsets = rows[:, None] * DEPTH + depth[None, :]
    b_offsets = columns[:, None] * DEPTH + depth[None, :]
    h = begin_sum(
        residual, residual_squares, first_row, first_column, tokens,
        D, RESIDUAL_PARTS, RESIDUAL_EPS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    for k in range(0, end, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(a_base + k + a_offsets)
            b = tl.load(weight + k + b_offsets)
        else:
            inside = (k + depth < DEPTH)[None, :]
            a = tl.load(a_base + k + a_offsets, mask=inside, other=0.0)
            b = tl.load(weight + k + b_offsets, mask=inside, other=0.0)
        h = dot(a, tl.trans(b), h, PRECISION)
    h = end_sum(
        h, residual, residual_squares, first_row, first_column, tokens,
        D, RESIDUAL_PARTS, RESIDUAL_EPS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if squares is None:
        store_normed(h, out, rstd, first_row, tokens, D, EPS, BLOCK_M, BLOCK_N)
    else:
        store_sum(h, out, squares, first_row, column_tile, tokens, D, BLOCK_M, BLOCK_N)


def block_width(width: int) -> int:
    """The tile that holds a whole row of a width: the next power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(width)))


def check_squares(squares: Buffer | None, rstd: Buffer | None, width: int, tile: Tile) -> None:
    """Whether what a product with a norm writes fits its tile.

    Raises:
        ValueError: squares of another number of column tiles, none with several, or rstd with squares.
    """
    tiles = triton.cdiv(width, tile["BLOCK_N"])
    found = None if squares is None else squares.shape[-1]
    if found != tiles and not (found is None and tiles == 1):
        accepted = tiles if tiles > 1 else "None or 1"
        raise ValueError(f"squares: got {found} for {tiles} column tiles, accepted is {accepted}")
    if squares is not None and rstd is not None:
        raise ValueError("rstd: got a buffer with squares, accepted is None: no program knows whole rows")


def projection(
    source: Buffer,
    weight: Buffer,
    residual: Buffer | Rows | None,
    out: Buffer,
    *,
    eps: float,
    squares: Buffer | None = None,
    rstd: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of a projection with residual and norm, or with what a reader needs to apply the norm.

    Args:
        source: [..., K].
        weight: [D, K].
        residual: [..., D]; None for the product alone, with squares.
        out: [..., D]; not the residual's buffer.
        eps: of the norm.
        squares: [..., tiles] float32, receives sums of squares of what a norm takes, which is then what ``out``
            receives.  Needed if BLOCK_N < D; otherwise None for the norm of whole rows.
        rstd: [...] float32, receives 1 / sqrt(mean(h^2) + eps) of each row, or None; not with squares.
        tile: BLOCK_M, BLOCK_N, BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: squares or rstd that do not fit the tile.
    """
    tokens, (width, depth) = prod(source.shape[:-1]), weight.shape
    check_squares(squares, rstd, width, tile)
    bypass = None if residual is None else rows_of(residual)
    columns = min(tile["BLOCK_N"], width)
    return Launch.of(
        "projection.projection_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),),
        {
            "source": source,
            "weight": weight,
            "residual": None if bypass is None else bypass.values,
            "residual_squares": None if bypass is None else bypass.squares,
            "out": out,
            "squares": squares,
            "rstd": rstd,
            "tokens": tokens,
            "end": depth,
        },
        reads=("source", "weight", "residual", "residual_squares"),
        writes=("out", "squares", "rstd"),
        constants={
            "D": width,
            "DEPTH": depth,
            "EPS": eps,
            "RESIDUAL_PARTS": 0 if bypass is None else bypass.parts,
            "RESIDUAL_EPS": 0.0 if bypass is None else bypass.eps,
            "PRECISION": precision,
        },
        tile=tile,
        flops=2 * tokens * width * depth,
        loads=(tile["BLOCK_M"] + columns) * depth + 2 * tile["BLOCK_M"] * columns,
    )
