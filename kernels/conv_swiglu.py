"""URM's ConvSwiGLU after its activation: depthwise convolution, bias, SiLU, down projection, residual, norm.

    convolved = silu(bias + sum_t activation[l + t - taps // 2] * conv[t])     [B, L, I], zero beyond a sequence's ends
    out   = rms_norm(residual + convolved @ down^T)                            [B, L, D]

``swiglu.gate_up`` makes the activation.  Here the convolution is the prologue of the down product: a program loads each
tile of the activation once for every tap (from L1 or L2, all but the first time), so the convolved tensor never exists
in memory.  Tiles are whole rows, of which nothing is convolved twice, or narrower, as in projection.py.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection import begin_sum, check_squares, end_sum, store_normed
from trmfast.kernels.rows import Rows, rows_of, store_sum
from trmfast.kernels.swiglu import silu

__all__ = ["conv_projection", "load_convolved"]


@triton.jit
def load_convolved(
    activation,
    conv,
    bias,
    first_row,
    near_rows,
    place,
    columns,
    length,
    INTER: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``bias + sum_t activation[row + t - TAPS // 2] * conv[t]`` in float32, for rows ``first_row + near_rows``, whose
    places in their sequences are ``place``, and columns, which where MASKED may reach beyond INTER."""
    inside = columns < INTER
    total = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    # All taps of a column at once: they lie side by side.
    taps = tl.arange(0, BLOCK_T)
    weights = tl.load(
        conv + columns[:, None] * TAPS + taps[None, :], mask=inside[:, None] & (taps < TAPS)[None, :], other=0.0
    ).to(tl.float32)
    base = activation + first_row.to(tl.int64) * INTER
    for tap in tl.static_range(TAPS):
        shift = tap - TAPS // 2
        reached = ((place + shift >= 0) & (place + shift < length))[:, None]
        if MASKED:
            reached = reached & inside[None, :]
        offsets = (near_rows + shift)[:, None] * INTER + columns[None, :]
        value = tl.load(base + offsets, mask=reached, other=0.0).to(tl.float32)
        total += value * tl.sum(tl.where((taps == tap)[None, :], weights, 0.0), 1)[None, :]
    return total


@triton.jit
def conv_projection_kernel(
    activation,
    conv,
    bias,
    down,
    residual,
    residual_squares,
    out,
    squares,
    rstd,
    tokens,
    length,
    end,  # INTER, at run time: a constant trip count would be unrolled and use more registers
    D: tl.constexpr,
    INTER: tl.constexpr,
    TAPS: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL_PARTS: tl.constexpr,
    RESIDUAL_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    MASKED: tl.constexpr = INTER % BLOCK_K != 0
    COLUMN_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // COLUMN_TILES * BLOCK_M
    column_tile = tl.program_id(0) % COLUMN_TILES
    first_column = column_tile * BLOCK_N
    near_rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - first_row - 1)
    place = (first_row + near_rows) % length
    depth = tl.arange(0, BLOCK_K)
    columns = tl.minimum(first_column + tl.arange(0, BLOCK_N), D - 1)
    b_offsets = columns[:, None] * INTER + depth[None, :]
    h = begin_sum(
        residual, residual_squares, first_row, first_column, tokens,
        D, RESIDUAL_PARTS, RESIDUAL_EPS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    for k in range(0, end, BLOCK_K):
        convolved = load_convolved(
            activation, conv, bias, first_row, near_rows, place, k + depth, length, INTER, TAPS, BLOCK_T, MASKED
        )
        a = narrow(silu(convolved), activation.dtype.element_ty)
        if MASKED:
            b = tl.load(down + k + b_offsets, mask=(k + depth < INTER)[None, :], other=0.0)
        else:
            b = tl.load(down + k + b_offsets)
        h = dot(a, tl.trans(b), h, PRECISION)
    h = end_sum(
        h, residual, residual_squares, first_row, first_column, tokens,
        D, RESIDUAL_PARTS, RESIDUAL_EPS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if squares is None:
        store_normed(h, out, rstd, first_row, tokens, D, EPS, BLOCK_M, BLOCK_N)
    else:
        store_sum(h, out, squares, first_row, column_tile, tokens, D, BLOCK_M, BLOCK_N)


def conv_projection(
    activation: Buffer,
    conv: Buffer,
    bias: Buffer,
    down: Buffer,
    residual: Buffer | Rows | None,
    out: Buffer,
    *,
    eps: float,
    squares: Buffer | None = None,
    rstd: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of everything after the activation of a ConvSwiGLU.

    Args:
        activation: [B, L, I], silu(gate) * up.
        conv: [I, 1, taps]; tap t sees position l + t - taps // 2.
        bias: [I].
        down: [D, I].
        residual: [B, L, D]; None for the product alone, with squares.
        out: [B, L, D]; not the residual's buffer.
        eps: of the norm.
        squares: [B, L, tiles] float32, or None for the norm of whole rows; as in projection.py.
        rstd: [B, L] float32, receives 1 / sqrt(mean(h^2) + eps) of each row, or None; not with squares.
        tile: BLOCK_M, BLOCK_N, BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: squares or rstd that do not fit the tile.
    """
    tokens, length, (width, inter), taps = prod(activation.shape[:-1]), activation.shape[-2], down.shape, conv.shape[-1]
    check_squares(squares, rstd, width, tile)
    bypass = None if residual is None else rows_of(residual)
    columns = min(tile["BLOCK_N"], width)
    return Launch.of(
        "conv_swiglu.conv_projection_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),),
        {
            "activation": activation,
            "conv": conv,
            "bias": bias,
            "down": down,
            "residual": None if bypass is None else bypass.values,
            "residual_squares": None if bypass is None else bypass.squares,
            "out": out,
            "squares": squares,
            "rstd": rstd,
            "tokens": tokens,
            "length": length,
            "end": inter,
        },
        reads=("activation", "conv", "bias", "down", "residual", "residual_squares"),
        writes=("out", "squares", "rstd"),
        constants={
            "D": width,
            "INTER": inter,
            "TAPS": taps,
            "EPS": eps,
            "RESIDUAL_PARTS": 0 if bypass is None else bypass.parts,
            "RESIDUAL_EPS": 0.0 if bypass is None else bypass.eps,
            "PRECISION": precision,
            "BLOCK_T": triton.next_power_of_2(taps),
        },
        tile=tile,
        flops=2 * tokens * inter * (width + taps),
        special=2 * tokens * inter * triton.cdiv(width, tile["BLOCK_N"]),
        loads=(taps * tile["BLOCK_M"] + columns) * inter + 2 * tile["BLOCK_M"] * columns,
    )
