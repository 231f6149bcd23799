"""The SwiGLU over the sequence axis (``mlp_t``), whose norm runs over that axis too.

    activation = silu(gate @ h) * (up @ h)                 [B, I, D], h = sum of the terms, [B, L, D]
    out        = rms_norm over L of (h + down @ activation) [B, L, D]

A program with a norm owns BLOCK_C channels of one sequence over its whole length: the norm is a sum within the program.

``mlp_t``, for sequences that fit one tile (L <= 128): the whole mixer.  The channels are the rows of both products, as
queries are in attention: [BLOCK_C, L] @ [L, 2 BLOCK_I] makes gate and up, their activation is the left operand of
[BLOCK_C, BLOCK_I] @ [BLOCK_I, L].  The activation, at L = 97 and I = 512 as large as 5.3 states, never leaves the chip.
A program reads the 3 I L elements of the weights from L2, and h once, for 6 I L BLOCK_C FLOP.

``gate_up_t`` and ``down_t``, for longer ones (L = 916, I = 2560: the activation is 2.8 states): tiles of the activation
as in any product; then a program walks over row tiles of BLOCK_L, writes them with the residual added, sums their
squares, then reads its own output back from L2 and scales it.  That costs one more rounding to the compute
dtype, the one that eager PyTorch makes there, and saves a launch and a buffer compared with a separate norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.input_sum import checked_terms, load_sum
from trmfast.kernels.pairs import CHAINED, GROUP, pair_of, part_columns, part_rows
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.rows import Rows, row_factors, sum_arguments
from trmfast.kernels.swiglu import silu

__all__ = ["LONGEST", "down_t", "gate_up_t", "mlp_t", "padded_length"]

LONGEST = 128


def padded_length(length: int) -> int:
    """The row width at which the gate and up weight [2 I, L] is stored, padded with zeros: loads of 16 bytes, and
    no masks along L."""
    return -(-length // 64) * 64 if length > LONGEST else max(16, int(triton.next_power_of_2(length)))


@triton.jit
def mlp_t_kernel(
    terms,
    squares,
    gate_up,
    down,
    total,
    out,
    rstd,
    end,  # INTER, at run time: a constant trip count would be unrolled and use more registers
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,  # of the rows of gate_up
    D: tl.constexpr,
    INTER: tl.constexpr,
    EPS: tl.constexpr,
    PLACES: tl.constexpr,  # a tuple like the next two: of each term, see rows.sum_arguments
    PARTS: tl.constexpr,
    TERM_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    sequence = pid // CHANNEL_TILES
    channels = pid % CHANNEL_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    start = sequence.to(tl.int64) * (LENGTH * D)
    rows = tl.arange(0, BLOCK_L)
    offsets = rows[:, None] * D + channels[None, :]
    mask = (rows < LENGTH)[:, None]
    if D % BLOCK_C != 0:
        mask = mask & (channels < D)[None, :]
    near_rows = tl.minimum(rows, LENGTH - 1)
    factors = row_factors(squares, sequence * LENGTH, near_rows, PLACES, PARTS, D, TERM_EPS)
    h = load_sum(terms, factors, start, offsets, mask, PLACES, MASKED=True)
    if total is not None:
        tl.store(total + start + offsets, h, mask=mask)
    h = tl.trans(h)  # [BLOCK_C, BLOCK_L]

    pair, half = pair_of(tl.arange(0, 2 * BLOCK_I), CHAINED)
    inner = tl.arange(0, BLOCK_I)
    down_offsets = tl.minimum(rows, LENGTH - 1)[:, None] * INTER + inner[None, :]
    # As in projection.begin_sum: in 16 bits the residual is added first, in float32 last.
    if h.dtype == tl.float32:
        sums = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    else:
        sums = h.to(tl.float32)
    for i in range(0, end, BLOCK_I):
        column = i + pair
        if INTER % BLOCK_I != 0:
            column = tl.minimum(column, INTER - 1)
        b_offsets = (column + half * INTER)[:, None] * WIDTH + rows[None, :]
        if WIDTH >= BLOCK_L:
            b = tl.load(gate_up + b_offsets)
        else:
            b = tl.load(gate_up + b_offsets, mask=(rows < WIDTH)[None, :], other=0.0)
        both = dot(h, tl.trans(b), tl.zeros((BLOCK_C, 2 * BLOCK_I), tl.float32), PRECISION)
        gate, up = part_columns(both, CHAINED)
        activation = narrow(silu(gate) * up, h.dtype)
        if INTER % BLOCK_I == 0:
            c = tl.load(down + i + down_offsets)
        else:
            c = tl.load(down + i + down_offsets, mask=(i + inner < INTER)[None, :], other=0.0)
        sums = dot(activation, tl.trans(c), sums, PRECISION)
    if h.dtype == tl.float32:
        sums += h

    if LENGTH != BLOCK_L:
        sums = tl.where((rows < LENGTH)[None, :], sums, 0.0)
    scale = tl.rsqrt(tl.sum(sums * sums, 1) / LENGTH + EPS)
    normed = narrow(sums * scale[:, None], out.dtype.element_ty)
    tl.store(out + start + offsets, tl.trans(normed), mask=mask)
    if rstd is not None:
        tl.store(rstd + sequence.to(tl.int64) * D + channels, scale, mask=channels < D)


@triton.jit
def gate_up_t_kernel(
    terms,
    gate_up,
    total,
    activation,
    gates,
    end,  # LENGTH, at run time: a constant trip count would be unrolled and use more registers
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,  # of the rows of gate_up
    D: tl.constexpr,
    INTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    INNER_TILES: tl.constexpr = (INTER + BLOCK_I - 1) // BLOCK_I
    CHANNEL_TILES: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    LAST: tl.constexpr = (LENGTH - 1) // BLOCK_K * BLOCK_K  # where the last slice along L begins
    pid = tl.program_id(0)
    first_inner = pid % INNER_TILES * BLOCK_I
    first_channel = pid // INNER_TILES % CHANNEL_TILES * BLOCK_C
    sequence = pid // INNER_TILES // CHANNEL_TILES
    start = sequence.to(tl.int64) * (LENGTH * D)
    pair, half = pair_of(tl.arange(0, 2 * BLOCK_I), GROUP)
    inner = first_inner + pair
    if INTER % BLOCK_I != 0:
        inner = tl.minimum(inner, INTER - 1)
    channels = first_channel + tl.arange(0, BLOCK_C)
    channel_in_range = (channels < D)[None, :]
    near_channels = channels
    if D % BLOCK_C != 0:
        near_channels = tl.minimum(channels, D - 1)
    depth = tl.arange(0, BLOCK_K)
    a_offsets = (inner + half * INTER)[:, None] * WIDTH + depth[None, :]
    both = tl.zeros((2 * BLOCK_I, BLOCK_C), tl.float32)
    for k in range(0, end, BLOCK_K):
        # Rows beyond the sequence repeat its last one, and meet the zeros beyond L in the weight.
        rows = k + depth
        b_offsets = tl.minimum(rows, LENGTH - 1)[:, None] * D + near_channels[None, :]
        b = load_sum(terms, (), start, b_offsets, None, (), MASKED=False)
        if total is not None:
            mine = (rows < LENGTH)[:, None] & channel_in_range & (k // BLOCK_K % INNER_TILES == pid % INNER_TILES)
            tl.store(total + start + b_offsets, b, mask=mine)
        if LAST + BLOCK_K <= WIDTH:
            a = tl.load(gate_up + k + a_offsets)
        else:
            a = tl.load(gate_up + k + a_offsets, mask=(k + depth < WIDTH)[None, :], other=0.0)
        both = dot(a, b, both, PRECISION)
    gate, up = part_rows(both, GROUP)
    rows = first_inner + tl.arange(0, BLOCK_I)
    mask = (rows < INTER)[:, None] & channel_in_range
    offsets = rows[:, None] * D + channels[None, :]
    dtype: tl.constexpr = activation.dtype.element_ty
    tl.store(activation + sequence.to(tl.int64) * (INTER * D) + offsets, narrow(silu(gate) * up, dtype), mask=mask)
    if gates is not None:
        target = gates + sequence.to(tl.int64) * (2 * INTER * D) + offsets
        tl.store(target, narrow(gate, dtype), mask=mask)
        tl.store(target + INTER * D, narrow(up, dtype), mask=mask)


@triton.jit
def down_t_kernel(
    activation,
    down,
    residual,
    out,
    rstd,
    end,  # INTER, at run time: a constant trip count would be unrolled and use more registers
    LENGTH: tl.constexpr,
    D: tl.constexpr,
    INTER: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHANNEL_TILES: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    sequence = pid // CHANNEL_TILES
    channels = pid % CHANNEL_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in_range = (channels < D)[None, :]
    near_channels = channels
    if D % BLOCK_C != 0:
        near_channels = tl.minimum(channels, D - 1)
    start = sequence.to(tl.int64) * (LENGTH * D)
    b_base = activation + sequence.to(tl.int64) * (INTER * D)
    depth = tl.arange(0, BLOCK_K)
    b_offsets = depth[:, None] * D + near_channels[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for first_row in range(0, LENGTH, BLOCK_L):
        rows = first_row + tl.arange(0, BLOCK_L)
        a_offsets = tl.minimum(rows, LENGTH - 1)[:, None] * INTER + depth[None, :]
        product = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
        for k in range(0, end, BLOCK_K):
            if INTER % BLOCK_K == 0:
                a = tl.load(down + k + a_offsets)
                b = tl.load(b_base + k * D + b_offsets)
            else:
                a = tl.load(down + k + a_offsets, mask=(k + depth < INTER)[None, :], other=0.0)
                b = tl.load(b_base + k * D + b_offsets, mask=(k + depth < INTER)[:, None], other=0.0)
            product = dot(a, b, product, PRECISION)
        mask = (rows < LENGTH)[:, None] & channel_in_range
        offsets = rows[:, None] * D + channels[None, :]
        h = product + tl.load(residual + start + offsets, mask=mask, other=0.0).to(tl.float32)
        h = tl.where(mask, h, 0.0)
        squares += tl.sum(h * h, 0)
        if LENGTH <= BLOCK_L:
            scale = tl.rsqrt(squares / LENGTH + EPS)
            tl.store(out + start + offsets, narrow(h * scale[None, :], dtype), mask=mask)
        else:
            tl.store(out + start + offsets, narrow(h, dtype), mask=mask)
    scale = tl.rsqrt(squares / LENGTH + EPS)
    if LENGTH > BLOCK_L:
        tl.debug_barrier()  # what other threads of this program wrote is read below
        for first_row in range(0, LENGTH, BLOCK_L):
            rows = first_row + tl.arange(0, BLOCK_L)
            mask = (rows < LENGTH)[:, None] & channel_in_range
            target = out + start + rows[:, None] * D + channels[None, :]
            h = tl.load(target, mask=mask, other=0.0).to(tl.float32)
            tl.store(target, narrow(h * scale[None, :], dtype), mask=mask)
    if rstd is not None:
        tl.store(rstd + sequence.to(tl.int64) * D + channels, scale, mask=channels < D)


def mlp_t(
    terms: Sequence[Buffer | Rows],
    gate_up: Buffer,
    down: Buffer,
    out: Buffer,
    *,
    eps: float,
    total: Buffer | None = None,
    rstd: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of the whole mixer, for sequences of up to 128 tokens.

    Args:
        terms: 1 to 8 of [B, L, D] in the order of the update, x last; the sum is taken from the right.
        gate_up: [2 I, W], the rows of the gate, then those of the up projection; W >= L, zeros from L on; 16-byte loads
            need the W of :func:`padded_length`.
        down: [L, I].
        out: [B, L, D]; not one of the terms.
        eps: of the norm.
        total: [B, L, D], receives the sum of the terms, or None.
        rstd: [B, D] float32, receives 1 / sqrt(mean over L of h^2 + eps), or None.
        tile: BLOCK_C channels, BLOCK_I (at least 16).
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: a longer sequence, or the number of terms.
    """
    summed, constants = sum_arguments(terms)
    (batch, length, width), inter = summed["terms"][0].shape, down.shape[1]
    if length > LONGEST:
        raise ValueError(f"terms: got length {length}, accepted are lengths up to {LONGEST}")
    return Launch.of(
        "mixer_mlp_t.mlp_t_kernel",
        (batch * triton.cdiv(width, tile["BLOCK_C"]),),
        {
            **summed,
            "gate_up": gate_up,
            "down": down,
            "total": total,
            "out": out,
            "rstd": rstd,
            "end": inter,
        },
        reads=("terms", "squares", "gate_up", "down"),
        writes=("total", "out", "rstd"),
        constants={
            "LENGTH": length,
            "WIDTH": gate_up.shape[1],
            "D": width,
            "INTER": inter,
            "EPS": eps,
            **constants,
            "PRECISION": precision,
            "BLOCK_L": max(16, triton.next_power_of_2(length)),
        },
        tile=tile,
        flops=6 * batch * length * width * inter,
        special=2 * batch * width * inter,
        loads=((len(terms) + 1) * tile["BLOCK_C"] + 3 * inter) * length,
    )


