"""Gradients of the SwiGLU over the sequence and of the norm over the sequence that follows it.

The norm ``h1 = r * s`` runs over the L rows of one column, s = h + mixer(h).  Sequences up to 128 fit a tile whole:

* mlp_t_backward: a program owns BLOCK_N columns of one sequence, all L rows; the columns are the rows of its products,
  as queries are in attention.  It differentiates the norm in registers, walks the inner width It in steps of BLOCK_I,
  recomputes gate and up, and adds both products of their gradients to the gradient of h.  The intermediates, It / L = 5
  times as large as the state, never leave the chip.
  Reads 3 D (grad h1, h1, h), writes 2 D (ds1 and grad h) elements a token; 10 It D FLOP a token, and the weights of
  some 300 KB come from L2 or L1.
* mlp_t_weight_gradient: a program owns BLOCK_I inner rows of both weights' gradients, three [L, BLOCK_I] in float32
  registers, holds the weights' rows, and walks its share of the (sequence, BLOCK_N columns) pairs.  It recomputes gate,
  up and the activation's gradient from h and ds1: 2 D elements a token read, nothing written but the weights'
  gradients, 12 It D FLOP a token instead of 6, where storing the intermediates would move 6 It / L = 32 D
  elements a token.  Splits as in weight_gradient: split s owns total[s].

Longer sequences: mlp_t_norm_backward (two passes over L; reads 2 D, writes D), then the transposed forms of
swiglu_backward, projection_backward and weight_gradient.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.gradients import norm_gradient, store_targets, swiglu_gradient
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection_backward import part_targets

__all__ = ["mlp_t_backward", "mlp_t_norm_backward", "mlp_t_weight_gradient"]


@triton.jit
def _load_weights(
    gate_up,
    down,
    inner,
    INNER: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Rows ``inner`` of gate and up, [inner, BLOCK_L], and columns ``inner`` of down, [BLOCK_L, inner]."""
    position = tl.arange(0, BLOCK_L)
    at = gate_up + inner[:, None] * STRIDE + position[None, :]
    down_at = down + position[:, None] * INNER + inner[None, :]
    inside = (position < LENGTH)[:, None]
    if EVEN and STRIDE >= BLOCK_L:
        return tl.load(at), tl.load(at + INNER * STRIDE), tl.load(down_at, inside, 0.0)
    gate_inside = (inner < INNER)[:, None] & (position < LENGTH)[None, :]
    inside = inside & (inner < INNER)[None, :]
    return tl.load(at, gate_inside, 0.0), tl.load(at + INNER * STRIDE, gate_inside, 0.0), tl.load(down_at, inside, 0.0)


