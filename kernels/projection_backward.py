"""Gradient of the input of a linear layer, with what follows it in backward.

    out = gradient [T, K] @ weight [K, N] (+ residual [T, N])

One program owns a tile [BLOCK_M, BLOCK_N] of out in float32 accumulators and walks K in steps of BLOCK_K.  ``weight``
in torch's layout [out features, in features] is the right operand as it lies in memory.  The epilogue, on the
accumulators, is one of:

* plain: out is stored in its dtype;
* norm: out is the gradient of y = norm(s), which is ``norm_output``; its gradient with respect to s is stored instead.
  Needs whole rows in a program: BLOCK_N >= N;
* targets: out is the gradient of a sum of states; it is added to, or overwrites, the float32 gradient of each state.

Reads (K + N [residual] + N [norm]) and writes N elements a token, beside the weight, for 2 K N FLOP; 8 N bytes for
each target that is added to and 4 N for one that is overwritten.  Programs of one row tile are neighbours and share
its rows through L2.

Transposed, for the mixer over the sequence: the rows of the product are the columns of the state, gradient is [B, K,
D], out and residual are [B, N, D] with N = L.
"""

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.gradients import store_targets
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = ["MAX_TARGETS", "part_targets", "projection_backward"]

MAX_TARGETS = 8


