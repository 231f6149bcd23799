"""Input sum, QKV product and rotation: the first launch of an attention block.

    total = terms[0] + (terms[1] + ...)          [T, D], rounded as the reference rounds
    qkv   = rotate(total @ weight^T)             [T, (Hq + 2 Hkv) d]

One program makes a tile [BLOCK_M, BLOCK_N].  Column tiles of one row tile are neighbours in the grid, so the terms come
from memory once and from L2 afterwards; the weight (1.5 MB at D = 512) stays in L2 throughout, so no further grouping
pays.  With k terms a program reads k BLOCK_M D + BLOCK_N D elements for 2 BLOCK_M BLOCK_N D FLOP: more terms want wider
column tiles.  Each slice of ``total`` along D is written by one of the column tiles, in turn, so that none of them is
slower than the others.

Terms whose readers norm them (rows.py) are normed at their loads; where there is one and its sum is not stored, the
rows of the product are.

The rotation pairs column i of a head with i + d / 2, or 2 i with 2 i + 1.  The weight rows are taken so that both end
up in one thread (pairs.py).  The rows of a gate, Hq d or Hq of them, and those of decays, Hq, precede those of the
queries; the tiles have them padded to whole heads, so that pairs stay where they are.  Rows beyond T repeat the last
one: the inner loop has no masks unless BLOCK_K does not divide D.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from trmfast.kernels import pairs
from trmfast.kernels.dot import dot, narrow
from trmfast.kernels.input_sum import load_sum
from trmfast.kernels.pairs import pair_of, part_columns
from trmfast.kernels.plan import Buffer, Launch, Tile
from trmfast.kernels.rows import Rows, row_factors, sum_arguments

from trmfast.spec import BlockSpec

__all__ = ["qkv"]


@triton.jit
def qkv_kernel(
    terms,
    squares,
    weight,
    bias,
    cos,
    sin,
    total,
    out,
    tokens,
    length,
    end,  # D, at run time: a constant trip count would be unrolled and use more registers
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATE: tl.constexpr,  # columns of the gate and the decays
    PAD: tl.constexpr,  # what the tiles have behind it to fill a head
    BIASED: tl.constexpr,  # columns of queries and keys
    ROTATED: tl.constexpr,  # columns up to the end of the keys, in the tiles; 0: no rotation
    HALF: tl.constexpr,  # half of the width of a head
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    PLACES: tl.constexpr,  # a tuple like the next two: of each term, see rows.sum_arguments
    PARTS: tl.constexpr,
    TERM_EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SPACE: tl.constexpr = COLUMNS + PAD
    COLUMN_TILES: tl.constexpr = (SPACE + BLOCK_N - 1) // BLOCK_N
    STEP: tl.constexpr = 2 if INTERLEAVED else 1  # between the columns of two pairs
    PARTNER: tl.constexpr = 1 if INTERLEAVED else HALF  # between the two of a pair
    MASKED: tl.constexpr = D % BLOCK_K != 0
    BEHIND: tl.constexpr = len(terms) == 1 and total is None  # a norm applies to the product as well as to the term
    pid = tl.program_id(0)
    first_row = pid // COLUMN_TILES * BLOCK_M
    column_tile = pid % COLUMN_TILES
    rows = tl.arange(0, BLOCK_M)
    row_in_range = rows < tokens - first_row
    near_rows = tl.minimum(rows, tokens - first_row - 1)
    positions = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if ROTATED > 0:
        pair, half = pair_of(positions, GROUP)
        columns = pair // HALF * (2 * HALF) + pair % HALF * STEP + half * PARTNER
    else:
        columns = positions
    if PAD > 0:
        columns = tl.where(columns < GATE + PAD, tl.minimum(columns, GATE - 1), columns - PAD)
    if SPACE % BLOCK_N != 0:
        columns = tl.minimum(columns, COLUMNS - 1)

    depth = tl.arange(0, BLOCK_K)
    start = first_row.to(tl.int64) * D
    a_offsets = near_rows[:, None] * D + depth[None, :]
    b_offsets = columns[:, None] * D + depth[None, :]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    factors = ()
    if not BEHIND:
        factors = row_factors(squares, first_row, near_rows, PLACES, PARTS, D, TERM_EPS)
    for k in range(0, end, BLOCK_K):
        inside = (k + depth < D)[None, :]
        a = load_sum(terms, factors, start + k, a_offsets, inside, PLACES, MASKED)
        if total is not None:
            mine = row_in_range[:, None] & (k // BLOCK_K % COLUMN_TILES == column_tile)
            if MASKED:
                mine = mine & inside
            tl.store(total + (start + k) + a_offsets, a, mask=mine)
        if MASKED:
            b = tl.load(weight + k + b_offsets, mask=inside, other=0.0)
        else:
            b = tl.load(weight + k + b_offsets)
        product = dot(a, tl.trans(b), product, PRECISION)
    if BEHIND and len(squares) > 0:
        product *= row_factors(squares, first_row, near_rows, PLACES, PARTS, D, TERM_EPS)[0][:, None]
    if bias is not None:
        biased = (columns >= GATE) & (columns < GATE + BIASED)
        product += tl.load(bias + columns - GATE, mask=biased, other=0.0).to(tl.float32)[None, :]

    out_start = first_row.to(tl.int64) * COLUMNS
    if ROTATED > 0:
        low, high = part_columns(product, GROUP)
        pair = column_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        within = pair % HALF * STEP
        low_column = pair // HALF * (2 * HALF) + within
        turned = column_tile * BLOCK_N < ROTATED
        if GATE > 0:
            turned = turned & (column_tile * BLOCK_N + BLOCK_N > GATE + PAD)
        if turned:
            table = ((first_row + rows) % length)[:, None] * (2 * HALF) + within[None, :]
            if ROTATED % BLOCK_N == 0 and (GATE + PAD) % BLOCK_N == 0:
                cos_low, sin_low = tl.load(cos + table), tl.load(sin + table)
                cos_high, sin_high = tl.load(cos + PARTNER + table), tl.load(sin + PARTNER + table)
            else:
                turns = ((low_column >= GATE + PAD) & (low_column < ROTATED))[None, :]
                cos_low = tl.load(cos + table, mask=turns, other=1.0)
                sin_low = tl.load(sin + table, mask=turns, other=0.0)
                cos_high = tl.load(cos + PARTNER + table, mask=turns, other=1.0)
                sin_high = tl.load(sin + PARTNER + table, mask=turns, other=0.0)
            low, high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
        high_column = low_column + PARTNER
        low_mask = row_in_range[:, None]
        if SPACE % BLOCK_N != 0:
            low_mask = low_mask & (low_column < SPACE)[None, :]
        high_mask = low_mask
        if PAD > 0:
            low_mask = low_mask & ((low_column < GATE) | (low_column >= GATE + PAD))[None, :]
            high_mask = high_mask & ((high_column < GATE) | (high_column >= GATE + PAD))[None, :]
            low_column = tl.where(low_column < GATE, low_column, low_column - PAD)
            high_column = tl.where(high_column < GATE, high_column, high_column - PAD)
        target = out + out_start + rows[:, None] * COLUMNS
        tl.store(target + low_column[None, :], narrow(low, out.dtype.element_ty), mask=low_mask)
        tl.store(target + high_column[None, :], narrow(high, out.dtype.element_ty), mask=high_mask)
    else:
        mask = row_in_range[:, None]
        if COLUMNS % BLOCK_N != 0:
            mask = mask & (positions < COLUMNS)[None, :]
        target = out + out_start + rows[:, None] * COLUMNS + positions[None, :]
        tl.store(target, narrow(product, out.dtype.element_ty), mask=mask)


def qkv(
    block: BlockSpec,
    terms: Sequence[Buffer | Rows],
    weight: Buffer,
    out: Buffer,
    *,
    bias: Buffer | None = None,
    cos: Buffer | None = None,
    sin: Buffer | None = None,
    total: Buffer | None = None,
    tile: Tile,
    precision: str = "ieee",
) -> Launch:
    """The launch of the input sum, the QKV product and the rotation.

    Args:
        block: sizes of the block.
        terms: 1 to 8 of [B, L, D] in the order of the update, x last; the sum is taken from the right.
        weight: [G + (Hq + 2 Hkv) d, D], with G rows of the gate and the decays.
        out: [B, L, G + (Hq + 2 Hkv) d], the gate before its sigmoid, logits of decays, rotated queries, rotated keys,
            values.
        bias: [(Hq + Hkv) d], added to queries and keys before the rotation, or None.
        cos, sin: [>= L, d] float32, or None for no rotation.
        total: [B, L, D], receives the sum; None if not needed.
        tile: BLOCK_M, BLOCK_N, BLOCK_K.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: the number of terms, or a rotation of an odd head_dim.
    """
    summed, constants = sum_arguments(terms)
    *batch, length, width = summed["terms"][0].shape
    tokens, columns = prod(batch) * length, weight.shape[0]
    gate, half, pad = block.rows_ahead, 0, 0
    if cos is not None:
        if block.head_dim % 2:
            raise ValueError(f"head_dim: got {block.head_dim} with cos and sin, accepted are even numbers")
        half, pad = block.head_dim // 2, -gate % block.head_dim
    biased = (block.num_heads + block.num_kv_heads) * block.head_dim
    return Launch.of(
        "qkv.qkv_kernel",
        (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(columns + pad, tile["BLOCK_N"]),),
        {
            **summed,
            "weight": weight,
            "bias": bias,
            "cos": cos,
            "sin": sin,
            "total": total,
            "out": out,
            "tokens": tokens,
            "length": length,
            "end": width,
        },
        reads=("terms", "squares", "weight", "bias", "cos", "sin"),
        writes=("total", "out"),
        constants={
            "D": width,
            "COLUMNS": columns,
            "GATE": gate,
            "PAD": pad,
            "BIASED": biased,
            "ROTATED": gate + pad + biased if half else 0,
            "HALF": half,
            "INTERLEAVED": block.rotation == "interleaved",
            "GROUP": pairs.group_of(half) if half else 1,
            **constants,
            "PRECISION": precision,
        },
        tile=tile,
        flops=2 * tokens * columns * width,
        loads=(len(terms) * tile["BLOCK_M"] + tile["BLOCK_N"]) * width + tile["BLOCK_M"] * tile["BLOCK_N"],
    )
