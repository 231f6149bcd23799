"""The norm of queries and keys over each head, ahead of the rotation, and its gradient.

    y = rotate(round(round(r x) * w)),  r = 1 / sqrt(mean(x^2) + eps)      for each token and head, in place

``qkv`` then stores queries and keys as they come out of the product, with their bias.  A program takes BLOCK_M tokens
of one head.  Every channel's partner in the rotation is loaded a second time, from L1.  For backward the kernel keeps
round(r x) and r; ``head_norm_backward`` turns the gradient of what was rotated, which attention_backward.py leaves in
memory, into that of x, in place:

    grad x = r (grad y w - x' mean(grad y w x')),  x' = r x                grad w = sum of grad y x' (norm_weights.py)

2 elements a channel read and 1 written, either way, and 1 more that is kept.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import narrow
from trmfast.kernels.gradients import norm_gradient
from trmfast.kernels.plan import Buffer, Launch, Tile

from trmfast.spec import BlockSpec

__all__ = ["head_norm", "head_norm_backward", "head_tile"]


@triton.jit
def head_tile(tokens, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """What a program takes: its head and first row, rows and columns from there, and which of them are inside."""
    head = tl.program_id(0) % HEADS
    first_row = tl.program_id(0) // HEADS * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_inside = rows < tokens - first_row
    columns = tl.arange(0, BLOCK_D)
    mask = row_inside[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return head, first_row, rows, columns, row_inside, mask


@triton.jit
def _normed(value, scale, weight, columns, HEAD_DIM: tl.constexpr):
    """Values [rows, columns] of the input times the factors of their rows, rounded, and the weight, rounded again."""
    result = narrow(value.to(tl.float32) * scale[:, None], value.dtype)
    if weight is not None:
        factor = tl.load(weight + columns, columns < HEAD_DIM, 0.0).to(tl.float32)
        result = narrow(result.to(tl.float32) * factor[None, :], value.dtype)
    return result


@triton.jit
def head_norm_kernel(
    qkv,
    weight,
    cos,
    sin,
    normed,
    rstd,
    tokens,
    length,
    FIRST: tl.constexpr,  # column of the first head
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    head, first_row, rows, columns, row_inside, mask = head_tile(tokens, HEADS, HEAD_DIM, BLOCK_M, BLOCK_D)
    start = first_row.to(tl.int64)
    source = qkv + start * STRIDE + FIRST + head * HEAD_DIM + rows[:, None] * STRIDE
    value = tl.load(source + columns[None, :], mask, 0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD_DIM + EPS)
    if normed is not None:
        target = normed + start * (HEADS * HEAD_DIM) + head * HEAD_DIM + rows[:, None] * (HEADS * HEAD_DIM)
        tl.store(target + columns[None, :], narrow(wide * scale[:, None], normed.dtype.element_ty), mask)
        tl.store(rstd + start * HEADS + head + rows * HEADS, scale, row_inside)
    result = _normed(value, scale, weight, columns, HEAD_DIM)
    if cos is not None:
        if INTERLEAVED:
            partner = columns ^ 1
            first = columns % 2 == 0
        else:
            partner = tl.where(columns < HALF, columns + HALF, columns - HALF)
            first = columns < HALF
        other = _normed(tl.load(source + partner[None, :], mask, 0.0), scale, weight, partner, HEAD_DIM)
        table = ((first_row + rows) % length)[:, None] * HEAD_DIM + columns[None, :]
        turned = tl.where(first[None, :], -other.to(tl.float32), other.to(tl.float32))
        rotated = result.to(tl.float32) * tl.load(cos + table, mask, 0.0) + turned * tl.load(sin + table, mask, 0.0)
        result = narrow(rotated, value.dtype)
    tl.debug_barrier()  # other threads have loaded their partners
    tl.store(source + columns[None, :], result, mask)


@triton.jit
def head_norm_backward_kernel(
    grad_qkv,
    normed,
    rstd,
    weight,
    tokens,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, first_row, rows, columns, row_inside, mask = head_tile(tokens, HEADS, HEAD_DIM, BLOCK_M, BLOCK_D)
    start = first_row.to(tl.int64)
    target = grad_qkv + start * STRIDE + FIRST + head * HEAD_DIM + rows[:, None] * STRIDE + columns[None, :]
    at = start * (HEADS * HEAD_DIM) + head * HEAD_DIM + rows[:, None] * (HEADS * HEAD_DIM) + columns[None, :]
    grad = tl.load(target, mask, 0.0).to(tl.float32)
    if weight is not None:
        grad *= tl.load(weight + columns, columns < HEAD_DIM, 0.0).to(tl.float32)[None, :]
    y = tl.load(normed + at, mask, 0.0).to(tl.float32)
    scale = tl.load(rstd + start * HEADS + head + rows * HEADS, row_inside, 0.0)
    result = norm_gradient(grad, y, scale[:, None], HEAD_DIM, 1)
    tl.store(target, narrow(result, grad_qkv.dtype.element_ty), mask)


def _constants(block: BlockSpec, qkv: Buffer, keys: bool) -> dict[str, int]:
    queries = block.num_heads * block.head_dim
    return {
        "FIRST": block.rows_ahead + (queries if keys else 0),
        "HEADS": block.num_kv_heads if keys else block.num_heads,
        "HEAD_DIM": block.head_dim,
        "STRIDE": qkv.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(block.head_dim)),
    }


def head_norm(
    block: BlockSpec,
    qkv: Buffer,
    *,
    keys: bool,
    weight: Buffer | None = None,
    cos: Buffer | None = None,
    sin: Buffer | None = None,
    normed: Buffer | None = None,
    rstd: Buffer | None = None,
    tile: Tile,
) -> Launch:
    """The launch of the norm and the rotation of all query heads, or of all key heads, in place.

    Args:
        block: sizes and options of the block.
        qkv: [B, L, G + (Hq + 2 Hkv) d].
        keys: whether keys instead of queries.
        weight: [d], of the norm, or None.
        cos, sin: [>= L, d] float32, or None for no rotation.
        normed: [B, L, H d], receives what the norm makes, without its weight, or None.
        rstd: [B, L, H] float32, receives the norm's factors, or None with ``normed``.
        tile: BLOCK_M rows.
    """
    tokens, length = prod(qkv.shape[:-1]), qkv.shape[-2]
    constants = _constants(block, qkv, keys)
    return Launch.of(
        "head_norm.head_norm_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]) * constants["HEADS"],),
        {
            "qkv": qkv,
            "weight": weight,
            "cos": cos,
            "sin": sin,
            "normed": normed,
            "rstd": rstd,
            "tokens": tokens,
            "length": length,
        },
        reads=("qkv", "weight", "cos", "sin"),
        writes=("qkv", "normed", "rstd"),
        constants={**constants, "INTERLEAVED": block.rotation == "interleaved", "EPS": block.rms_norm_eps},
        tile=tile,
        loads=3 * tile["BLOCK_M"] * block.head_dim,
    )


def head_norm_backward(
    block: BlockSpec,
    grad_qkv: Buffer,
    normed: Buffer,
    rstd: Buffer,
    *,
    keys: bool,
    weight: Buffer | None = None,
    tile: Tile,
) -> Launch:
    """From the gradients of what the norm of :func:`head_norm` makes to those of what it takes, in place.

    Args:
        block, keys, weight: as in :func:`head_norm`.
        grad_qkv: [B, L, G + (Hq + 2 Hkv) d].
        normed: [B, L, H d], and rstd: [B, L, H], as kept.
        tile: BLOCK_M rows.
    """
    tokens = prod(grad_qkv.shape[:-1])
    constants = _constants(block, grad_qkv, keys)
    return Launch.of(
        "head_norm.head_norm_backward_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]) * constants["HEADS"],),
        {"grad_qkv": grad_qkv, "normed": normed, "rstd": rstd, "weight": weight, "tokens": tokens},
        reads=("grad_qkv", "normed", "rstd", "weight"),
        writes=("grad_qkv",),
        constants=constants,
        tile=tile,
        loads=3 * tile["BLOCK_M"] * block.head_dim,
    )
