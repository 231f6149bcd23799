"""Gradients through URM's SwiGLU: ``down(silu(bias + conv(act)))`` with ``act = silu(gate) * up``.

The depthwise convolution reaches over neighbouring tokens, so its gradient needs finished rows, and the chain is cut
there:

* conv_swiglu_backward: a program owns [BLOCK_M tokens, BLOCK_N inner columns]; the product ds2 @ down over D gives
  the gradient of z = silu(c) in its accumulators.  c = bias + conv(act) is recomputed from act, one load per tap.
  Writes grad c and z, [T, I] each, and for each tile of tokens the sums over its tokens that make up the gradients of
  taps and bias (partials). Reads D + I (act), writes 2 I elements a token; 2 D I FLOP.
* gate_up_backward: recomputes gate and up (product over D), correlates grad c with the taps for the gradient of act,
  writes the gradient of gate and up.  Reads D + I, writes 2 I elements a token; 4 D I FLOP.
* conv_gradient: adds the partials to the gradients of taps and bias; a few megabytes.

Tokens are flattened, and a tap that reaches out of its sequence reads zero.
"""

from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.gradients import swiglu_gradient
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = ["conv_gradient", "conv_partials_shape", "conv_swiglu_backward", "gate_up_backward"]


@triton.jit
def _load_shifted(pointer, first_row, row, column, mask, length, SHIFT: tl.constexpr, INNER: tl.constexpr):
    """Rows of their own sequence that lie SHIFT tokens further on, zero outside of it; float32."""
    position = (first_row + row) % length + SHIFT
    inside = mask & ((position >= 0) & (position < length))[:, None]
    at = first_row.to(tl.int64) * INNER + ((row + SHIFT)[:, None] * INNER + column[None, :])
    return tl.load(pointer + at, inside, 0.0).to(tl.float32)


