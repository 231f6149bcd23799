"""Gradients through a SwiGLU ``down(silu(gate) * up)``, up to those of gate and up, which are recomputed.

One program owns a tile [BLOCK_M rows, BLOCK_N inner columns] and walks the depth D in steps of BLOCK_K with three
float32 accumulators of that tile: gate and up from the input h1 and gate_up_proj, the activation's gradient from ds2
and down_proj. A step loads [BLOCK_M, BLOCK_K] of h1 and ds2 and three weight tiles [BLOCK_N, BLOCK_K] for 6 BLOCK_M
BLOCK_N BLOCK_K FLOP. Programs of one row tile are neighbours, so that its rows come from L2 for all column tiles but
the first.

Reads h1 and ds2 [T, D], writes the gradient of gate and up [T, 2I] and the activation [T, I], which the gradient of
down_proj needs: (2 D + 3 I) * size bytes and 6 D I FLOP a token.  Recomputing gate and up takes 4 of these 6 D I; if
the forward kernel stored them, they would move 4 I * size more bytes a token.  Without a gate there is one accumulator
and one weight tile less, and half of the gradient: 4 D I FLOP.

Transposed, for the mixer over the sequence: the rows of the product are the columns of the state, h is [B, L, D] and
the intermediates are [B, inner, D], so that memory is contiguous along rows of the product instead of along its depth
L.
"""

from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.gradients import activation_gradient, swiglu_gradient
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = ["swiglu_backward"]


@triton.jit
def swiglu_backward_kernel(
    source,
    gradient,
    gate_up,
    down,
    grad_gate_up,
    activation,
    rows,
    end,  # DEPTH, at run time: a constant trip count would be unrolled and use more registers
    DEPTH: tl.constexpr,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,  # of the rows of gate_up
    ACTIVATION: tl.constexpr,  # "swiglu", or "relu2" or "gelu" without a gate
    CHANNELS: tl.constexpr,  # D if transposed, otherwise 0
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    PARTS: tl.constexpr = 2 if GATED else 1
    UP: tl.constexpr = INNER * STRIDE if GATED else 0  # where the rows of the up projection begin
    PADDED: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K * BLOCK_K <= STRIDE
    first_row = tl.program_id(0) // COLUMN_TILES * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_inside = row < rows - first_row
    first_column = tl.program_id(0) % COLUMN_TILES * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    column_inside = column < INNER
    near_column = column
    if INNER % BLOCK_N != 0:
        near_column = tl.minimum(column, INNER - 1)
    step = tl.arange(0, BLOCK_K)
    if CHANNELS > 0:
        batch = tl.program_id(1).to(tl.int64)
        start = batch * DEPTH * CHANNELS + first_row
        near_row = row
        if CHANNELS % BLOCK_M != 0:
            near_row = tl.minimum(row, rows - first_row - 1)
        offsets = near_row[:, None] + step[None, :] * CHANNELS
        pitch = CHANNELS
    else:
        start = first_row.to(tl.int64) * DEPTH
        offsets = tl.minimum(row, rows - first_row - 1)[:, None] * DEPTH + step[None, :]
        pitch = 1
    gate_offsets = near_column[:, None] * STRIDE + step[None, :]
    down_offsets = step[:, None] * INNER + near_column[None, :]

    if GATED:
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    grad_activation = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, end, BLOCK_K):
        at = start + k * pitch
        if DEPTH % BLOCK_K == 0:
            h = tl.load(source + at + offsets)
            g = tl.load(gradient + at + offsets)
            down_tile = tl.load(down + k * INNER + down_offsets)
        else:
            left = step < DEPTH - k
            h = tl.load(source + at + offsets, left[None, :], 0.0)
            g = tl.load(gradient + at + offsets, left[None, :], 0.0)
            down_tile = tl.load(down + k * INNER + down_offsets, left[:, None], 0.0)
        if PADDED:
            if GATED:
                gate_tile = tl.load(gate_up + k + gate_offsets)
            up_tile = tl.load(gate_up + UP + k + gate_offsets)
        else:
            left = step < DEPTH - k
            if GATED:
                gate_tile = tl.load(gate_up + k + gate_offsets, left[None, :], 0.0)
            up_tile = tl.load(gate_up + UP + k + gate_offsets, left[None, :], 0.0)
        if GATED:
            gate = dot(h, tl.trans(gate_tile), gate, PRECISION)
        up = dot(h, tl.trans(up_tile), up, PRECISION)
        grad_activation = dot(g, down_tile, grad_activation, PRECISION)

    if GATED:
        grad_gate, grad_up, act = swiglu_gradient(gate, up, grad_activation)
    else:
        grad_up, act = activation_gradient(up, grad_activation, ACTIVATION)
    mask = row_inside[:, None] & column_inside[None, :]
    dtype: tl.constexpr = grad_gate_up.dtype.element_ty
    if CHANNELS > 0:
        start = tl.program_id(1).to(tl.int64) * INNER * CHANNELS + first_row
        offsets = column[None, :] * CHANNELS + row[:, None]
        result = grad_gate_up + 2 * start - first_row + offsets
        half = INNER * CHANNELS
    else:
        start = first_row.to(tl.int64) * INNER
        offsets = row[:, None] * INNER + column[None, :]
        result = grad_gate_up + PARTS * start + row[:, None] * (PARTS * INNER) + column[None, :]
        half = INNER
    if GATED:
        tl.store(result, narrow(grad_gate, dtype), mask)
        tl.store(result + half, narrow(grad_up, dtype), mask)
    else:
        tl.store(result, narrow(grad_up, dtype), mask)
    if activation is not None:
        tl.store(activation + start + offsets, narrow(act, dtype), mask)


