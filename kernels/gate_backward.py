"""Gradients of the gate of attention and of what it multiplies.

    mixed = o * sigmoid(g)             o, softmax(q k^T) v, [B, L, Hq d]; g of the same shape, or [B, L, Hq]

All that is needed is what the gate left, a = mixed, and g, with s = sigmoid(g):

    grad o = grad a * s             grad g = grad a * a * (1 - s)             delta = sum over a head of grad a * a

delta is what attention_backward.py needs of the output of attention, which is not kept.  A program takes BLOCK_M tokens
of one head: it reads a, g and grad a, and writes grad o where grad a was, grad g, and delta.
"""

from __future__ import annotations

import triton
import triton.language as tl
from trmfast.kernels.attention import sigmoid
from trmfast.kernels.dot import narrow
from trmfast.kernels.head_norm import head_tile
from trmfast.kernels.plan import Buffer, Launch, Tile

from trmfast.spec import BlockSpec

__all__ = ["gate_backward"]


@triton.jit
def gate_backward_kernel(
    qkv,
    output,
    gradient,
    grad_qkv,
    delta,
    tokens,
    length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GATE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, first_row, rows, columns, row_inside, mask = head_tile(tokens, HEADS, HEAD_DIM, BLOCK_M, BLOCK_D)
    start = first_row.to(tl.int64)
    at = start * (HEADS * HEAD_DIM) + head * HEAD_DIM + rows[:, None] * (HEADS * HEAD_DIM) + columns[None, :]
    grad = tl.load(gradient + at, mask, 0.0).to(tl.float32)
    product = grad * tl.load(output + at, mask, 0.0).to(tl.float32)
    dtype: tl.constexpr = grad_qkv.dtype.element_ty
    if GATE == HEADS:
        gate_at = start * STRIDE + rows * STRIDE + head
        scale = sigmoid(tl.load(qkv + gate_at, row_inside, 0.0)).to(tl.float32)
        tl.store(grad_qkv + gate_at, narrow(tl.sum(product, 1) * (1.0 - scale), dtype), row_inside)
        scale = scale[:, None]
    else:
        gate_at = start * STRIDE + head * HEAD_DIM + rows[:, None] * STRIDE + columns[None, :]
        scale = sigmoid(tl.load(qkv + gate_at, mask, 0.0)).to(tl.float32)
        tl.store(grad_qkv + gate_at, narrow(product * (1.0 - scale), dtype), mask)
    tl.store(gradient + at, narrow(grad * scale, dtype), mask)
    if delta is not None:
        token = start + rows
        of_rows = (token // length * HEADS + head) * length + token % length
        tl.store(delta + of_rows, tl.sum(product, 1), row_inside)


def gate_backward(
    block: BlockSpec,
    qkv: Buffer,
    output: Buffer,
    gradient: Buffer,
    grad_qkv: Buffer,
    *,
    delta: Buffer | None = None,
    tile: Tile,
) -> Launch:
    """From the gradient of attention times its gate to those of the gate and of what it multiplies.

    Args:
        block: sizes of the block.
        qkv: [B, L, G + (Hq + 2 Hkv) d], the gate before its sigmoid first.
        output: what attention returned, times the gate, [B, L, Hq d].
        gradient: of ``output``, the same shape; becomes that of what the gate multiplied.
        grad_qkv: the shape of ``qkv``, receives the gradient of the gate.
        delta: [B, Hq, L] float32, receives the sums that :func:`attention_backward_queries` would make, or None.
        tile: BLOCK_M rows.
    """
    batch, length, stride = qkv.shape
    tokens, heads, head_dim = batch * length, block.num_heads, block.head_dim
    return Launch.of(
        "gate_backward.gate_backward_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]) * heads,),
        {
            "qkv": qkv,
            "output": output,
            "gradient": gradient,
            "grad_qkv": grad_qkv,
            "delta": delta,
            "tokens": tokens,
            "length": length,
        },
        reads=("qkv", "output", "gradient"),
        writes=("gradient", "grad_qkv", "delta"),
        constants={
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "GATE": block.gate_rows,
            "STRIDE": stride,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        },
        tile=tile,
        special=2 * tokens * block.gate_rows,
        loads=4 * tile["BLOCK_M"] * head_dim + 2 * tile["BLOCK_M"] * block.gate_rows // heads,
    )