@triton.jit
def conv_swiglu_backward_kernel(
    gradient,
    down,
    activation,
    conv,
    bias,
    grad_conv,
    convolved,
    partials,
    rows,
    length,
    end,  # DEPTH, at run time: a constant trip count would be unrolled and use more registers
    DEPTH: tl.constexpr,
    INNER: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    row_tile = tl.program_id(0) // COLUMN_TILES
    first_row = row_tile * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    column_inside = column < INNER
    near_column = column
    if INNER % BLOCK_N != 0:
        near_column = tl.minimum(column, INNER - 1)
    step = tl.arange(0, BLOCK_K)
    start = first_row.to(tl.int64) * DEPTH
    offsets = tl.minimum(row, rows - first_row - 1)[:, None] * DEPTH + step[None, :]
    down_offsets = step[:, None] * INNER + near_column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, end, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            g = tl.load(gradient + (start + k) + offsets)
            w = tl.load(down + k * INNER + down_offsets)
        else:
            left = step < DEPTH - k
            g = tl.load(gradient + (start + k) + offsets, left[None, :], 0.0)
            w = tl.load(down + k * INNER + down_offsets, left[:, None], 0.0)
        total = dot(g, w, total, PRECISION)

    mask = (row < rows - first_row)[:, None]
    if INNER % BLOCK_N != 0:
        mask = mask & column_inside[None, :]
    dtype: tl.constexpr = convolved.dtype.element_ty
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(bias + column, column_inside, 0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        weight = tl.load(conv + column * TAPS + tap, column_inside, 0.0).to(tl.float32)
        c += _load_shifted(activation, first_row, row, column, mask, length, tap - TAPS // 2, INNER) * weight[None, :]
    sigmoid = 1.0 / (1.0 + tl.exp(-c))
    z = c * sigmoid
    grad_c = tl.where(mask, total * (sigmoid + z * (1.0 - sigmoid)), 0.0)
    at = first_row.to(tl.int64) * INNER + (row[:, None] * INNER + column[None, :])
    tl.store(convolved + at, narrow(z, dtype), mask)
    tl.store(grad_conv + at, narrow(grad_c, dtype), mask)
    if partials is not None:
        sums = partials + row_tile.to(tl.int64) * (TAPS + 1) * INNER + column
        for tap in tl.static_range(TAPS):
            act = _load_shifted(activation, first_row, row, column, mask, length, tap - TAPS // 2, INNER)
            tl.store(sums + tap * INNER, tl.sum(grad_c * act, 0), column_inside)
        tl.store(sums + TAPS * INNER, tl.sum(grad_c, 0), column_inside)


@triton.jit
def gate_up_backward_kernel(
    h1,
    gate_up,
    grad_conv,
    conv,
    grad_gate_up,
    rows,
    length,
    end,  # DEPTH, at run time: a constant trip count would be unrolled and use more registers
    DEPTH: tl.constexpr,
    INNER: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // COLUMN_TILES * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    column_inside = column < INNER
    step = tl.arange(0, BLOCK_K)
    start = first_row.to(tl.int64) * DEPTH
    offsets = tl.minimum(row, rows - first_row - 1)[:, None] * DEPTH + step[None, :]
    gate_offsets = tl.minimum(column, INNER - 1)[:, None] * DEPTH + step[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, end, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            h = tl.load(h1 + (start + k) + offsets)
            gate_tile = tl.load(gate_up + k + gate_offsets)
            up_tile = tl.load(gate_up + INNER * DEPTH + k + gate_offsets)
        else:
            left = (step < DEPTH - k)[None, :]
            h = tl.load(h1 + (start + k) + offsets, left, 0.0)
            gate_tile = tl.load(gate_up + k + gate_offsets, left, 0.0)
            up_tile = tl.load(gate_up + INNER * DEPTH + k + gate_offsets, left, 0.0)
        gate = dot(h, tl.trans(gate_tile), gate, PRECISION)
        up = dot(h, tl.trans(up_tile), up, PRECISION)

    mask = (row < rows - first_row)[:, None]
    if INNER % BLOCK_N != 0:
        mask = mask & column_inside[None, :]
    grad_activation = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in tl.static_range(TAPS):
        weight = tl.load(conv + column * TAPS + tap, column_inside, 0.0).to(tl.float32)
        grad_activation += (
            _load_shifted(grad_conv, first_row, row, column, mask, length, TAPS // 2 - tap, INNER) * weight[None, :]
        )
    grad_gate, grad_up, _ = swiglu_gradient(gate, up, grad_activation)
    at = grad_gate_up + first_row.to(tl.int64) * (2 * INNER) + (row[:, None] * (2 * INNER) + column[None, :])
    dtype: tl.constexpr = grad_gate_up.dtype.element_ty
    tl.store(at, narrow(grad_gate, dtype), mask)
    tl.store(at + INNER, narrow(grad_up, dtype), mask)


@triton.jit
def conv_gradient_kernel(
    partials,
    total_conv,
    total_bias,
    tiles,
    INNER: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    column_inside = column < INNER
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, tiles, BLOCK_M):
        tile = first + tl.arange(0, BLOCK_M)
        at = (tile[:, None].to(tl.int64) * (TAPS + 1) + which) * INNER + column[None, :]
        sums += tl.load(partials + at, (tile < tiles)[:, None] & column_inside[None, :], 0.0)
    total = tl.sum(sums, 0)
    if which < TAPS:
        if total_conv is not None:
            at = total_conv + column * TAPS + which
            tl.store(at, tl.load(at, column_inside, 0.0) + total, column_inside)
    else:
        if total_bias is not None:
            at = total_bias + column
            tl.store(at, tl.load(at, column_inside, 0.0) + total, column_inside)


def conv_partials_shape(rows: int, inner: int, taps: int, tile: Tile) -> tuple[int, int, int]:
    """Shape of the partials that :func:`conv_swiglu_backward` writes for T rows with a tile: [tiles, taps + 1, I]."""
    return triton.cdiv(rows, tile["BLOCK_M"]), taps + 1, inner


def conv_swiglu_backward(
    gradient: Buffer,
    down: Buffer,
    activation: Buffer,
    conv: Buffer,
    bias: Buffer,
    grad_conv: Buffer,
    convolved: Buffer,
    partials: Buffer | None = None,
    *,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """From the gradient of the block's channel mixer back through the convolution.

    Args:
        gradient: ds2 [B, L, D].
        down: [D, I].
        activation: ``silu(gate) * up`` [B, L, I], as the forward kernel wrote it.
        conv: taps [I, 1, k].
        bias: [I].
        grad_conv: result [B, L, I], the gradient of the convolution's output.
        convolved: result z [B, L, I], the input of the down projection.
        partials: result float32 of :func:`conv_partials_shape`, for :func:`conv_gradient`; None if neither conv nor
            bias needs a gradient.
        tile: BLOCK_M tokens, BLOCK_N inner columns, BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    (length, depth), rows = gradient.shape[-2:], prod(gradient.shape[:-1])
    inner = down.shape[1]
    return Launch.of(
        "conv_swiglu_backward.conv_swiglu_backward_kernel",
        (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(inner, tile["BLOCK_N"]),),
        {
            "gradient": gradient,
            "down": down,
            "activation": activation,
            "conv": conv,
            "bias": bias,
            "grad_conv": grad_conv,
            "convolved": convolved,
            "partials": partials,
            "rows": rows,
            "length": length,
            "end": depth,
        },
        reads=("gradient", "down", "activation", "conv", "bias"),
        writes=("grad_conv", "convolved", "partials"),
        constants={"DEPTH": depth, "INNER": inner, "TAPS": conv.shape[-1], "PRECISION": precision},
        tile=tile,
        flops=2 * rows * depth * inner,
        special=2 * rows * inner,
        loads=(tile["BLOCK_M"] + tile["BLOCK_N"]) * depth + (conv.shape[-1] + 2) * tile["BLOCK_M"] * tile["BLOCK_N"],
    )


def gate_up_backward(
    h1: Buffer,
    gate_up: Buffer,
    grad_conv: Buffer,
    conv: Buffer,
    grad_gate_up: Buffer,
    *,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """From the gradient of the convolution's output to those of gate and up.

    Args:
        h1: input of the channel mixer, [B, L, D].
        gate_up: [2I, D].
        grad_conv: [B, L, I], from :func:`conv_swiglu_backward`.
        conv: taps [I, 1, k].
        grad_gate_up: result [B, L, 2 I].
        tile: BLOCK_M tokens, BLOCK_N inner columns, BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    (length, depth), rows = h1.shape[-2:], prod(h1.shape[:-1])
    inner = grad_conv.shape[-1]
    return Launch.of(
        "conv_swiglu_backward.gate_up_backward_kernel",
        (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(inner, tile["BLOCK_N"]),),
        {
            "h1": h1,
            "gate_up": gate_up,
            "grad_conv": grad_conv,
            "conv": conv,
            "grad_gate_up": grad_gate_up,
            "rows": rows,
            "length": length,
            "end": depth,
        },
        reads=("h1", "gate_up", "grad_conv", "conv"),
        writes=("grad_gate_up",),
        constants={"DEPTH": depth, "INNER": inner, "TAPS": conv.shape[-1], "PRECISION": precision},
        tile=tile,
        flops=4 * rows * depth * inner,
        special=2 * rows * inner,
        loads=(tile["BLOCK_M"] + 2 * tile["BLOCK_N"]) * depth
        + (conv.shape[-1] + 2) * tile["BLOCK_M"] * tile["BLOCK_N"],
    )


def conv_gradient(partials: Buffer, total_conv: Buffer | None, total_bias: Buffer | None, *, tile: Tile) -> Launch:
    """Adds up partials, in order, into the gradients of taps and bias.

    Args:
        partials: [tiles, k + 1, I] float32.
        total_conv: [I, 1, k] float32, added to; None if the taps need no gradient.
        total_bias: [I] float32, added to; None if the bias needs no gradient.
        tile: BLOCK_M tiles at a time, BLOCK_N columns.
    """
    tiles, sums, inner = partials.shape
    return Launch.of(
        "conv_swiglu_backward.conv_gradient_kernel",
        (triton.cdiv(inner, tile["BLOCK_N"]), sums),
        {"partials": partials, "total_conv": total_conv, "total_bias": total_bias, "tiles": tiles},
        reads=("partials", "total_conv", "total_bias"),
        writes=("total_conv", "total_bias"),
        constants={"INNER": inner, "TAPS": sums - 1},
        tile=tile,
    )