def swiglu_backward(
    source: Buffer,
    gradient: Buffer,
    gate_up: Buffer,
    down: Buffer,
    grad_gate_up: Buffer,
    activation: Buffer | None = None,
    *,
    tile: Tile,
    activation_of: str = "swiglu",
    transposed: bool = False,
    precision: str = "ieee",
) -> Launch:
    """From the gradient of a SwiGLU's output to those of gate and up.

    Args:
        source: its input, [..., D]; transposed [B, L, D].
        gradient: of its output, the shape of ``source``.
        gate_up: [2 I, D], [I, D] without a gate, or transposed [2 I, W] with W >= L, zeros from L on.
        down: [D, I]; transposed [L, I].
        grad_gate_up: result, [..., 2 I], or [..., I] without a gate; transposed [B, 2 I, D].
        activation: result ``silu(gate) * up``, or what ``activation_of`` says, [..., I]; transposed [B, I, D]; None if
            not needed.
        tile: BLOCK_M rows, BLOCK_N inner columns, BLOCK_K.
        activation_of: ``"swiglu"``, ``"relu2"`` or ``"gelu"``.
        transposed: whether the product runs over the sequence.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    depth, inner = down.shape
    products = gate_up.shape[0] // inner
    rows = source.shape[-1] if transposed else prod(source.shape[:-1])
    batch = source.shape[0] if transposed else 1
    tiles = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(inner, tile["BLOCK_N"])
    return Launch.of(
        "swiglu_backward.swiglu_backward_kernel",
        (tiles, batch),
        {
            "source": source,
            "gradient": gradient,
            "gate_up": gate_up,
            "down": down,
            "grad_gate_up": grad_gate_up,
            "activation": activation,
            "rows": rows,
            "end": depth,
        },
        reads=("source", "gradient", "gate_up", "down"),
        writes=("grad_gate_up", "activation"),
        constants={
            "DEPTH": depth,
            "INNER": inner,
            "STRIDE": gate_up.shape[1],
            "ACTIVATION": activation_of,
            "CHANNELS": rows if transposed else 0,
            "PRECISION": precision,
        },
        tile=tile,
        flops=2 * (products + 1) * batch * rows * depth * inner,
        special={"relu2": 0}.get(activation_of, 2) * batch * rows * inner,
        loads=(2 * tile["BLOCK_M"] + (products + 1) * tile["BLOCK_N"]) * depth
        + (products + 1) * tile["BLOCK_M"] * tile["BLOCK_N"],
    )
