"""Gradients through URM's SwiGLU: ``down(silu(bias + conv(act)))`` with ``act = silu(gate) * up``.

The depthwise convolution reaches over neighbouring tokens, so its gradient needs finished rows, and the chain is cut
there:

* conv_swiglu_backward: a program owns [BLOCK_M tokens, BLOCK_N inner columns]; the product ds2 @ down over D gives
  the gradient of z = silu(c) in its accumulators.  c = bias + conv(act) is made again from act, one load a tap.
  Writes grad c and z, [T, I] each, and for each tile of tokens the sums over its tokens that make up the gradients of
  taps and bias (partials). Reads D + I (act), writes 2 I elements a token; 2 D I FLOP.
* gate_up_backward: makes gate and up again (product over D), correlates grad c with the taps for the gradient of act,
  writes the gradient of gate and up.  Reads D + I, writes 2 I elements a token; 4 D I FLOP.
* conv_gradient: adds the partials to the gradients of taps and bias; a few megabytes.

Tokens are flattened, and a tap that reaches out of its sequence reads zero.
"""

import triton
import triton.language as tl
from trmfast.kernels.dot import dot
from trmfast.kernels.gradients import swiglu_gradient
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = ["conv_gradient", "conv_partials_shape", "conv_swiglu_backward", "gate_up_backward"]


@triton.jit
def _load_shifted(pointer, row, column, mask, length, SHIFT: tl.constexpr, INNER: tl.constexpr):
    """Rows of their own sequence that lie SHIFT tokens further on, zero outside of it; float32."""
    position = row % length + SHIFT
    inside = mask & ((position >= 0) & (position < length))[:, None]
    at = (row + SHIFT)[:, None].to(tl.int64) * INNER + column[None, :]
    return tl.load(pointer + at, inside, 0.0).to(tl.float32)