@triton.jit
def mlp_t_backward_kernel(
    source,
    gradient,
    norm_output,
    rstd,
    gate_up,
    down,
    grad_sum,
    out,
    added,
    overwritten,
    end,  # INNER, at run time: a constant trip count would be unrolled and use more registers
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    EVEN: tl.constexpr = INNER % BLOCK_I == 0
    position = tl.arange(0, BLOCK_L)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    column_inside = column < WIDTH
    mask = (position < LENGTH)[:, None]
    if WIDTH % BLOCK_N != 0:
        mask = mask & column_inside[None, :]
    at = batch * LENGTH * WIDTH + position[:, None] * WIDTH + column[None, :]
    dtype: tl.constexpr = source.dtype.element_ty

    grad = tl.load(gradient + at, mask, 0.0).to(tl.float32)
    y = tl.load(norm_output + at, mask, 0.0).to(tl.float32)
    grad_s = norm_gradient(grad, y, tl.load(rstd + batch * WIDTH + column, column_inside, 0.0)[None, :], LENGTH, 0)
    total = tl.trans(grad_s)  # the residual's share; [BLOCK_N, BLOCK_L] from here on
    if grad_sum is not None:
        tl.store(grad_sum + at, narrow(grad_s, dtype), mask)
    grad_s = narrow(total, dtype)
    if dtype == tl.float32:  # it comes last, as in projection.begin_sum
        total = tl.zeros((BLOCK_N, BLOCK_L), tl.float32)
    h = tl.trans(tl.load(source + at, mask, 0.0))
    zero = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    for first in range(0, end, BLOCK_I):
        inner = first + tl.arange(0, BLOCK_I)
        gate_weight, up_weight, down_weight = _load_weights(gate_up, down, inner, INNER, LENGTH, STRIDE, EVEN, BLOCK_L)
        gate = dot(h, tl.trans(gate_weight), zero, PRECISION)
        up = dot(h, tl.trans(up_weight), zero, PRECISION)
        grad_activation = dot(grad_s, down_weight, zero, PRECISION)
        grad_gate, grad_up, _ = swiglu_gradient(gate, up, grad_activation)
        total = dot(narrow(grad_gate, dtype), gate_weight, total, PRECISION)
        total = dot(narrow(grad_up, dtype), up_weight, total, PRECISION)
    if dtype == tl.float32:
        total += grad_s

    total = tl.trans(total)
    if out is not None:
        tl.store(out + at, narrow(total, out.dtype.element_ty), mask)
    store_targets(added, overwritten, at, mask, total)


@triton.jit
def mlp_t_weight_gradient_kernel(
    source,
    grad_sum,
    gate_up,
    down,
    total_gate_up,
    total_down,
    batches,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = INNER % BLOCK_I == 0
    position = tl.arange(0, BLOCK_L)
    inner = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    split = tl.program_id(1)
    dtype: tl.constexpr = source.dtype.element_ty
    gate_weight, up_weight, down_weight = _load_weights(gate_up, down, inner, INNER, LENGTH, STRIDE, EVEN, BLOCK_L)
    zero = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    sum_gate = tl.zeros((BLOCK_L, BLOCK_I), tl.float32)
    sum_up = tl.zeros((BLOCK_L, BLOCK_I), tl.float32)
    sum_down = tl.zeros((BLOCK_L, BLOCK_I), tl.float32)
    steps = batches * TILES
    share = tl.cdiv(steps, SPLITS)
    for i in range(split * share, tl.minimum((split + 1) * share, steps)):
        column = i % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (position < LENGTH)[:, None]
        if WIDTH % BLOCK_N != 0:
            mask = mask & (column < WIDTH)[None, :]
        at = tl.cast(i // TILES, tl.int64) * LENGTH * WIDTH + position[:, None] * WIDTH + column[None, :]
        h = tl.load(source + at, mask, 0.0)
        grad_s = tl.load(grad_sum + at, mask, 0.0)
        gate = dot(tl.trans(h), tl.trans(gate_weight), zero, PRECISION)
        up = dot(tl.trans(h), tl.trans(up_weight), zero, PRECISION)
        grad_activation = dot(tl.trans(grad_s), down_weight, zero, PRECISION)
        grad_gate, grad_up, act = swiglu_gradient(gate, up, grad_activation)
        if total_gate_up is not None:
            sum_gate = dot(h, narrow(grad_gate, dtype), sum_gate, PRECISION)
            sum_up = dot(h, narrow(grad_up, dtype), sum_up, PRECISION)
        if total_down is not None:
            sum_down = dot(grad_s, narrow(act, dtype), sum_down, PRECISION)

    inside = (position < LENGTH)[:, None] & (inner < INNER)[None, :]
    if total_gate_up is not None:
        at = total_gate_up + split.to(tl.int64) * 2 * INNER * LENGTH + inner[None, :] * LENGTH + position[:, None]
        tl.store(at, tl.load(at, inside, 0.0) + sum_gate, inside)
        at += INNER * LENGTH
        tl.store(at, tl.load(at, inside, 0.0) + sum_up, inside)
    if total_down is not None:
        at = total_down + split.to(tl.int64) * LENGTH * INNER + position[:, None] * INNER + inner[None, :]
        tl.store(at, tl.load(at, inside, 0.0) + sum_down, inside)


@triton.jit
def mlp_t_norm_backward_kernel(
    gradient,
    norm_output,
    rstd,
    out,
    end,  # LENGTH, at run time: a constant trip count would be unrolled and use more registers
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    column_inside = column < WIDTH
    start = batch * LENGTH * WIDTH
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, end, BLOCK_M):
        position = first + tl.arange(0, BLOCK_M)
        mask = (position < LENGTH)[:, None]
        if WIDTH % BLOCK_N != 0:
            mask = mask & column_inside[None, :]
        at = start + position[:, None] * WIDTH + column[None, :]
        grad = tl.load(gradient + at, mask, 0.0).to(tl.float32)
        sums += grad * tl.load(norm_output + at, mask, 0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / LENGTH
    r = tl.load(rstd + batch * WIDTH + column, column_inside, 0.0)
    for first in range(0, end, BLOCK_M):
        position = first + tl.arange(0, BLOCK_M)
        mask = (position < LENGTH)[:, None]
        if WIDTH % BLOCK_N != 0:
            mask = mask & column_inside[None, :]
        at = start + position[:, None] * WIDTH + column[None, :]
        grad = tl.load(gradient + at, mask, 0.0).to(tl.float32)
        y = tl.load(norm_output + at, mask, 0.0).to(tl.float32)
        tl.store(out + at, narrow(r[None, :] * (grad - y * mean[None, :]), out.dtype.element_ty), mask)


def _block_l(length: int) -> int:
    return max(16, triton.next_power_of_2(length))


def mlp_t_backward(
    source: Buffer,
    gradient: Buffer,
    norm_output: Buffer,
    rstd: Buffer,
    gate_up: Buffer,
    down: Buffer,
    grad_sum: Buffer | None,
    out: Buffer | None,
    *,
    tile: Tile,
    targets: Sequence[tuple[Buffer, bool]] = (),
    precision: str = "ieee",
) -> Launch:
    """Gradient of the block's input from that of h1, for a sequence that fits a tile.

    Args:
        source: h, the block's input, [B, L, D].
        gradient: of h1, [B, L, D].
        norm_output: h1, [B, L, D].
        rstd: of the norm over the sequence, [B, D] float32.
        gate_up: [2 It, W] with W >= L, zeros from L on.
        down: [L, It].
        grad_sum: result ds1 [B, L, D], which :func:`mlp_t_weight_gradient` takes; None if not needed.
        out: result, the gradient of h, [B, L, D]; None if there are targets only.
        tile: BLOCK_N columns, BLOCK_I inner rows a step.
        targets: as in :func:`projection_backward`.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    batch, length, width = source.shape
    inner = down.shape[1]
    added, overwritten = part_targets(targets)
    return Launch.of(
        "mixer_mlp_t_backward.mlp_t_backward_kernel",
        (triton.cdiv(width, tile["BLOCK_N"]), batch),
        {
            "source": source,
            "gradient": gradient,
            "norm_output": norm_output,
            "rstd": rstd,
            "gate_up": gate_up,
            "down": down,
            "grad_sum": grad_sum,
            "out": out,
            "added": added,
            "overwritten": overwritten,
            "end": inner,
        },
        reads=("source", "gradient", "norm_output", "rstd", "gate_up", "down", "added"),
        writes=("grad_sum", "out", "added", "overwritten"),
        constants={
            "WIDTH": width,
            "LENGTH": length,
            "INNER": inner,
            "STRIDE": gate_up.shape[1],
            "PRECISION": precision,
            "BLOCK_L": _block_l(length),
        },
        tile=tile,
        flops=10 * batch * width * length * inner,
        special=2 * batch * width * inner,
        loads=(5 * tile["BLOCK_N"] + 3 * inner) * length,
    )


def mlp_t_weight_gradient(
    source: Buffer,
    grad_sum: Buffer,
    gate_up: Buffer,
    down: Buffer,
    total_gate_up: Buffer | None,
    total_down: Buffer | None,
    *,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """Adds to the gradients of the mixer's weights, for a sequence that fits a tile.

    Args:
        source: h, the block's input, [B, L, D].
        grad_sum: ds1 [B, L, D].
        gate_up: [2 It, W] with W >= L, zeros from L on.
        down: [L, It].
        total_gate_up: [splits, 2 It, L] float32, added to; None if not requested.
        total_down: [splits, L, It] float32, added to; None if not requested.
        tile: BLOCK_N columns a step, BLOCK_I inner rows.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: no totals, or of different splits.
    """
    found = {total.shape[0] for total in (total_gate_up, total_down) if total is not None}
    if len(found) != 1:
        raise ValueError(f"total_gate_up, total_down: got {sorted(found)} splits, accepted is one number for both")
    splits = found.pop()
    batch, length, width = source.shape
    inner = down.shape[1]
    wanted = 2 * (total_gate_up is not None) + (total_down is not None)
    return Launch.of(
        "mixer_mlp_t_backward.mlp_t_weight_gradient_kernel",
        (triton.cdiv(inner, tile["BLOCK_I"]), splits),
        {
            "source": source,
            "grad_sum": grad_sum,
            "gate_up": gate_up,
            "down": down,
            "total_gate_up": total_gate_up,
            "total_down": total_down,
            "batches": batch,
        },
        reads=("source", "grad_sum", "gate_up", "down", "total_gate_up", "total_down"),
        writes=("total_gate_up", "total_down"),
        constants={
            "WIDTH": width,
            "LENGTH": length,
            "INNER": inner,
            "STRIDE": gate_up.shape[1],
            "SPLITS": splits,
            "PRECISION": precision,
            "BLOCK_L": _block_l(length),
        },
        tile=tile,
        flops=2 * (3 + wanted) * batch * width * length * inner,
        special=2 * batch * width * inner,
        loads=2 * length * width * batch // splits + 12 * tile["BLOCK_I"] * length,
    )


def mlp_t_norm_backward(gradient: Buffer, norm_output: Buffer, rstd: Buffer, out: Buffer, *, tile: Tile) -> Launch:
    """From the gradient of h1, a norm over the sequence of s, to that of s.

    Args:
        gradient: of h1, [B, L, D].
        norm_output: h1, [B, L, D].
        rstd: [B, D] float32.
        out: result [B, L, D].
        tile: BLOCK_M positions a step, BLOCK_N columns.
    """
    batch, length, width = norm_output.shape
    return Launch.of(
        "mixer_mlp_t_backward.mlp_t_norm_backward_kernel",
        (triton.cdiv(width, tile["BLOCK_N"]), batch),
        {"gradient": gradient, "norm_output": norm_output, "rstd": rstd, "out": out, "end": length},
        reads=("gradient", "norm_output", "rstd"),
        writes=("out",),
        constants={"WIDTH": width, "LENGTH": length},
        tile=tile,
    )
