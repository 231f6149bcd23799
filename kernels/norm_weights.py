"""Learned norm weights: folded into the product behind a norm, and their gradients.

A norm ahead of a mixer feeds one product, ``norm(s) * w`` times W^T, so w scales the columns of W:

    fold          W' = round(W w)                                  [R, D], once a call; every product reads W'

With P = (grad of the product)^T norm(s), the sum over all applications that weight_gradient.py makes,

    unfold        grad w = sum over the rows of W P,  grad W = P w      in place, once a call

Neither forward nor backward otherwise knows of such a weight, and no [T, D] tensor is read for its gradient.

The weight of a norm behind a mixer, and a bias, have no product of their own:

    column_sums   total += sum over the rows of gradient * factor      a bias has no factor

There a program owns BLOCK_N columns and one of S parts of the rows, and adds to its own part of the total, as in
weight_gradient.py: 2 elements read for every row and column.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import narrow
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = ["column_sums", "fold", "unfold"]


@triton.jit
def fold_kernel(weight, factor, out, rows, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    COLUMN_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // COLUMN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < D
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None].to(tl.int64) * D + column[None, :]
    scale = tl.load(factor + column, inside, 0.0).to(tl.float32)
    value = tl.load(weight + at, mask, 0.0).to(tl.float32) * scale[None, :]
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask)


@triton.jit
def unfold_kernel(
    weight,
    factor,
    product,
    grad_factor,
    rows,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < D
    scale = tl.load(factor + column, inside, 0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rows, BLOCK_M):
        mask = (row < rows - first)[:, None] & inside[None, :]
        at = tl.cast(first, tl.int64) * D + row[:, None] * D + column[None, :]
        value = tl.load(product + at, mask, 0.0)
        sums += value * tl.load(weight + at, mask, 0.0).to(tl.float32)
        tl.store(product + at, value * scale[None, :], mask)
    if grad_factor is not None:
        tl.store(grad_factor + column, tl.sum(sums, 0), inside)


@triton.jit
def column_sums_kernel(
    gradient,
    factor,
    total,
    rows,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,  # of the rows of the gradient
    FIRST: tl.constexpr,  # its first column
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(0) // COLUMN_TILES
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < WIDTH
    row = tl.arange(0, BLOCK_M)
    share = tl.cdiv(tl.cdiv(rows, BLOCK_M), SPLITS) * BLOCK_M
    begin = split * share
    end = tl.minimum(begin + share, rows)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(begin, end, BLOCK_M):
        mask = (row < end - at)[:, None] & inside[None, :]
        first = tl.cast(at, tl.int64)
        value = tl.load(gradient + first * STRIDE + FIRST + row[:, None] * STRIDE + column[None, :], mask, 0.0)
        value = value.to(tl.float32)
        if factor is not None:
            value *= tl.load(factor + first * WIDTH + row[:, None] * WIDTH + column[None, :], mask, 0.0).to(tl.float32)
        sums += value
    result = total + split * WIDTH + column
    tl.store(result, tl.load(result, inside, 0.0) + tl.sum(sums, 0), inside)


def fold(weight: Buffer, factor: Buffer, out: Buffer, *, tile: Tile) -> Launch:
    """``out = weight * factor``, a factor for each column.

    Args:
        weight: [R, D].
        factor: [D].
        out: [R, D].
        tile: BLOCK_M rows, BLOCK_N columns.
    """
    rows, width = weight.shape
    return Launch.of(
        "norm_weights.fold_kernel",
        (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),),
        {"weight": weight, "factor": factor, "out": out, "rows": rows},
        reads=("weight", "factor"),
        writes=("out",),
        constants={"D": width},
        tile=tile,
    )


def unfold(weight: Buffer, factor: Buffer, product: Buffer, grad_factor: Buffer | None, *, tile: Tile) -> Launch:
    """From the gradient with respect to ``weight * factor`` to those of both.

    Args:
        weight: [R, D].
        factor: [D].
        product: [R, D] float32, the gradient with respect to the folded weight; becomes that of the weight.
        grad_factor: [D] float32, or None.
        tile: BLOCK_M rows, BLOCK_N columns.
    """
    rows, width = weight.shape
    return Launch.of(
        "norm_weights.unfold_kernel",
        (triton.cdiv(width, tile["BLOCK_N"]),),
        {"weight": weight, "factor": factor, "product": product, "grad_factor": grad_factor, "rows": rows},
        reads=("weight", "factor", "product"),
        writes=("product", "grad_factor"),
        constants={"D": width},
        tile=tile,
    )


def column_sums(gradient: Buffer, factor: Buffer | None, total: Buffer, *, first: int = 0, tile: Tile) -> Launch:
    """Adds the sums over all rows of some columns of a gradient to a total.

    Args:
        gradient: [..., N], the compute dtype or float32.
        factor: [..., W], multiplies the columns before they are added up; or None.
        total: [splits, W] float32.
        first: the first of the W columns.
        tile: BLOCK_M rows, BLOCK_N columns.
    """
    rows, stride = prod(gradient.shape[:-1]), gradient.shape[-1]
    splits, width = total.shape
    return Launch.of(
        "norm_weights.column_sums_kernel",
        (triton.cdiv(width, tile["BLOCK_N"]) * splits,),
        {"gradient": gradient, "factor": factor, "total": total, "rows": rows},
        reads=("gradient", "factor", "total"),
        writes=("total",),
        constants={"WIDTH": width, "STRIDE": stride, "FIRST": first, "SPLITS": splits},
        tile=tile,
    )
