"""The SwiGLU channel mixer: in one kernel with its residual and norm, or its first half alone.

    activation = silu(h1 @ gate^T) * (h1 @ up^T)          [T, I]
    out        = rms_norm(h1 + activation @ down^T)           [T, D]

``swiglu`` does both: a program holds BLOCK_M rows, makes the activation in tiles of BLOCK_I columns and adds each one's
share to [BLOCK_M, D] accumulators; the activation never leaves the chip.  A program reads the 3 I D elements of the
weights from L2 once, and the rows of h1 I / BLOCK_I times, for 6 BLOCK_M I D FLOP: BLOCK_M FLOP for each byte of a
2-byte weight.  ``gate_up`` writes the activation to memory, 4 I bytes a token there and back, and its tiles may be
larger than whole rows allow; ``projection`` does the rest.  It also makes the activation of a mixer without a gate, the
square of a ReLU or a GELU of one product; its tiles are then as many columns of one product as of two otherwise.

Where ``h1`` is normed by its readers (rows.py), the rows of gate and up are, and the residual.

Gate and up columns are interleaved in groups (pairs.py), so one product has both and parting them moves no data.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.pairs import CHAINED, GROUP, pair_of, part_columns
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.projection import begin_sum, block_width, end_sum, store_normed
from trmfast.kernels.rows import Rows, row_factor, rows_of

__all__ = ["activate", "gate_up", "is_gated", "silu", "swiglu"]

LOG2E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def silu(value):
    """``value * sigmoid(value)`` of float32 values."""
    return value / (1.0 + tl.exp2(value * -LOG2E))


def is_gated(channel_mixer: str) -> bool:
    """Whether a channel mixer has a gate beside its up projection."""
    return channel_mixer in ("swiglu", "conv_swiglu")


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """The square of a ReLU, or the exact GELU, of float32 values."""
    if ACTIVATION == "relu2":
        result = tl.maximum(value, 0.0)
        result = result * result
    else:
        result = 0.5 * value * (1.0 + tl.erf(value * SQRT_HALF))
    return result


@triton.jit
def swiglu_kernel(
    h1,
    squares,
    gate_up,
    down,
    out,
    rstd,
    tokens,
    end,  # D, at run time: a constant trip count would be unrolled and use more registers
    D: tl.constexpr,
    INTER: tl.constexpr,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    H1_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    rows = tl.minimum(tl.arange(0, BLOCK_M), tokens - first_row - 1)
    depth = tl.arange(0, BLOCK_K)
    a_base = h1 + first_row.to(tl.int64) * D
    a_offsets = rows[:, None] * D + depth[None, :]
    pair, half = pair_of(tl.arange(0, 2 * BLOCK_I), CHAINED)
    inner = tl.arange(0, BLOCK_I)
    down_offsets = tl.minimum(tl.arange(0, BLOCK_D), D - 1)[:, None] * INTER + inner[None, :]
    if squares is not None:
        factor = row_factor(squares, first_row, rows, PARTS, D, H1_EPS)
    h = begin_sum(h1, squares, first_row, 0, tokens, D, PARTS, H1_EPS, BLOCK_M, BLOCK_D)
    for i in range(0, INTER, BLOCK_I):
        column = i + pair
        if INTER % BLOCK_I != 0:
            column = tl.minimum(column, INTER - 1)
        # Early, so that the gate and up product hides the latency of L2.
        if INTER % BLOCK_I == 0:
            c = tl.load(down + i + down_offsets)
        else:
            c = tl.load(down + i + down_offsets, mask=(i + inner < INTER)[None, :], other=0.0)
        b_offsets = (column + half * INTER)[:, None] * D + depth[None, :]
        both = tl.zeros((BLOCK_M, 2 * BLOCK_I), tl.float32)
        for k in range(0, end, BLOCK_K):
            if D % BLOCK_K == 0:
                a = tl.load(a_base + k + a_offsets)
                b = tl.load(gate_up + k + b_offsets)
            else:
                inside = (k + depth < D)[None, :]
                a = tl.load(a_base + k + a_offsets, mask=inside, other=0.0)
                b = tl.load(gate_up + k + b_offsets, mask=inside, other=0.0)
            both = dot(a, tl.trans(b), both, PRECISION)
        if squares is not None:
            both *= factor[:, None]
        gate, up = part_columns(both, CHAINED)
        activation = narrow(silu(gate) * up, h1.dtype.element_ty)
        h = dot(activation, tl.trans(c), h, PRECISION)
    h = end_sum(h, h1, squares, first_row, 0, tokens, D, PARTS, H1_EPS, BLOCK_M, BLOCK_D)
    store_normed(h, out, rstd, first_row, tokens, D, EPS, BLOCK_M, BLOCK_D)


@triton.jit
def gate_up_kernel(
    h1,
    squares,
    gate_up,
    activation,
    gates,
    tokens,
    end,  # D, at run time: a constant trip count would be unrolled and use more registers
    D: tl.constexpr,
    INTER: tl.constexpr,
    PARTS: tl.constexpr,
    H1_EPS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "swiglu", of two products; "relu2" or "gelu", of one
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (INTER + BLOCK_I - 1) // BLOCK_I
    pid = tl.program_id(0)
    first_row = pid // COLUMN_TILES * BLOCK_M
    first_column = pid % COLUMN_TILES * BLOCK_I
    rows = tl.arange(0, BLOCK_M)
    near_rows = tl.minimum(rows, tokens - first_row - 1)
    depth = tl.arange(0, BLOCK_K)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    COLUMNS: tl.constexpr = 2 * BLOCK_I if GATED else BLOCK_I
    if GATED:
        pair, half = pair_of(tl.arange(0, COLUMNS), GROUP)
        column = first_column + pair
    else:
        column = first_column + tl.arange(0, COLUMNS)
    if INTER % BLOCK_I != 0:
        column = tl.minimum(column, INTER - 1)
    a_base = h1 + first_row.to(tl.int64) * D
    a_offsets = near_rows[:, None] * D + depth[None, :]
    if GATED:
        column += half * INTER
    b_offsets = column[:, None] * D + depth[None, :]
    both = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for k in range(0, end, BLOCK_K):
        if D % BLOCK_K == 0:
            a = tl.load(a_base + k + a_offsets)
            b = tl.load(gate_up + k + b_offsets)
        else:
            inside = (k + depth < D)[None, :]
            a = tl.load(a_base + k + a_offsets, mask=inside, other=0.0)
            b = tl.load(gate_up + k + b_offsets, mask=inside, other=0.0)
        both = dot(a, tl.trans(b), both, PRECISION)
    if squares is not None:
        both *= row_factor(squares, first_row, near_rows, PARTS, D, H1_EPS)[:, None]
    columns = first_column + tl.arange(0, BLOCK_I)
    mask = (rows < tokens - first_row)[:, None]
    if INTER % BLOCK_I != 0:
        mask = mask & (columns < INTER)[None, :]
    dtype: tl.constexpr = activation.dtype.element_ty
    target = activation + first_row.to(tl.int64) * INTER + rows[:, None] * INTER + columns[None, :]
    if GATED:
        gate, up = part_columns(both, GROUP)
        tl.store(target, narrow(silu(gate) * up, dtype), mask=mask)
        if gates is not None:
            target = gates + first_row.to(tl.int64) * (2 * INTER) + rows[:, None] * (2 * INTER) + columns[None, :]
            tl.store(target, narrow(gate, dtype), mask=mask)
            tl.store(target + INTER, narrow(up, dtype), mask=mask)
    else:
        tl.store(target, narrow(activate(both, ACTIVATION), dtype), mask=mask)


def swiglu(
    h1: Buffer | Rows,
    gate_up: Buffer,
    down: Buffer,
    out: Buffer,
    *,
    eps: float,
    rstd: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of the whole channel mixer.

    Args:
        h1: [..., D].
        gate_up: [2 I, D], the rows of the gate, then those of the up projection.
        down: [D, I].
        out: [..., D]; not the buffer of ``h1``.
        eps: of the norm.
        rstd: [...] float32, receives 1 / sqrt(mean(h^2) + eps) of each row, or None.
        tile: BLOCK_M, BLOCK_I (at least 16), BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    source = rows_of(h1)
    tokens, (width, inter) = prod(source.values.shape[:-1]), down.shape
    return Launch.of(
        "swiglu.swiglu_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]),),
        {
            "h1": source.values,
            "squares": source.squares,
            "gate_up": gate_up,
            "down": down,
            "out": out,
            "rstd": rstd,
            "tokens": tokens,
            "end": width,
        },
        reads=("h1", "squares", "gate_up", "down"),
        writes=("out", "rstd"),
        constants={
            "D": width,
            "INTER": inter,
            "EPS": eps,
            "PARTS": source.parts,
            "H1_EPS": source.eps,
            "PRECISION": precision,
            "BLOCK_D": block_width(width),
        },
        tile=tile,
        flops=6 * tokens * width * inter,
        special=2 * tokens * inter,
        loads=(tile["BLOCK_M"] * (triton.cdiv(inter, tile["BLOCK_I"]) + 2) + 3 * inter) * width,
    )


def gate_up(
    h1: Buffer | Rows,
    weight: Buffer,
    activation: Buffer,
    *,
    gates: Buffer | None = None,
    activation_of: str = "swiglu",
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of the gate and up product and its activation.

    Args:
        h1: [..., D].
        weight: [2 I, D], the rows of the gate, then those of the up projection; without a gate [I, D].
        activation: [..., I], receives silu(gate) * up, or what ``activation_of`` says.
        gates: [..., 2 I], receives gate and up before the activation, or None; not without a gate.
        activation_of: ``"swiglu"``, ``"relu2"`` or ``"gelu"``.
        tile: BLOCK_M, BLOCK_I (columns of the activation, at least 8), BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    source = rows_of(h1)
    tokens, (rows, width) = prod(source.values.shape[:-1]), weight.shape
    inter, products = activation.shape[-1], rows // activation.shape[-1]
    return Launch.of(
        "swiglu.gate_up_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(inter, tile["BLOCK_I"]),),
        {
            "h1": source.values,
            "squares": source.squares,
            "gate_up": weight,
            "activation": activation,
            "gates": gates,
            "tokens": tokens,
            "end": width,
        },
        reads=("h1", "squares", "gate_up"),
        writes=("activation", "gates"),
        constants={
            "D": width,
            "INTER": inter,
            "PARTS": source.parts,
            "H1_EPS": source.eps,
            "ACTIVATION": activation_of,
            "PRECISION": precision,
        },
        tile=tile,
        flops=2 * products * tokens * width * inter,
        special={"relu2": 0, "gelu": 1}.get(activation_of, 2) * tokens * inter,
        loads=(tile["BLOCK_M"] + products * tile["BLOCK_I"]) * width + tile["BLOCK_M"] * tile["BLOCK_I"],
    )