@triton.jit
def projection_backward_kernel(
    gradient,
    weight,
    residual,
    norm_output,
    rstd,
    out,
    added,
    overwritten,
    rows,
    end,  # DEPTH, at run time: a constant trip count would be unrolled and use more registers
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,  # of the rows of weight
    CHANNELS: tl.constexpr,  # D if transposed, otherwise 0
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    first_row = tl.program_id(0) // COLUMN_TILES * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_inside = row < rows - first_row
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    if CHANNELS > 0:
        batch = tl.program_id(1).to(tl.int64)
        near_row = row
        if CHANNELS % BLOCK_M != 0:
            near_row = tl.minimum(row, rows - first_row - 1)
        start = batch * DEPTH * CHANNELS + first_row
        offsets = near_row[:, None] + step[None, :] * CHANNELS
        pitch = CHANNELS
        result = batch * WIDTH * CHANNELS + first_row
        result_offsets = column[None, :] * CHANNELS + row[:, None]
    else:
        start = first_row.to(tl.int64) * DEPTH
        offsets = tl.minimum(row, rows - first_row - 1)[:, None] * DEPTH + step[None, :]
        pitch = 1
        result = first_row.to(tl.int64) * WIDTH
        result_offsets = row[:, None] * WIDTH + column[None, :]
    weight_offsets = step[:, None] * STRIDE + column[None, :]

    mask = row_inside[:, None]
    if WIDTH % BLOCK_N != 0:
        mask = mask & (column < WIDTH)[None, :]
    # As in projection.begin_sum: in 16 bits the residual is added first, in float32 last.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if residual is not None:  # noqa: SIM102 (known when compiled)
        if residual.dtype.element_ty != tl.float32:
            total = tl.load(residual + result + result_offsets, mask, 0.0).to(tl.float32)
    for k in range(0, end, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            g = tl.load(gradient + start + k * pitch + offsets)
            if COLUMN_TILES * BLOCK_N <= STRIDE:
                w = tl.load(weight + k * STRIDE + weight_offsets)
            else:
                w = tl.load(weight + k * STRIDE + weight_offsets, (column < STRIDE)[None, :], 0.0)
        else:
            left = step < DEPTH - k
            g = tl.load(gradient + start + k * pitch + offsets, left[None, :], 0.0)
            w = tl.load(weight + k * STRIDE + weight_offsets, left[:, None] & (column < STRIDE)[None, :], 0.0)
        total = dot(g, w, total, PRECISION)
    if residual is not None:  # noqa: SIM102
        if residual.dtype.element_ty == tl.float32:
            total += tl.load(residual + result + result_offsets, mask, 0.0)

    if norm_output is not None:
        y_at = norm_output + result + result_offsets
        mean = tl.sum(total * tl.load(y_at, mask, 0.0).to(tl.float32), 1) / WIDTH
        tl.debug_barrier()  # y is loaded twice: keeping it would need extra registers
        y = tl.load(y_at, mask, 0.0).to(tl.float32)
        scale = tl.load(rstd + first_row + row, row_inside, 0.0)
        total = scale[:, None] * (total - y * mean[:, None])
    if out is not None:
        tl.store(out + result + result_offsets, narrow(total, out.dtype.element_ty), mask)
    store_targets(added, overwritten, result + result_offsets, mask, total)


def part_targets(targets: Sequence[tuple[Buffer, bool]]) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
    """Those that a gradient is added to, and those that it overwrites.

    Args:
        targets: buffers, and whether to add to what they hold.

    Raises:
        ValueError: more than 8.
    """
    if len(targets) > MAX_TARGETS:
        raise ValueError(f"targets: got {len(targets)}, accepted are at most {MAX_TARGETS}")
    return tuple(buffer for buffer, add in targets if add), tuple(buffer for buffer, add in targets if not add)


def projection_backward(
    gradient: Buffer,
    weight: Buffer,
    out: Buffer | None = None,
    *,
    tile: Tile,
    residual: Buffer | None = None,
    norm_output: Buffer | None = None,
    rstd: Buffer | None = None,
    targets: Sequence[tuple[Buffer, bool]] = (),
    transposed: bool = False,
    width: int = 0,
    precision: str = "ieee",
) -> Launch:
    """``gradient @ weight (+ residual)``, then the gradient of a norm, or sums into gradients of states.

    Args:
        gradient: of the layer's output, [..., K]; transposed [B, K, D].
        weight: [K, N]; transposed [K, W] with W >= L, zeros from L on.
        out: result [..., N]; transposed [B, L, D]; None if there are targets only.
        tile: BLOCK_M rows, BLOCK_N columns, BLOCK_K; with a norm BLOCK_N >= N.
        residual: added to the product, the shape of ``out``; the gradient that bypasses the layer.
        norm_output: y [..., N] of the norm whose output's gradient the sum is; ``out`` is then the gradient of the
            norm's input.  Not with transposed or targets.
        rstd: of that norm, [...] float32.
        targets: float32 buffers of the shape of ``out``, and whether to add to them (True) or to overwrite them.
        transposed: whether the layer runs over the sequence.
        width: L, if transposed; otherwise N is the weight's.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: BLOCK_N < N with a norm, or a norm with what it excludes.
    """
    depth = weight.shape[0]
    width = width or weight.shape[1]
    rows = gradient.shape[-1] if transposed else prod(gradient.shape[:-1])
    batch = gradient.shape[0] if transposed else 1
    if norm_output is not None and (transposed or targets or tile["BLOCK_N"] < width):
        raise ValueError(
            f"norm_output: got transposed {transposed}, {len(targets)} targets and BLOCK_N {tile['BLOCK_N']}, "
            f"accepted are False, 0 and at least {width}"
        )
    added, overwritten = part_targets(targets)
    return Launch.of(
        "projection_backward.projection_backward_kernel",
        (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]), batch),
        {
            "gradient": gradient,
            "weight": weight,
            "residual": residual,
            "norm_output": norm_output,
            "rstd": rstd,
            "out": out,
            "added": added,
            "overwritten": overwritten,
            "rows": rows,
            "end": depth,
        },
        reads=("gradient", "weight", "residual", "norm_output", "rstd", "added"),
        writes=("out", "added", "overwritten"),
        constants={
            "DEPTH": depth,
            "WIDTH": width,
            "STRIDE": weight.shape[1],
            "CHANNELS": rows if transposed else 0,
            "PRECISION": precision,
        },
        tile=tile,
        flops=2 * batch * rows * depth * width,
        loads=(tile["BLOCK_M"] + tile["BLOCK_N"]) * depth + 2 * tile["BLOCK_M"] * tile["BLOCK_N"],
    )
