"""Gradients through a SwiGLU ``down(silu(gate) * up)``, up to those of gate and up, which are recomputed.

One program owns a tile [BLOCK_M rows, BLOCK_N inner columns] and walks the depth D in steps of BLOCK_K with three
float32 accumulators of that tile: gate and up from the input h1 and gate_up_proj, the activation's gradient from ds2
and down_proj. A step loads [BLOCK_M, BLOCK_K] of h1 and ds2 and three weight tiles [BLOCK_N, BLOCK_K] for 6 BLOCK_M
BLOCK_N BLOCK_K FLOP. Programs of one row tile are neighbours, so that its rows come from L2 for all column tiles but
the first.

Reads h1 and ds2 [T, D], writes the gradient of gate and up [T, 2I] and the activation [T, I], which the gradient of
down_proj needs: (2 D + 3 I) * size bytes and 6 D I FLOP a token.  Gate and up are made again for 4 of these 6 D I:
stored by the forward kernel, they would move 4 I * size bytes a token more.

Transposed, for the mixer over the sequence: the rows of the product are the columns of the state, h is [B, L, D] and
the intermediates are [B, inner, D], so that memory is contiguous along rows of the product instead of along its depth
L.
"""

import triton
import triton.language as tl
from trmfast.kernels.dot import dot
from trmfast.kernels.gradients import swiglu_gradient
from trmfast.kernels.plan import Buffer, Launch, Tile

__all__ = ["swiglu_backward"]


@triton.jit
def swiglu_backward_kernel(
    hidden,
    gradient,
    gate_up,
    down,
    grad_gate_up,
    activation,
    rows,
    DEPTH: tl.constexpr,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // COLUMN_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % COLUMN_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    batch = tl.program_id(1).to(tl.int64)
    row_inside = row < rows
    column_inside = column < INNER

    if TRANSPOSED:
        source = batch * DEPTH * rows + row[:, None] + step[None, :] * rows
        source_step = BLOCK_K * rows
    else:
        source = row[:, None].to(tl.int64) * DEPTH + step[None, :]
        source_step = BLOCK_K
    hidden_at = hidden + source
    gradient_at = gradient + source
    gate_at = gate_up + column[:, None] * STRIDE + step[None, :]
    down_at = down + step[:, None] * INNER + column[None, :]

    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    grad_activation = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            source_mask = row_inside[:, None]
            gate_mask = column_inside[:, None]
            down_mask = column_inside[None, :]
        else:
            left = step < DEPTH - k
            source_mask = row_inside[:, None] & left[None, :]
            gate_mask = column_inside[:, None] & left[None, :]
            down_mask = left[:, None] & column_inside[None, :]
        h = tl.load(hidden_at, source_mask, 0.0)
        g = tl.load(gradient_at, source_mask, 0.0)
        gate = dot(h, tl.load(gate_at, gate_mask, 0.0).T, gate, PRECISION)
        up = dot(h, tl.load(gate_at + INNER * STRIDE, gate_mask, 0.0).T, up, PRECISION)
        grad_activation = dot(g, tl.load(down_at, down_mask, 0.0), grad_activation, PRECISION)
        hidden_at += source_step
        gradient_at += source_step
        gate_at += BLOCK_K
        down_at += BLOCK_K * INNER

    grad_gate, grad_up, act = swiglu_gradient(gate, up, grad_activation)
    mask = row_inside[:, None] & column_inside[None, :]
    if TRANSPOSED:
        result = batch * 2 * INNER * rows + column[None, :].to(tl.int64) * rows + row[:, None]
        half = INNER * rows
    else:
        result = row[:, None].to(tl.int64) * (2 * INNER) + column[None, :]
        half = INNER
    dtype = grad_gate_up.dtype.element_ty
    tl.store(grad_gate_up + result, grad_gate.to(dtype), mask)
    tl.store(grad_gate_up + result + half, grad_up.to(dtype), mask)
    if activation is not None:
        if TRANSPOSED:
            result = batch * INNER * rows + column[None, :].to(tl.int64) * rows + row[:, None]
        else:
            result = row[:, None].to(tl.int64) * INNER + column[None, :]
        tl.store(activation + result, act.to(dtype), mask)


def swiglu_backward(
    hidden: Buffer,
    gradient: Buffer,
    gate_up: Buffer,
    down: Buffer,
    grad_gate_up: Buffer,
    activation: Buffer | None,
    tile: Tile,
    *,
    transposed: bool = False,
    precision: str = "ieee",
) -> Launch:
    """From the gradient of a SwiGLU's output to those of gate and up.

    Args:
        hidden: its input, [T, D]; transposed [B, L, D].
        gradient: of its output, the shape of ``hidden``.
        gate_up: [2I, D]; transposed [2I, L], or with rows padded to more than L elements.
        down: [D, I]; transposed [L, I].
        grad_gate_up: result, [T, 2I]; transposed [B, 2I, D].
        activation: result ``silu(gate) * up``, [T, I]; transposed [B, I, D]; None where nobody needs it.
        tile: BLOCK_M rows, BLOCK_N inner columns, BLOCK_K.
        transposed: whether the product runs over the sequence.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    depth, inner = down.shape
    rows = hidden.shape[-1] if transposed else hidden.shape[0]
    batch = hidden.shape[0] if transposed else 1
    tiles = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(inner, tile["BLOCK_N"])
    return Launch.of(
        "swiglu_backward.swiglu_backward_kernel",
        (tiles, batch),
        {
            "hidden": hidden,
            "gradient": gradient,
            "gate_up": gate_up,
            "down": down,
            "grad_gate_up": grad_gate_up,
            "activation": activation,
            "rows": rows,
        },
        reads=("hidden", "gradient", "gate_up", "down"),
        writes=("grad_gate_up", "activation"),
        constants={
            "DEPTH": depth,
            "INNER": inner,
            "STRIDE": gate_up.shape[1],
            "TRANSPOSED": transposed,
            "PRECISION": precision,
        },
        tile=tile,
        flops=6 * batch * rows * depth * inner,
    )