def gate_up_t(
    terms: Sequence[Buffer],
    gate_up: Buffer,
    activation: Buffer,
    *,
    total: Buffer | None = None,
    gates: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of the input sum, the gate and up product over the sequence, and its activation.

    Args:
        terms: 1 to 8 buffers [B, L, D] in the order of the update, x last; the sum is taken from the right.
        gate_up: [2 I, W], the rows of the gate, then those of the up projection; W >= L, zeros from L on; 16-byte loads
            need the W of :func:`padded_length`.
        activation: [B, I, D], receives silu(gate) * up.
        total: [B, L, D], receives the sum of the terms, or None.
        gates: [B, 2 I, D], receives gate and up before the activation, or None.
        tile: BLOCK_I (rows of the activation, at least 8), BLOCK_C channels, BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: the number of terms.
    """
    terms = checked_terms(terms)
    (batch, length, width), inter = terms[0].shape, activation.shape[-2]
    return Launch.of(
        "mixer_mlp_t.gate_up_t_kernel",
        (batch * triton.cdiv(inter, tile["BLOCK_I"]) * triton.cdiv(width, tile["BLOCK_C"]),),
        {
            "terms": terms,
            "gate_up": gate_up,
            "total": total,
            "activation": activation,
            "gates": gates,
            "end": length,
        },
        reads=("terms", "gate_up"),
        writes=("total", "activation", "gates"),
        constants={
            "LENGTH": length,
            "WIDTH": gate_up.shape[1],
            "D": width,
            "INTER": inter,
            "PRECISION": precision,
        },
        tile=tile,
        flops=4 * batch * length * width * inter,
        special=2 * batch * width * inter,
        loads=(2 * tile["BLOCK_I"] + len(terms) * tile["BLOCK_C"]) * length + tile["BLOCK_I"] * tile["BLOCK_C"],
    )


def down_t(
    activation: Buffer,
    down: Buffer,
    residual: Buffer,
    out: Buffer,
    *,
    eps: float,
    rstd: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of the down product over the sequence, the residual and the norm over the sequence.

    Args:
        activation: [B, I, D].
        down: [L, I].
        residual: [B, L, D].
        out: [B, L, D]; not the residual's buffer.
        eps: of the norm.
        rstd: [B, D] float32, receives 1 / sqrt(mean over L of h^2 + eps), or None.
        tile: BLOCK_L rows at a time, BLOCK_C channels, BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    (batch, length, width), inter = residual.shape, down.shape[1]
    return Launch.of(
        "mixer_mlp_t.down_t_kernel",
        (batch * triton.cdiv(width, tile["BLOCK_C"]),),
        {"activation": activation, "down": down, "residual": residual, "out": out, "rstd": rstd, "end": inter},
        reads=("activation", "down", "residual"),
        writes=("out", "rstd"),
        constants={"LENGTH": length, "D": width, "INTER": inter, "EPS": eps, "PRECISION": precision},
        tile=tile,
        flops=2 * batch * length * width * inter,
        loads=(triton.cdiv(length, tile["BLOCK_L"]) * tile["BLOCK_C"] + length) * inter + 4 * tile["BLOCK_C"] * length,
    )