@triton.jit
def conv_swiglu_backward_kernel(
    gradient,
    down,
    activation,
    conv,
    bias,
    grad_conv,
    mixed,
    partials,
    rows,
    length,
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
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    row_inside = row < rows
    column_inside = column < INNER
    gradient_at = gradient + row[:, None].to(tl.int64) * DEPTH + step[None, :]
    down_at = down + step[:, None] * INNER + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            gradient_mask = row_inside[:, None]
            down_mask = column_inside[None, :]
        else:
            left = step < DEPTH - k
            gradient_mask = row_inside[:, None] & left[None, :]
            down_mask = left[:, None] & column_inside[None, :]
        g = tl.load(gradient_at, gradient_mask, 0.0)
        total = dot(g, tl.load(down_at, down_mask, 0.0), total, PRECISION)
        gradient_at += BLOCK_K
        down_at += BLOCK_K * INNER

    mask = row_inside[:, None] & column_inside[None, :]
    dtype = mixed.dtype.element_ty
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(bias + column, column_inside, 0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        weight = tl.load(conv + column * TAPS + tap, column_inside, 0.0).to(tl.float32)
        c += _load_shifted(activation, row, column, mask, length, tap - TAPS // 2, INNER) * weight[None, :]
    c = c.to(dtype).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-c))
    z = c * sigmoid
    grad_c = total * (sigmoid + z * (1.0 - sigmoid))
    at = row[:, None].to(tl.int64) * INNER + column[None, :]
    tl.store(mixed + at, z.to(dtype), mask)
    tl.store(grad_conv + at, grad_c.to(dtype), mask)
    if partials is not None:
        sums = partials + row_tile.to(tl.int64) * (TAPS + 1) * INNER + column
        for tap in tl.static_range(TAPS):
            act = _load_shifted(activation, row, column, mask, length, tap - TAPS // 2, INNER)
            tl.store(sums + tap * INNER, tl.sum(grad_c * act, 0), column_inside)
        tl.store(sums + TAPS * INNER, tl.sum(grad_c, 0), column_inside)


@triton.jit
def gate_up_backward_kernel(
    hidden,
    gate_up,
    grad_conv,
    conv,
    grad_gate_up,
    rows,
    length,
    DEPTH: tl.constexpr,
    INNER: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // COLUMN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    row_inside = row < rows
    column_inside = column < INNER
    hidden_at = hidden + row[:, None].to(tl.int64) * DEPTH + step[None, :]
    gate_at = gate_up + column[:, None] * DEPTH + step[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            hidden_mask = row_inside[:, None]
            gate_mask = column_inside[:, None]
        else:
            left = step < DEPTH - k
            hidden_mask = row_inside[:, None] & left[None, :]
            gate_mask = column_inside[:, None] & left[None, :]
        h = tl.load(hidden_at, hidden_mask, 0.0)
        gate = dot(h, tl.load(gate_at, gate_mask, 0.0).T, gate, PRECISION)
        up = dot(h, tl.load(gate_at + INNER * DEPTH, gate_mask, 0.0).T, up, PRECISION)
        hidden_at += BLOCK_K
        gate_at += BLOCK_K

    mask = row_inside[:, None] & column_inside[None, :]
    grad_activation = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in tl.static_range(TAPS):
        weight = tl.load(conv + column * TAPS + tap, column_inside, 0.0).to(tl.float32)
        grad_activation += _load_shifted(grad_conv, row, column, mask, length, TAPS // 2 - tap, INNER) * weight[None, :]
    grad_gate, grad_up, _ = swiglu_gradient(gate, up, grad_activation)
    at = row[:, None].to(tl.int64) * (2 * INNER) + column[None, :]
    dtype = grad_gate_up.dtype.element_ty
    tl.store(grad_gate_up + at, grad_gate.to(dtype), mask)
    tl.store(grad_gate_up + at + INNER, grad_up.to(dtype), mask)


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
    mixed: Buffer,
    partials: Buffer | None,
    tile: Tile,
    *,
    length: int,
    precision: str = "ieee",
) -> Launch:
    """From the gradient of the block's channel mixer back through the convolution.

    Args:
        gradient: ds2 [T, D].
        down: [D, I].
        activation: ``silu(gate) * up`` [T, I], as the forward kernel wrote it.
        conv: taps [I, 1, k].
        bias: [I].
        grad_conv: result [T, I], the gradient of the convolution's output.
        mixed: result z [T, I], the input of the down projection.
        partials: result float32 of :func:`conv_partials_shape`, for :func:`conv_gradient`; None if neither conv nor
            bias needs a gradient.
        tile: BLOCK_M tokens, BLOCK_N inner columns, BLOCK_K.
        length: L.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    rows, depth = gradient.shape
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
            "mixed": mixed,
            "partials": partials,
            "rows": rows,
            "length": length,
        },
        reads=("gradient", "down", "activation", "conv", "bias"),
        writes=("grad_conv", "mixed", "partials"),
        constants={"DEPTH": depth, "INNER": inner, "TAPS": conv.shape[-1], "PRECISION": precision},
        tile=tile,
        flops=2 * rows * depth * inner,
    )


def gate_up_backward(
    hidden: Buffer,
    gate_up: Buffer,
    grad_conv: Buffer,
    conv: Buffer,
    grad_gate_up: Buffer,
    tile: Tile,
    *,
    length: int,
    precision: str = "ieee",
) -> Launch:
    """From the gradient of the convolution's output to those of gate and up.

    Args:
        hidden: input of the channel mixer, h1 [T, D].
        gate_up: [2I, D].
        grad_conv: [T, I], from :func:`conv_swiglu_backward`.
        conv: taps [I, 1, k].
        grad_gate_up: result [T, 2I].
        tile: BLOCK_M tokens, BLOCK_N inner columns, BLOCK_K.
        length: L.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    rows, depth = hidden.shape
    inner = grad_conv.shape[1]
    return Launch.of(
        "conv_swiglu_backward.gate_up_backward_kernel",
        (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(inner, tile["BLOCK_N"]),),
        {
            "hidden": hidden,
            "gate_up": gate_up,
            "grad_conv": grad_conv,
            "conv": conv,
            "grad_gate_up": grad_gate_up,
            "rows": rows,
            "length": length,
        },
        reads=("hidden", "gate_up", "grad_conv", "conv"),
        writes=("grad_gate_up",),
        constants={"DEPTH": depth, "INNER": inner, "TAPS": conv.shape[-1], "PRECISION": precision},
        tile=tile,
        flops=4 * rows * depth * inner,
    )


def conv_gradient(partials: Buffer, total_conv: Buffer | None, total_bias: Buffer | None, tile: Tile) -> Launch:
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
